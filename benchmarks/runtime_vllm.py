"""One job of runtimes.py, in vLLM: read job.json, write answer.json beside it. Needs vLLM and nothing of ctxext."""

import json
import os
import sys
from pathlib import Path

ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}


def main() -> None:
    os.environ.update(ONE_PROCESS, HF_HUB_OFFLINE="1")
    import vllm

    path = Path(sys.argv[1])
    job = json.loads(path.read_text())
    model = vllm.LLM(
        model=job["model"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=job["length"],
        model_impl=job.get("impl", "auto"),
        enable_prefix_caching=False,
        hf_overrides={"max_position_embeddings": job["length"]} if job.get("longer") else {},
    )
    options = vllm.SamplingParams(temperature=0, max_tokens=job["new"], logprobs=0, prompt_logprobs=0, ignore_eos=True)
    found = model.generate([{"prompt_token_ids": ids} for ids in job["prompts"]], options)
    answer: dict = {"version": f"vLLM {vllm.__version__}", "written": [], "log_probabilities": []}
    for ids, result in zip(job["prompts"], found, strict=True):
        written = list(result.outputs[0].token_ids)
        read = [step[token].logprob for token, step in zip(ids[1:], result.prompt_logprobs[1:], strict=True)]
        wrote = [step[token].logprob for token, step in zip(written, result.outputs[0].logprobs, strict=True)]
        answer["written"].append(written)
        answer["log_probabilities"].append(read + wrote)
    (path.parent / "answer.json").write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
