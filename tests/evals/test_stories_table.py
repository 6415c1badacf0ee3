"""stories260K gives the figures that others measured on it (shared/EVALS.md): on its own samples, and on a novel.

Neither the temperature of their samples nor the protocol nor the novel is written down. So one thing is chosen here to
fit: the temperature, 0.8 (at 1.0 all figures are half as high again, the model being less sure of its own text); the
protocol is `truncate`. All of the table's figures on own samples must then agree within 6% (8% without positions). Of
the novel, whose perplexity is 30 to 42 by book and chapter, the ratios to the full layout at 512 tokens must agree.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ctxext.evals.eval_spec import eval_spec_from_options
from ctxext.evals.suite import evaluate
from ctxext.model.convert import plan_conversion, run_conversion
from ctxext.model.load import load_model

pytestmark = pytest.mark.slow

SAMPLES = 64  # rows that the model writes
FULL = {128: (3.21, 42.7), 256: (2.97, 33.5), 512: (2.89, 33.3)}
WINDOWS = {16: (3.50, 37.2), 32: (3.23, 35.5), 64: (3.02, 34.8), 128: (2.92, 33.8)}
ONE_FULL = {"SSFSS": (3.13, 34.4), "SSSSF": (3.04, 34.3), "SFSFS": (3.19, 35.5), "FSSSS": (3.25, 36.0)}
NOPE_AT = (4.00, 5.83, 3.44, 3.95, 3.46)
INTERPOLATED = {768: (4.37, 51), 1024: (8.17, 72), 2048: (24.3, 128)}


@pytest.fixture(scope="module")
def texts(stories: Path, shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Files: what stories260K wrote (512 tokens a row), and a piece of a novel."""
    place = tmp_path_factory.mktemp("texts")
    loaded = load_model(stories, device="cpu")
    torch.manual_seed(0)
    sampled = loaded.model.generate(
        torch.full((SAMPLES, 1), loaded.tokenizer.bos_token_id),
        max_new_tokens=511,
        do_sample=True,
        temperature=0.8,
        top_k=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    (place / "own.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in loaded.tokenizer.batch_decode(sampled, True))
    )
    novel = (shared_data / "books" / "eliot_daniel_deronda.md").read_text("utf-8")
    (place / "novel.txt").write_text(novel[20_000:140_000])
    return str(place / "own.jsonl"), str(place / "novel.txt")


def measured(model: Path, texts: tuple[str, str], lengths: list[int]) -> list[list[float]]:
    """[of own samples, of the novel] at each length."""
    found = []
    for text in texts:
        given = {"lengths": lengths, "data": text, "protocol": "truncate", "limit": 32_768, "extrapolate": True}
        found.append(
            [row["value"] for row in evaluate([str(model)], eval_spec_from_options("perplexity", given)).rows()]
        )
    return found


def converted(stories: Path, out: Path, pattern: str, window: int | None = None) -> Path:
    run_conversion(plan_conversion(str(stories), pattern, out=out, sliding_window=window), gate=False)
    return out


def report(name: str, found: Any, expected: Any) -> None:
    print(f"{name}: {[round(value, 2) for value in found]} for {list(expected)}")


def test_the_source_at_its_lengths(stories: Path, texts: tuple[str, str]) -> None:
    own, novel = measured(stories, texts, list(FULL))
    report("own", own, [a for a, _ in FULL.values()])
    report("novel", novel, [b for _, b in FULL.values()])
    assert own == pytest.approx([a for a, _ in FULL.values()], rel=0.06)
    assert 25 < novel[-1] < 45 and novel == sorted(novel, reverse=True)


@pytest.fixture(scope="module")
def full_on_novel(stories: Path, texts: tuple[str, str]) -> float:
    return measured(stories, texts[1:], [512])[0][0]


def test_windows_everywhere_and_one_full_layer(
    stories: Path, texts: tuple[str, str], full_on_novel: float, tmp_path: Path
) -> None:
    layouts = {("S", W): pair for W, pair in WINDOWS.items()} | {(p, 32): pair for p, pair in ONE_FULL.items()}
    for (pattern, window), (own, novel) in layouts.items():
        found = measured(converted(stories, tmp_path / f"{pattern}{window}", pattern, window), texts, [512])
        report(f"{pattern} {window}", [found[0][0], found[1][0]], (own, novel))
        assert found[0][0] == pytest.approx(own, rel=0.06), (pattern, window)
        assert found[1][0] / full_on_novel == pytest.approx(novel / FULL[512][1], rel=0.06), (pattern, window)


def test_one_layer_without_positions(stories: Path, texts: tuple[str, str], tmp_path: Path) -> None:
    found = []
    for layer in range(5):
        pattern = "".join("N" if i == layer else "F" for i in range(5))
        found.append(measured(converted(stories, tmp_path / pattern, pattern), texts[:1], [512])[0][0])
    report("NoPE at one layer", found, NOPE_AT)
    assert found == pytest.approx(NOPE_AT, rel=0.08)
    everywhere = measured(converted(stories, tmp_path / "N", "N"), texts[:1], [512])[0][0]
    assert everywhere == pytest.approx(113, rel=0.3), everywhere


@pytest.mark.parametrize("length", list(INTERPOLATED))
def test_interpolation_without_training(
    stories: Path, texts: tuple[str, str], full_on_novel: float, tmp_path: Path, length: int
) -> None:
    shutil.copytree(stories, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    theta = (config.get("rope_parameters") or config).get("rope_theta", 10_000.0)
    config["rope_parameters"] = {"rope_type": "linear", "factor": length / 512, "rope_theta": theta}
    config.pop("rope_scaling", None)
    config["max_position_embeddings"] = length
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (found,) = measured(tmp_path / "model", texts[1:], [length])
    report(f"interpolated to {length}, novel", found, [INTERPOLATED[length][1]])
    assert found[0] / full_on_novel == pytest.approx(INTERPOLATED[length][1] / FULL[512][1], rel=0.12)
