"""S²-Attn that keeps the first token visible: when it is chosen, that it reaches the attention, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ctxext.config.loader import build, read_yaml
from ctxext.errors import InputError
from ctxext.evals.verify import plan_launch, verify
from ctxext.model.load import load_model
from ctxext.model.source import resolve
from ctxext.train import loop, sink_tokens
from ctxext.train.finetune import run_finetune
from ctxext.train.finetune_spec import FinetuneSpec
from ctxext.train.loop import Events
from ctxext.train.run_directory import SPEC_FILE, plan_resumed, start_run
from ctxext.train.run_plan import plan_run

FIRST = 5  # the id of "$", which the texts here have at their beginning alone
CTX, G = 128, 32


@pytest.fixture(scope="module")
def hanging(write_model, tmp_path_factory) -> Path:
    """A Qwen2 whose every head attends to one token, FIRST, wherever that is.

    Channel 0 of the residual stream is large for this token and zero for all others. Each key reads it into the pair
    of RoPE with the lowest frequency, where each query has a bias.
    """
    directory = write_model(tmp_path_factory.mktemp("hanging") / "model", "qwen2", max_position_embeddings=512)
    weights = load_file(directory / "model.safetensors")
    weights["model.embed_tokens.weight"][:, 0] = 0.0
    weights["model.embed_tokens.weight"][FIRST, 0] = 3.0
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight[0] = 0.0  # nothing else writes to channel 0
        if "layernorm" in name:
            weight[0] = 1.0
        if name.endswith("k_proj.weight"):
            weight[3::8, 0] = 4.0  # head_dim is 8: dimensions 3 and 7 turn together, the slowest
        if name.endswith("q_proj.bias"):
            weight[3::8] = 4.0
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"Line {i} of a text that is cut into sequences. {i * i}\n" for i in range(300)))
    return path


def make_plan(model: Path, text: Path, **fields: Any):
    attention = {"train": "s2", "group_size": G} | fields.pop("attention", {})
    defaults = {"ctx": CTX, "steps": 2, "global_batch_size": 2, "data": {"source": str(text)}, "attention": attention}
    return plan_run(resolve(str(model)), build(FinetuneSpec, {**defaults, **fields}, source="test"))


def row(first: int) -> torch.Tensor:
    ids = torch.randint(10, 250, (1, 200), generator=torch.Generator().manual_seed(0))
    ids[0, 0] = first
    return ids


def test_a_model_that_hangs_on_its_first_token_is_told_from_one_that_does_not(hanging, model_dir):
    model = load_model(str(hanging), device="cpu").model
    with_first, without = (sink_tokens.first_token_shares(model, row(first)) for first in (FIRST, 6))
    assert len(with_first) == 4 and min(with_first) > 0.5 and sink_tokens.measured_sinks(with_first) == 1
    assert sink_tokens.measured_sinks(without) == 0
    plain = load_model(str(model_dir("llama")), device="cpu").model
    assert sink_tokens.measured_sinks(sink_tokens.first_token_shares(plain, row(FIRST))) == 0


def test_tiny_and_stories_have_no_sink(stories):
    for name in ("tiny", str(stories)):
        loaded = load_model(name, device="cpu")
        shares = sink_tokens.first_token_shares(loaded.model, sink_tokens.measured_row(loaded.tokenizer, 512))
        assert max(shares) < 0.01 and sink_tokens.measured_sinks(shares) == 0


def test_auto_takes_the_first_token_where_the_model_hangs_on_it(hanging, text, tmp_path, monkeypatch):
    monkeypatch.setattr(sink_tokens, "measured_row", lambda tokenizer, longest: row(FIRST))
    seen: set[Any] = set()
    real = loop.forward_backward

    def noting(engine, batch, plan, step):
        seen.add(plan.sink_tokens)
        return real(engine, batch, plan, step)

    monkeypatch.setattr(loop, "forward_backward", noting)
    plan, lines = make_plan(hanging, text), list[str]()
    assert plan.sink_tokens is None  # known when the model is there
    start_run(plan, tmp_path / "run")
    run_finetune(plan, tmp_path / "run", events=Events(lines.append))
    assert seen == {1}
    assert any("attention.sinks: 1;" in line and "on the first token" in line for line in lines)
    assert json.loads((tmp_path / "run" / "ctxext.json").read_text())["facts"]["sink_tokens"] == 1
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["model_type"] == "qwen2" and not [key for key in config if "sink" in key or "group" in key]


@pytest.mark.parametrize("requested", [0, 2])
def test_a_run_trains_with_what_is_asked_and_is_certified_so(requested, model_dir, text, tmp_path):
    plan = make_plan(model_dir("llama"), text, attention={"sinks": requested})
    start_run(plan, tmp_path / "run")
    run_finetune(plan, tmp_path / "run")
    launch = plan_launch(str(tmp_path / "run"))
    assert launch.sink_tokens == requested and launch.pattern(0).sink_tokens == requested
    certificate = verify(launch, device="cpu")
    assert not certificate.failed
    fields = [check.detail for check in certificate.checks if check.name == "receptive field"]
    assert all(("and the first 2 tokens" in detail) == (requested == 2) for detail in fields)


def test_a_certificate_fails_where_the_sink_tokens_do_not_reach_the_attention(model_dir, text, tmp_path, monkeypatch):
    plan = make_plan(model_dir("llama"), text, attention={"sinks": 1})
    start_run(plan, tmp_path / "run")
    run_finetune(plan, tmp_path / "run")
    import ctxext.model.attention as attention

    real = attention.Pattern
    monkeypatch.setattr(attention, "Pattern", lambda *given: real(*given[:3]))
    failed = {check.name for check in verify(plan_launch(str(tmp_path / "run")), device="cpu").failed}
    assert {"receptive field", "backend"} <= failed


def test_every_backend_on_this_machine_gives_the_same_losses(model_dir, text, tmp_path):
    found = []
    for backend in ("naive", "blocked"):
        plan = make_plan(model_dir("llama"), text, attention={"sinks": 3, "backend": backend})
        start_run(plan, tmp_path / backend)
        run_finetune(plan, tmp_path / backend)
        lines = (tmp_path / backend / "metrics.jsonl").read_text().splitlines()
        found.append([json.loads(line)["loss"] for line in lines])
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_a_run_says_what_its_attention_costs_untrained_and_warns_where_that_is_much(hanging, text, tmp_path):
    path = tmp_path / "text.jsonl"
    lines = text.read_text().splitlines()
    path.write_text("".join(json.dumps({"text": f"${line}"}) + "\n" for line in lines))
    costs = {}
    for requested in (0, 1):
        lines = list[str]()
        plan = make_plan(hanging, path, attention={"sinks": requested, "group_size": 8}, data={"source": str(path)})
        start_run(plan, tmp_path / str(requested))
        run_finetune(plan, tmp_path / str(requested), events=Events(lines.append))
        (line,) = (line for line in lines if "training attention, untrained" in line)
        costs[requested] = float(line.partition("(")[2].partition(")")[0])
        assert line.startswith("warning") == (costs[requested] > sink_tokens.COST_WARNING)
    assert abs(costs[1]) < abs(costs[0])


def test_a_run_from_before_sinks_goes_on_without(model_dir, text, tmp_path):
    plan = make_plan(model_dir("llama"), text, attention={"sinks": 2})
    start_run(plan, tmp_path / "run")
    file = tmp_path / "run" / SPEC_FILE
    assert read_yaml(file)["spec"]["attention"]["sinks"] == 2
    file.write_text("".join(line for line in file.read_text().splitlines(True) if "sinks:" not in line))
    assert plan_resumed(tmp_path / "run").sink_tokens == 0


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"attention": {"train": "dense", "group_size": None, "sinks": 1}}, "attention.sinks: given"),
        ({"attention": {"sinks": 1}, "memory": {"tiles": 64}}, "a tile does not hold the first tokens"),
        ({"attention": {"sinks": -1}}, "sinks"),
        ({"attention": {"sinks": 100}}, "sinks"),
    ],
)
def test_what_cannot_be_is_refused(fields, words, model_dir, text):
    with pytest.raises(InputError, match=words):
        make_plan(model_dir("llama"), text, **fields)


def test_auto_with_tiles_is_none_and_is_said(model_dir, text):
    plan, said = make_plan(model_dir("llama"), text, memory={"tiles": 64}), list[str]()
    assert plan.sink_tokens == 0 and sink_tokens.sinks_of(plan, None, said.append) == 0
    assert said == ["attention.sinks: 0, because memory.tiles is set: tiles do not hold a document's first token"]
