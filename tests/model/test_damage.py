"""On real weights the damage of a layout is ordered as theory says (the figures themselves are not held to)."""

import pytest
import torch

from ctxext.evals.eval_spec import eval_spec_from_options
from ctxext.evals.suite import evaluate
from ctxext.model.convert import plan_conversion, run_conversion
from ctxext.model.load import load_model


@pytest.fixture(scope="module")
def perplexity(stories, tmp_path_factory):
    """{layout: perplexity at 512 tokens (hf-stride) on text that stories260K itself wrote: 16 x 512 tokens, seed 0}."""
    place = tmp_path_factory.mktemp("damage")
    source = load_model(stories)
    torch.manual_seed(0)
    sampled = source.model.generate(
        torch.full((16, 1), source.tokenizer.bos_token_id),
        max_new_tokens=511,
        do_sample=True,
        top_k=0,
        eos_token_id=None,
    )
    text = place / "text.txt"
    text.write_text("\n".join(source.tokenizer.batch_decode(sampled, skip_special_tokens=True)))
    layouts = {"full": ("full", None), "N": ("N", None), **{f"S{w}": ("S", w) for w in (16, 32, 64, 128)}}
    for name, (pattern, window) in layouts.items():
        plan = plan_conversion(str(stories), pattern, out=place / name, sliding_window=window)
        run_conversion(plan, gate=False)
    models = [str(stories), *(str(place / name) for name in layouts)]
    report = evaluate(
        models, eval_spec_from_options("perplexity", {"lengths": [512], "data": str(text), "limit": 8192})
    )
    values = [row["value"] for row in report.rows()]
    return dict(zip(["source", *layouts], values, strict=True))


def test_a_smaller_window_costs_more(perplexity):
    order = [perplexity[name] for name in ("S16", "S32", "S64", "S128", "full")]
    assert order == sorted(order, reverse=True) and len(set(order)) == 5, perplexity


def test_the_full_layout_is_the_source(perplexity):
    assert perplexity["full"] == pytest.approx(perplexity["source"], rel=1e-6)


def test_no_positions_anywhere_destroys_the_model(perplexity):
    assert perplexity["N"] > 20 * perplexity["full"], perplexity
