"""One job of runtimes.py, in llama.cpp: convert to GGUF in fp32, read job.json, write answer.json beside it.

Needs llama-cpp-python, gguf, torch and transformers, and nothing of ctxext. The converter knows tokenizers by a hash
and stops at any other; here it is told gpt-2's, since tokens go in and come out as numbers.
"""

import json
import runpy
import sys
from pathlib import Path


def convert(converter: Path, model: str, out: Path) -> None:
    sys.path[:0] = [str(converter.parent), str(converter.parent / "gguf-py")]
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    before, sys.argv = sys.argv, [str(converter), model, "--outfile", str(out), "--outtype", "f32"]
    try:
        runpy.run_path(str(converter), run_name="__main__")
    except SystemExit as ended:
        if ended.code:
            raise
    finally:
        sys.argv = before


def main() -> None:
    path = Path(sys.argv[1])
    job = json.loads(path.read_text())
    file = path.parent / "model.gguf"
    convert(Path(job["converter"]), job["model"], file)

    import llama_cpp
    import numpy as np

    def scores(logits: np.ndarray) -> np.ndarray:
        shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))

    answer: dict = {"version": f"llama.cpp, by llama-cpp-python {llama_cpp.__version__}"}
    answer |= {"written": [], "log_probabilities": []}
    for ids in job["prompts"]:
        model = llama_cpp.Llama(
            str(file), n_ctx=job["length"], n_batch=job["length"], n_threads=1, logits_all=True, verbose=False,
            type_k=0, type_v=0,  # the cache in fp32
        )  # fmt: skip
        model.eval(ids)
        written: list[int] = []
        for _ in range(job["new"]):
            written.append(int(model.scores[model.n_tokens - 1].argmax()))
            model.eval(written[-1:])
        row = ids + written
        found = scores(model.scores[: len(row) - 1])
        answer["written"].append(written)
        answer["log_probabilities"].append([float(found[i, token]) for i, token in enumerate(row[1:])])
        del model
    (path.parent / "answer.json").write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
