"""Cases a second: `ctxext eval` against lm-eval, the same cases on the same model.

    python benchmarks/eval.py                      # 8k; needs the `eval` extra; writes benchmarks/results/eval-*
    python benchmarks/eval.py --lengths 2k --cases 2 --out elsewhere

One process, one random model (8 layers x 384, 6 heads of 64; `tiny`'s tokenizer) and its swa128-nope conversion;
needles in held-out text, 24 tokens generated greedily. lm-eval runs stock transformers (SDPA) through its
`HFLM.generate_until`, one case at a time, as is its default; ctxext one case at a time as well. The two are timed in
turns, case by case, after one case each that is not counted, and their answers are compared. What differs is then the
attention alone: transformers' sliding layers cost as much as full ones under their T x T masks.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from ctxext.cli import console
from ctxext.data.haystack import haystack_text
from ctxext.data.niah import NEW_TOKENS, NiahQuestion, niah_questions
from ctxext.model.companions import copy_companions
from ctxext.model.convert import plan_conversion, run_conversion
from ctxext.model.decode import generate, stop_ids
from ctxext.model.load import load_model
from ctxext.model.source import resolve
from ctxext.units import parse_tokens

SHAPE = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 6,
         "num_key_value_heads": 6}  # fmt: skip


def theirs(directory: Path, longest: int) -> Any:
    """A function of a question: lm-eval's answer, as text."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    loaded = load_model(directory, device=DEVICE)
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="sdpa", dtype=loaded.model.dtype)
    lm = HFLM(pretrained=model.to(DEVICE).eval(), tokenizer=loaded.tokenizer, batch_size=1, max_length=longest + 64)
    wanted = {"until": [], "max_gen_toks": NEW_TOKENS, "do_sample": False}

    def answer(question: NiahQuestion) -> str:
        request = Instance(request_type="generate_until", doc={}, arguments=(question.case.prompt, wanted), idx=0)
        return str(lm.generate_until([request], disable_tqdm=True)[0])

    return answer


def ours(directory: Path) -> Any:
    """A function of a question: ctxext's answer, as text."""
    loaded = load_model(directory, device=DEVICE)
    stop = stop_ids(loaded.model, loaded.tokenizer)

    def answer(question: NiahQuestion) -> str:
        (ids,) = generate(loaded.model, [question.ids], NEW_TOKENS, stop=stop)
        return str(loaded.tokenizer.decode(ids, skip_special_tokens=True))

    return answer


def timed(answer: Any, question: NiahQuestion) -> tuple[float, str]:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    text = answer(question)
    return time.perf_counter() - began, text


def compare(directory: Path, questions: list[NiahQuestion], longest: int) -> dict[str, Any]:
    """Median seconds of a case on either side, and how many answers were the same."""
    sides = {"lm-eval": theirs(directory, longest), "ctxext": ours(directory)}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    same = 0
    for number, question in enumerate(questions):
        texts = set()
        for side, answer in sides.items():
            took, text = timed(answer, question)
            texts.add(text.strip())
            if number:
                seconds[side].append(took)
        same += len(texts) == 1
    return {side: statistics.median(took) for side, took in seconds.items()} | {"same": same}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="8k")
    parser.add_argument("--cases", type=int, default=8, help="the first is not counted")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    console.quiet_libraries()
    machine = torch.cuda.get_device_name() if DEVICE == "cuda" else f"{torch.get_num_threads()} CPU threads"
    lines = [f"Seconds of a case, medians of {options.cases - 1}, fp32, {machine} ({platform.machine()}), torch "
             f"{torch.__version__}, transformers {transformers.__version__}, lm-eval {version('lm_eval')}.", "",
             "| | length | lm-eval | ctxext | times as fast | same answers |", "|---|---|---|---|---|---|"]  # fmt: skip
    lengths = [parse_tokens(part) for part in options.lengths.split(",")]
    with tempfile.TemporaryDirectory() as scratch:
        source, hybrid = Path(scratch) / "source", Path(scratch) / "swa128-nope"
        torch.manual_seed(0)
        vocabulary = resolve("tiny").config.shape.vocab_size
        config = LlamaConfig(**SHAPE, vocab_size=vocabulary, max_position_embeddings=max(lengths) + 64)
        LlamaForCausalLM(config).save_pretrained(source)
        copy_companions(resolve("tiny").directory, source)
        run_conversion(plan_conversion(str(source), "swa128-nope", out=hybrid), gate=False)
        tokenizer = load_model(source).tokenizer
        made = partial(niah_questions, tokenizer, haystack_text("held-out"))
        for length in lengths:
            questions = made([length], [0.0, 0.5, 1.0], options.cases, options.cases, 0)
            for directory in (source, hybrid):
                row = compare(directory, questions, max(lengths))
                lines.append(f"| {directory.name} | {length:,} | {row['lm-eval']:.2f} s | {row['ctxext']:.2f} s | "
                             f"{row['lm-eval'] / row['ctxext']:.2f} | {row['same']} of {len(questions)} |")  # fmt: skip
                console.say(lines[-1])
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"eval-{DEVICE}.md").write_text("\n".join(lines) + "\n", "utf-8")
    print("\n".join(lines))


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

if __name__ == "__main__":
    main()
