"""Faults of the package that the zoo has found and that are not mended yet: (checkpoint, station) -> reason.

A test of one of these is expected to fail, and fails when it passes: then its line goes.
"""

from __future__ import annotations

CLASS = "the class that transformers 5 picks makes its own Metaspace, and not the normaliser of tokenizer.json"
QWEN_CLASS = "transformers 5 takes Qwen2Tokenizer for every qwen2, and drops what tokenizer.json says"
CONVERTED = "the conversion is a smollm3, for which transformers 5 picks another tokenizer class than for its source"
WITH_TOKENIZER = ("ids", "finetune", "merge", "export")

KNOWN: dict[tuple[str, str], str] = {
    **{(slug, station): CLASS
       for slug in ("Llama-2-7b-hf", "TinyLlama-1.1B-Chat-v1.0", "Yi-6B")
       for station in (*WITH_TOKENIZER, "ids after convert")},
    **{("CodeQwen1.5-7B-Chat", station): QWEN_CLASS for station in (*WITH_TOKENIZER, "eval")},
    **{(slug, "ids after convert"): CONVERTED for slug in ("Mistral-7B-v0.1", "Mistral-Nemo-Base-2407")},
}  # fmt: skip
