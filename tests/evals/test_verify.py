"""The certificate passes on what is right, and names what is wrong: each fault is planted and must be found."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from ctxext.cli import verify as command
from ctxext.config import manifest as manifests
from ctxext.config.loader import build
from ctxext.errors import CheckFailed, InputError
from ctxext.evals.verify import plan_launch, verify, write_certificate
from ctxext.model import attention as seam
from ctxext.model import decode
from ctxext.model.convert import plan_conversion, run_conversion
from ctxext.model.source import resolve
from ctxext.ops.backends import blocked
from ctxext.ops.masks import Pattern, first_shifted_head, lower_bounds
from ctxext.ops.naive_attention import naive_attention
from ctxext.train.finetune import run_finetune
from ctxext.train.finetune_spec import FinetuneSpec
from ctxext.train.run_directory import start_run
from ctxext.train.run_plan import plan_run

W, G = 16, 24
RIGHT = blocked.attention


@pytest.fixture(scope="module")
def hybrids(model_dir, tmp_path_factory) -> dict[str, Path]:
    """llama and qwen3 as SNSN with a window of W."""
    made = {}
    for family in ("llama", "qwen3"):
        made[family] = tmp_path_factory.mktemp("hybrid") / family
        run_conversion(plan_conversion(str(model_dir(family)), "SN", out=made[family], sliding_window=W), gate=False)
    return made


@pytest.fixture(scope="module")
def run(model_dir, tmp_path_factory) -> Path:
    """A finetune run of a llama: full layers trained with S² in groups of G, documents masked."""
    root = tmp_path_factory.mktemp("run")
    (root / "text.txt").write_text("".join(f"Line {i} of a text that is long enough. {i * i}\n" for i in range(100)))
    fields = {"ctx": 96, "steps": 1, "global_batch_size": 1, "data": {"source": str(root / "text.txt")}}
    fields["attention"] = {"train": "s2", "group_size": G}
    plan = plan_run(resolve(str(model_dir("llama"))), build(FinetuneSpec, fields, source="test"))
    start_run(plan, root / "run")
    run_finetune(plan, root / "run")
    return root / "run"


def failed(certificate) -> dict[str, set[int | None]]:
    """Names of what failed, with the layers."""
    found: dict[str, set[int | None]] = {}
    for check in certificate.failed:
        found.setdefault(check.name, set()).add(check.layer)
    return found


def names(certificate) -> set[str]:
    return {check.name for check in certificate.checks}


INFERENCE = {"causality", "receptive field", "backend", "cached decoding"}
TRAINING = {"causality", "receptive field", "backend", "documents"}


@pytest.mark.parametrize("attention", ["inference", "training"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_conversions_pass(hybrids, family, attention):
    launch = plan_launch(str(hybrids[family]), attention=attention, ctx=128)
    certificate = verify(launch, device="cpu")
    assert certificate.failed == ()
    assert certificate.T == 96 and launch.group_size is None
    assert names(certificate) == (INFERENCE if attention == "inference" else TRAINING)
    by_layer = [check for check in certificate.checks if check.name == "receptive field"]
    assert [check.layer for check in by_layer] == [0, 1, 2, 3]
    assert f"window of {W}" in by_layer[0].detail and "all earlier tokens" in by_layer[1].detail


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_sources_pass_with_s2_in_bfloat16(model_dir, family):
    """qwen2 has biases, mistral here a single key/value head; the group is odd."""
    changes = {"mistral": {"num_key_value_heads": 1, "sliding_window": None}}.get(family, {})
    launch = plan_launch(str(model_dir(family, **changes)), attention="training", ctx=100)
    launch = replace(launch, dtype="bfloat16")
    assert launch.group_size == 25
    certificate = verify(launch, device="cpu")
    assert certificate.failed == () and names(certificate) == TRAINING


def test_a_run_is_launched_as_its_spec_says(run):
    launch = plan_launch(str(run))
    assert (launch.attention, launch.ctx, launch.T) == ("training", 96, 96)
    assert (launch.group_size, launch.document_mask, launch.memory.checkpoint) == (G, True, True)
    certificate = verify(launch, device="cpu")
    assert certificate.failed == () and names(certificate) == TRAINING
    assert plan_launch(str(run), attention="inference").group_size is None


def test_an_unfinished_run_is_the_model_it_starts_from(model_dir, tmp_path):
    spec = build(FinetuneSpec, {"ctx": 256, "data": {"document_mask": False}}, source="test")
    plan = plan_run(resolve(str(model_dir("llama"))), spec)
    start_run(plan, tmp_path / "run")
    launch = plan_launch(str(tmp_path / "run"))
    assert (launch.attention, launch.ctx, launch.group_size) == ("training", 256, 64)
    assert launch.source.config.rope["factor"] == 4.0  # the run's positions, not the model's
    certificate = verify(launch, device="cpu")
    assert certificate.failed == () and names(certificate) == TRAINING - {"documents"}
    assert "no document mask" in certificate.notes[0]


def test_a_run_of_several_contexts_is_measured_at_any(model_dir, tmp_path):
    spec = build(FinetuneSpec, {"ctx": 256, "stages": [128], "steps": 2}, source="test")
    start_run(plan_run(resolve(str(model_dir())), spec), tmp_path / "run")
    found = plan_launch(str(tmp_path / "run"), ctx=128)
    assert found.ctx == 128 and verify(found, device="cpu").failed == ()


def test_a_long_ctx_is_measured_in_proportion(model_dir):
    launch = plan_launch(str(model_dir("llama")), attention="training", ctx=100 * 1024)
    assert (launch.planned_group, launch.group_size, launch.T) == (25_600, 511, 2047)
    assert "25,600 tokens are measured as groups of 511" in launch.notes[1]


def test_a_ctx_beyond_what_the_model_supports_is_reported(model_dir):
    launch = plan_launch(str(model_dir("llama")), ctx=4096)
    assert (
        "ctx 4,096 is beyond the usable length of model, 64" in launch.notes[-1] and "not trained" in launch.notes[-1]
    )
    assert "beyond the usable length" not in " ".join(plan_launch(str(model_dir("llama")), ctx=64).notes)
    assert "beyond the usable length" not in " ".join(
        plan_launch(str(model_dir("llama")), ctx=256, attention="training").notes
    )


def test_stories_passes(stories):
    for attention in ("training", "inference"):
        certificate = verify(plan_launch(str(stories), attention=attention), device="cpu")
        assert certificate.failed == ()


def rolled(q, k, v, pattern, *, document_starts=None, scale=None, **_):
    """S² as a roll of half of the heads under a causal mask: the last tokens come before the first."""
    if pattern.group_size is None:
        return RIGHT(q, k, v, pattern, document_starts=document_starts, scale=scale)
    f, s = first_shifted_head(q.shape[1], k.shape[1]), pattern.group_size // 2
    lo = lower_bounds(pattern, q.shape[2], document_starts=document_starts)[:, :1]
    plain = naive_attention(q, k, v, lo, scale=scale)
    q, k, v = (x.roll(-s, dims=2) for x in (q, k, v))
    back = naive_attention(q, k, v, lo, scale=scale).roll(s, dims=2)
    return torch.cat([plain[:, :f], back[:, f:]], dim=1)


def window(change: int | None):
    """Windows longer by `change`, or none at all."""

    def attend(q, k, v, pattern, **named):
        if pattern.sliding_window is not None:
            pattern = Pattern(None if change is None else pattern.sliding_window + change, pattern.group_size)
        return RIGHT(q, k, v, pattern, **named)

    return attend


def shifted_back_wrongly(q, k, v, pattern, **named):
    out = RIGHT(q, k, v, pattern, **named)
    if pattern.group_size is None:
        return out
    f = first_shifted_head(q.shape[1], k.shape[1])
    return torch.cat([out[:, :f], out[:, f:].roll(pattern.group_size // 2, dims=2)], dim=1)


def group(change: int):
    def attend(q, k, v, pattern, **named):
        if pattern.group_size is not None:
            pattern = Pattern(pattern.sliding_window, pattern.group_size + change)
        return RIGHT(q, k, v, pattern, **named)

    return attend


def unshifted(q, k, v, pattern, *, document_starts=None, scale=None, **_):
    lo = lower_bounds(pattern, q.shape[2], document_starts=document_starts)[:, :1]
    return naive_attention(q, k, v, lo, scale=scale)


def documents_ignored(q, k, v, pattern, *, document_starts=None, scale=None, **_):
    return RIGHT(q, k, v, pattern, scale=scale)


def leaking(q, k, v, pattern, *, document_starts=None, scale=None, **_):
    """Every query also sees the next token."""
    out = RIGHT(q, k, v, pattern, document_starts=document_starts, scale=scale)
    return out + 1e-3 * out.roll(-1, dims=2)


@pytest.mark.parametrize("attention", ["training", "inference"])
@pytest.mark.parametrize("change", [1, -1, None], ids=["W+1", "W-1", "dropped mask"])
def test_a_wrong_window_is_found_on_the_sliding_layers_and_no_other(hybrids, monkeypatch, change, attention):
    monkeypatch.setattr(blocked, "attention", window(change))
    certificate = verify(plan_launch(str(hybrids["llama"]), attention=attention, ctx=96), device="cpu")
    found = failed(certificate)
    assert found["receptive field"] == {0, 2} and found["backend"] == {0, 2}


@pytest.mark.parametrize(
    ("fault", "found_by"),
    [
        (rolled, {"causality", "receptive field", "documents", "backend"}),
        (shifted_back_wrongly, {"causality", "receptive field", "documents", "backend"}),
        (unshifted, {"receptive field", "documents", "backend"}),
        (group(1), {"receptive field", "documents", "backend"}),
        (group(-1), {"receptive field", "documents", "backend"}),
        (documents_ignored, {"documents", "backend"}),
        (leaking, {"causality", "receptive field", "documents", "backend"}),
    ],
    ids=["roll", "un-shift", "no shift", "G+1", "G-1", "documents ignored", "next token"],
)
def test_a_wrong_s2_is_found_on_every_layer(run, monkeypatch, fault, found_by):
    monkeypatch.setattr(blocked, "attention", fault)
    found = failed(verify(plan_launch(str(run)), device="cpu"))
    assert set(found) == found_by
    for name in found_by - {"causality"}:
        assert {0, 1, 2, 3} <= found[name], (name, found)


def test_documents_ignored_are_found_on_sliding_layers_too(hybrids, monkeypatch):
    monkeypatch.setattr(blocked, "attention", documents_ignored)
    found = failed(verify(plan_launch(str(hybrids["qwen3"]), attention="training", ctx=96), device="cpu"))
    assert found == {"documents": {None, 0, 1, 2, 3}, "backend": {0, 1, 2, 3}}


def test_arguments_that_do_not_reach_the_attention_are_found(run, monkeypatch):
    """What a mask cannot tell: the attention is right, and is never told of groups and documents."""
    right = seam.attend

    def deaf(*given, group_size=None, document_starts=None, **named):
        return right(*given, **named)

    monkeypatch.setattr(seam, "attend", deaf)
    found = failed(verify(plan_launch(str(run)), device="cpu"))
    monkeypatch.undo()
    seam.register()
    assert found["receptive field"] == {0, 1, 2, 3} and found["documents"] == {None, 0, 1, 2, 3}


def test_a_cache_that_forgets_is_found(hybrids, monkeypatch):
    def forgetful(q, k, v, pattern, **named):
        if q.shape[2] < k.shape[2] and pattern.sliding_window is not None:
            pattern = Pattern(pattern.sliding_window - 1)
        return RIGHT(q, k, v, pattern, **named)

    monkeypatch.setattr(blocked, "attention", forgetful)
    found = failed(verify(plan_launch(str(hybrids["llama"]), ctx=96), device="cpu"))
    assert found == {"cached decoding": {None}}


ROPES = {
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 8.0},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "factor": 8.0,
        "short_factor": [1.0] * 4,
        "long_factor": [1.5, 2.0, 3.0, 4.0],
        "original_max_position_embeddings": 64,
    },
}


@pytest.mark.parametrize("kind", ROPES)
def test_decoding_passes_where_rope_follows_the_length_and_stock_generate_is_named(model_dir, kind, monkeypatch):
    model = model_dir(rope_parameters=ROPES[kind], max_position_embeddings=64 if kind == "dynamic" else 256)
    certificate = verify(plan_launch(str(model), ctx=96), device="cpu")
    assert not certificate.failed
    assert any("`generate` of transformers with a cache does not" in note for note in certificate.notes)
    short = verify(plan_launch(str(model), ctx=48), device="cpu")
    assert not short.failed and any("were measured, so decoding beyond is not checked" in note for note in short.notes)
    # A reader that keeps the old keys, as stock generate does, is found.
    monkeypatch.setattr(decode, "same_frequencies_from", lambda config, length: 1)
    assert failed(verify(plan_launch(str(model), ctx=96), device="cpu")) == {"cached decoding": {None}}


def test_nan_fails_and_the_certificate_stays_json(hybrids, monkeypatch, tmp_path):
    def broken(q, k, v, pattern, **named):
        return RIGHT(q, k, v, pattern, **named) * float("nan")

    monkeypatch.setattr(blocked, "attention", broken)
    launch = plan_launch(str(hybrids["llama"]), ctx=96)
    certificate = verify(launch, device="cpu")
    assert set(failed(certificate)) == INFERENCE
    write_certificate(certificate, launch, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "certificate.json").read_text(), parse_constant=pytest.fail)
    assert not written["passed"]


def test_the_model_runs_on_as_before(hybrids, monkeypatch):
    """The comparison's own attention is taken off again, and no hook stays but those that loading set."""
    from ctxext.model import load

    def hooks(model):
        return {name: [*x._forward_hooks, *x._forward_pre_hooks] for name, x in model.named_modules()}

    kept = {}
    right = load.load_model

    def keep(*given, **named):
        kept["model"] = loaded = right(*given, **named)
        kept["before"] = load.hidden_states(loaded.model, torch.arange(40)[None])
        kept["hooks"] = hooks(loaded.model)
        return loaded

    monkeypatch.setattr(load, "load_model", keep)
    verify(plan_launch(str(hybrids["llama"]), ctx=96), device="cpu")
    model = kept["model"].model
    assert model.config._attn_implementation == seam.NAME
    assert hooks(model) == kept["hooks"] and sum(map(len, kept["hooks"].values())) == 1  # the check of token ids
    assert torch.equal(load.hidden_states(model, torch.arange(40)[None]), kept["before"])


@pytest.mark.parametrize(
    ("options", "words"), [({"attention": "sdpa"}, "training, inference"), ({"ctx": 15}, "at least 16")], ids=str
)
def test_senseless_arguments_are_refused(hybrids, options, words):
    with pytest.raises(InputError, match=words):
        plan_launch(str(hybrids["llama"]), **options)


def skin() -> typer.Typer:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(command.verify)
    return app


def test_the_command_prints_a_table_writes_a_manifest_and_fails_when_a_check_does(hybrids, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    arguments = [str(hybrids["llama"]), "--ctx", "96", "--attention", "training"]
    done = CliRunner().invoke(skin(), arguments)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("check") and "FAIL" not in done.stdout and "receptive field" in done.stdout
    (out,) = (tmp_path / "runs").iterdir()
    manifest = manifests.read(out)
    assert "-verify-" in out.name and manifest.kind == "verify" and manifest.facts["passed"]
    assert json.loads((out / "certificate.json").read_text())["passed"]

    monkeypatch.setattr(blocked, "attention", window(1))
    done = CliRunner().invoke(skin(), [*arguments, "--json", "--out", "wrong"])
    assert isinstance(done.exception, CheckFailed) and done.exception.exit_code == 1
    assert not json.loads(done.stdout)["passed"]
    assert not manifests.read(Path("wrong")).facts["passed"]
