"""`verify` on a real pretrained checkpoint under every layout that is shipped; skips, saying so, where it is absent."""

import pytest

from ctxext.config import presets
from ctxext.evals.verify import plan_launch, verify
from ctxext.model.convert import plan_conversion, run_conversion

SLOW = {"swa2048", "swa2048-nope", "rnope-swa4096"}  # windows longer than the row: naive attention is O(T²) there


@pytest.mark.parametrize(
    "hybrid", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in presets.names("hybrid")]
)
@pytest.mark.parametrize("attention", ["inference", "training"])
def test_stories_under_every_layout(hybrid, attention, stories, tmp_path):
    run_conversion(plan_conversion(str(stories), hybrid, out=tmp_path / "out"), gate=False)
    certificate = verify(plan_launch(str(tmp_path / "out"), attention=attention), device="cpu")
    assert certificate.failed == () and len(certificate.checks) > 10
