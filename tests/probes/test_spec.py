"""What a probe is asked: options, presets, refusals before torch; and that every preset is read."""

import pytest

from ctxext.config import presets
from ctxext.errors import InputError, SpecError
from ctxext.probes.plan_probes import plan_probe
from ctxext.probes.probe_spec import PROBES, RUN_PROBES, probe_spec_from_options


@pytest.mark.parametrize("preset", presets.names("probe"))
def test_a_preset_is_read_for_every_probe(preset):
    spec = probe_spec_from_options(list(PROBES), {}, preset=preset)
    assert [probe.probe for probe in spec.probes] == list(PROBES)


def test_options_go_to_every_probe_that_has_them_and_before_a_preset():
    names = ["receptive-field", "layer-niah", "qk-distance"]
    spec = probe_spec_from_options(
        names, {"samples": 50, "length": "1k", "layer-niah.classes": 4, "dtype": "bfloat16"}, preset="smoke"
    )
    field, niah, _ = spec.probes
    assert (field.samples, field.length, niah.samples, niah.length, niah.classes) == (50, 1024, 50, 1024, 4)
    assert spec.dtype == "bfloat16" and field.tokens == 4096


@pytest.mark.parametrize(
    ("names", "given", "error", "words"),
    [
        (["layer-nia"], {}, InputError, "allowed are receptive-field"),
        (["positions", "positions"], {}, InputError, "named twice"),
        (["positions"], {"samples": 4}, InputError, "samples is not a field of positions"),
        (["layer-niah"], {"samples": 3}, SpecError, "samples"),
        (["layer-niah"], {"retrieval-heads.draws": 3}, InputError, "is not a field"),
        (["retrieval-heads"], {"ablate": 0}, SpecError, "ablate"),
    ],
)
def test_what_cannot_be_is_refused(names, given, error, words):
    with pytest.raises(error, match=words):
        probe_spec_from_options(names, given)


def test_a_fault_within_a_probe_is_one_fault():
    with pytest.raises(SpecError) as caught:
        probe_spec_from_options(["layer-niah"], {"samples": 5})
    assert caught.value.faults == ("probes.0.samples: got 5; allowed: at least 40",)


def test_a_preset_that_names_no_probe_is_refused(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("layer-nia: {samples: 100}\n")
    with pytest.raises(InputError, match="'layer-nia' is neither a probe nor a field"):
        probe_spec_from_options(["layer-niah"], {}, preset=str(path))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("layer-niah: 5", "got 5; allowed: fields"),
        ("layer-niah: [a]", "allowed: fields"),
        ("retrieval-heads: {smaples: 4}", "'smaples' is not a field"),
    ],
)
def test_a_preset_is_checked_whole(text, words, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(text + "\n")
    with pytest.raises(InputError, match=words):
        probe_spec_from_options(["positions", "layer-niah"], {}, preset=str(path))


def test_all_leaves_out_what_follows_a_run(tmp_path):
    plan = plan_probe("tiny", ["all"], out=tmp_path / "out")
    assert [probe.probe for probe in plan.spec.probes] == [name for name in PROBES if name not in RUN_PROBES]
    assert {getattr(probe, "length", 512) for probe in plan.spec.probes} == {512}


@pytest.mark.parametrize(
    ("names", "given", "words"),
    [
        (["retrieval-trace"], {}, "training run"),
        (["attention-distance"], {"length": 1024}, "usable length of "),
        (["attention-distance"], {"attention-distance.lengths": ["1k"]}, "usable length of "),
        (["attention-distance"], {"length": 32}, "less than 64"),
        (["attention-distance"], {"data": "no-such-file.txt"}, "no-such-file"),
        (["gradient-influence"], {"length": 128, "last": 129}, "last 129 positions of 128"),
        (["retrieval-heads"], {"ablate": 9}, "ablate 9 needs two sets of as many heads.*16 heads"),
        (["all", "positions"], {}, "give `all` alone"),
        (["receptive-field"], {"data": "grass"}, "repeated sentences"),
        (["receptive-field"], {"evaluator": "no-such-model"}, "no-such-model"),
    ],
)
def test_what_the_model_cannot_do_is_refused(names, given, words, tmp_path):
    with pytest.raises(InputError, match=words):
        plan_probe("tiny", names, given, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_beyond_what_a_model_supports_when_requested(tmp_path):
    plan = plan_probe("tiny", ["attention-distance"], {"length": 1024, "extrapolate": True}, out=tmp_path / "out")
    assert plan.spec.probes[0].length == 1024
