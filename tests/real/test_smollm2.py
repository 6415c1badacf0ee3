"""Every command once on a real model: `make test-real`. The order of the tests is that of a user's work.

Bounds on numbers are wide: they catch a broken path, not a change of the third digit.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ctxext.config.presets import shipped
from ctxext.model.load import load_model

pytestmark = pytest.mark.slow

# Presets of windows beyond 512 keys take longer in the gate; one of them is enough.
PRESETS = ["full", "rnope-swa4096", "swa128", "swa128-nope", "swa512", "swa512-nope"]
SMALL = ["--set", "global_batch_size=1", "--set", "steps=2", "--set", "validation.every_steps=null"]
FEW = ["--set", "passkey.cases=1", "--limit", "4"]
PROBES = ["positions", "attention-distance", "receptive-field", "retrieval-heads", "layer-niah"]


@pytest.fixture(scope="session")
def made(ctxext: Any, smollm2: Path, workplace: Path) -> dict[str, Path]:
    """Conversions by preset, made on first use."""

    class Made(dict):
        def __missing__(self, preset: str) -> Path:
            out = workplace / f"converted-{preset}"
            ctxext("convert", smollm2, "--hybrid", preset, "--out", out)
            self[preset] = out
            return out

    return Made()


@pytest.fixture(scope="session")
def extended(ctxext: Any, smollm2: Path, books: dict[str, Path], workplace: Path) -> Path:
    """Two steps at 1k with S²-Attn: it proves the path, it teaches nothing."""
    out = workplace / "extended"
    said = ctxext("finetune", smollm2, "--ctx", "1k", "--data", books["train"], *SMALL, "--out", out)
    assert "attention.sinks: 1" in said
    return out


@pytest.fixture(scope="session")
def merged(ctxext: Any, extended: Path, books: dict[str, Path], workplace: Path) -> Path:
    out = workplace / "merged"
    ctxext("merge", extended, "--out", out)
    return out


def perplexity(report: Any) -> float:
    (row,) = (row for row in report["models"][0]["suites"][0]["rows"] if row["metric"] == "perplexity")
    return float(row["value"])


def test_the_gguf_file_and_the_directory_are_one_model(gguf_file: Path, smollm2: Path) -> None:
    ids = torch.randint(49152, (1, 64), generator=torch.Generator().manual_seed(0))
    found = [load_model(str(path), dtype="bfloat16", device="cpu").model(ids).logits for path in (gguf_file, smollm2)]
    assert torch.equal(*found)


def test_plan(ctxext: Any, smollm2: Path) -> None:
    assert "swa128" in ctxext("plan", smollm2, "--ctx", "16k", "--gpu", "h100", "--hybrid", "swa128-nope")
    assert "memory" in ctxext("plan", smollm2, "--ctx", "16k")  # this machine, whether it was calibrated or not


def test_doctor_finds_no_failure(ctxext: Any, smollm2: Path, gguf_file: Path) -> None:
    for model in (smollm2, gguf_file):
        said = ctxext("doctor", model)
        assert not [line for line in said.splitlines() if line.startswith("failure")], said


@pytest.mark.parametrize("preset", PRESETS)
def test_convert(preset: str, made: dict[str, Path]) -> None:
    config = json.loads((made[preset] / "config.json").read_text())
    assert config["model_type"] == "smollm3" and config["num_hidden_layers"] == 30
    gate = json.loads((made[preset] / "ctxext.json").read_text())["facts"]["gate"]
    assert gate["passed"] and gate["identity_max_diff"] == 0.0


def test_convert_with_sinks(ctxext: Any, smollm2: Path, workplace: Path) -> None:
    """It hangs on its first token: sinks take away most of what windows cost, and nothing does without the class."""
    out, arguments = workplace / "sinks", ("convert", smollm2, "--hybrid", "SSSF", "--sliding-window", "128")
    assert "--class granite_swa avoids it" in ctxext(*arguments, "--no-gate", "--out", workplace / "no-sinks")
    report = ctxext(*arguments, "--class", "granite_swa", "--out", out, "--json")
    assert report["gate"]["passed"] and report["sinks"]["first_token_share"] > 0.2
    assert report["sinks"]["loss_without"] > 0.7 and report["sinks"]["loss_with"] < 0.3
    ids = torch.arange(300)[None] * 31 % 49152
    stock = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        ours, theirs = load_model(out, device="cpu").model(ids).logits, stock(ids).logits
    assert torch.allclose(ours, theirs, atol=1e-3)


def test_convert_auto(ctxext: Any, smollm2: Path, books: dict[str, Path], workplace: Path) -> None:
    """One full layer and rows of 400 tokens. Two layers and rows of 2k take more than twelve minutes of two cores."""
    out, text = workplace / "auto", workplace / "calibration.txt"
    text.write_text(books["train"].read_text("utf-8")[5000:6800], "utf-8")
    said = ctxext(
        *("convert", smollm2, "--hybrid", "swa128", "--full-layers", "auto", "--budget", "1"),
        *("--calibration", text, "--out", out),
    )
    assert "layouts measured (all possible ones)" in said, said
    types = json.loads((out / "config.json").read_text())["layer_types"]
    assert types.count("full_attention") == 1


def test_a_conversion_reads_the_ids_of_its_source(smollm2: Path, made: dict[str, Path]) -> None:
    ours, theirs = (AutoTokenizer.from_pretrained(path) for path in (made["swa128-nope"], smollm2))
    chat = [{"role": "user", "content": "Hi <|im_end|>"}, {"role": "assistant", "content": "Hello"}]
    for text in ("def f(x):\n    return  x\n", "Größe 12,345 日本語 🙂", "  a\tb\n\n"):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert ours.apply_chat_template(chat, tokenize=False) == theirs.apply_chat_template(chat, tokenize=False)


@pytest.mark.parametrize("preset", [None, "swa128-nope"])
def test_verify(preset: str | None, ctxext: Any, smollm2: Path, made: dict[str, Path]) -> None:
    ctxext("verify", smollm2 if preset is None else made[preset], "--ctx", "512")


def test_verify_training_attention(ctxext: Any, extended: Path) -> None:
    assert "and the first token" in ctxext("verify", extended, "--ctx", "512", "--json")["checks"][1]["detail"]


def test_eval_agrees_with_stock_transformers(ctxext: Any, smollm2: Path, books: dict[str, Path]) -> None:
    from ctxext.data.documents import read_documents
    from ctxext.evals.perplexity import cut_windows, encode

    arguments = ("--suite", "perplexity", "--lengths", "512", "--limit", "4k", "--data", books["held-out"], "--json")
    found = perplexity(ctxext("eval", smollm2, *arguments))
    assert 30 < found < 60
    # The same windows through the stock class.
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    stock = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    texts = encode(read_documents(str(books["held-out"])), tokenizer, max_tokens=4096)
    cut = cut_windows(texts, 512, tokenizer.eos_token_id, "hf-stride", None, 512)
    nats = tokens = 0.0
    for window in cut.windows:
        ids = cut.segments[window.text][0][window.begin : window.end].long()
        with torch.no_grad():
            logits = stock(ids[None]).logits[0, :-1].log_softmax(-1)
        losses = -logits.gather(1, ids[1:, None])[:, 0]
        # Token i is predicted at i - 1; the window's first token is predicted by nothing.
        scored = losses[max(0, window.first - window.begin - 1) :]
        nats, tokens = nats + float(scored.sum()), tokens + len(scored)
    assert math.exp(nats / tokens) == pytest.approx(found, rel=1e-4)


def test_eval_of_generated_answers(ctxext: Any, smollm2: Path, made: dict[str, Path]) -> None:
    models = (smollm2, made["swa128"])
    report = ctxext("eval", *models, "--suite", "passkey,niah,ruler", "--lengths", "1k", *FEW, "--json")
    assert [len(model["suites"]) for model in report["models"]] == [3, 3]


def test_heal(ctxext: Any, made: dict[str, Path], books: dict[str, Path], workplace: Path) -> None:
    out = workplace / "healed"
    arguments = ("--preset", "heal", "--ctx", "512", "--data", books["train"], *SMALL, "--out", out)
    said = ctxext("finetune", made["swa128-nope"], *arguments)
    assert (out / "adapter_config.json").is_file() and "loss" in said


def test_extend_and_merge(extended: Path, merged: Path) -> None:
    facts = json.loads((extended / "ctxext.json").read_text())["facts"]
    assert facts["sink_tokens"] == 1
    stock = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    assert stock.config.model_type == "llama"


@pytest.mark.parametrize("target", ["hf", "vllm", "gguf", "ollama"])
def test_export(target: str, ctxext: Any, merged: Path, workplace: Path) -> None:
    ctxext("export", merged, "--target", target, "--out", workplace / f"export-{target}")


def test_generate(ctxext: Any, smollm2: Path) -> None:
    question = ("--prompt", "What is the capital of France?", "--max-new-tokens", "32", "--json")
    assert "Paris" in ctxext("generate", smollm2, *question)["text"]
    plain = ctxext("generate", smollm2, "--no-chat", "--prompt", "The capital of France is", *question[2:])
    assert plain["read"] == 5 and plain["text"].startswith(" Paris")  # no BOS: the tokenizer adds none


def test_chat(ctxext: Any, smollm2: Path) -> None:
    said = ctxext("chat", smollm2, "--max-new-tokens", "24", text="My name is Ada.\nWhat is my name?\n")
    assert "Ada" in said


def test_probe(ctxext: Any, smollm2: Path, workplace: Path) -> None:
    out = workplace / "probed"
    few = ["layer-niah.samples=60", "layer-niah.classes=4", "receptive-field.samples=4", "receptive-field.tokens=1k"]
    few += ["retrieval-heads.samples=4", "attention-distance.samples=2"]
    options = [part for setting in few for part in ("--set", setting)]
    ctxext("probe", smollm2, *PROBES, "--preset", "smoke", "--length", "512", *options, "--out", out)
    assert (out / "ctxext.json").is_file()


def test_report(ctxext: Any, extended: Path, workplace: Path) -> None:
    out = workplace / "page"
    ctxext("report", extended, "--out", out)
    assert list(out.glob("*.html"))


def test_run(ctxext: Any, smollm2: Path, books: dict[str, Path], workplace: Path) -> None:
    settings = [f"model={smollm2}", f"data={books['train']}", f"held_out={books['held-out']}", "ctx=1k", "limit=4k"]
    settings += ["lengths=[1k]", "suite=perplexity", "gpu=h100"]
    settings += ["training={global_batch_size: 1, steps: 2, validation: {every_steps: null}}"]
    arguments = [part for setting in settings for part in ("--set", setting)]
    ctxext("run", "extend-32k", *arguments, "--out", workplace / "pipeline")
    results = json.loads((workplace / "pipeline" / "results.json").read_text())
    assert [job["command"] for job in results["jobs"]] == ["plan", "finetune", "eval", "merge", "report"]


def test_shipped_presets_are_all_named_here() -> None:
    """The presets that PRESETS leaves out are those with one large window."""
    every = {path.stem for path in (shipped("presets") / "hybrid").glob("*.yaml")}
    assert every - set(PRESETS) == {"swa2048", "swa2048-nope"}
