"""Functions that join floors: an evaluation put on disk, a merge measured on the way."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctxext.config import manifest as manifests
from ctxext.config.output import check_free, staged_output
from ctxext.errors import InputError
from ctxext.model.convert import DTYPES
from ctxext.model.source import ModelSource, require_tokenizer, resolve
from ctxext.units import format_tokens, parse_tokens

if TYPE_CHECKING:
    from ctxext.evals.suite import EvalReport
    from ctxext.model.merge import MergeReport

MERGE_LENGTH = 512  # tokens of a window; and at most so many windows of text
MERGE_TOKENS = 8192


@dataclass(frozen=True)
class EvalPlan:
    """An evaluation whose models were found and whose arguments make sense. Lengths in tokens."""

    sources: list[ModelSource]
    suite: str
    lengths: list[int]
    data: str
    text_field: str
    protocol: str
    limit: int | None
    seed: int
    dtype: str
    out: Path

    @property
    def caption(self) -> str:
        """What the numbers of `table` are."""
        text = "this Python's standard library, files held out from training" if self.data == "embedded" else self.data
        if self.suite == "perplexity":
            return f"perplexity, protocol {self.protocol}, {self.dtype}, on {text}; * beyond the usable length"
        return (
            f"passkey: share of keys found (teacher-forced exact match), seed {self.seed}, {self.dtype}, "
            f"hidden in {text}; * beyond the usable length"
        )

    def table(self, report: EvalReport) -> tuple[list[str], list[list[str]]]:
        """Header and rows: a model a row, a length a column."""
        value = "perplexity" if self.suite == "perplexity" else "accuracy"
        rows = []
        for entry in report.models:
            cells = {row["length"]: row[value] for result in entry.results for row in result.rows()}
            marked = [f"{cells[n]:.3f}{'*' if n > entry.usable_length else ''}" for n in self.lengths]
            rows.append([entry.model, *marked])
        return ["model", *[format_tokens(n) for n in self.lengths]], rows


def plan_eval(
    models: list[str],
    suite: str,
    lengths: str | None,
    *,
    data: str,
    protocol: str,
    limit: int | None,
    seed: int,
    dtype: str,
    out: Path | None,
    force: bool,
    text_field: str = "text",
) -> EvalPlan:
    """Find the models and read the lengths, before torch is imported."""
    if suite not in ("perplexity", "passkey"):
        raise InputError(f"--suite {suite!r}: allowed are perplexity, passkey")
    if dtype not in ("float32", "bfloat16"):
        raise InputError(f"--dtype {dtype!r}: allowed are float32, bfloat16")
    sources = [resolve(model) for model in models]
    if out is not None:
        check_free(out, force, keep=[source.path for source in sources])
    for source in sources:
        require_tokenizer(source.directory)
    tokens = (
        sorted({parse_tokens(part) for part in lengths.split(",")})
        if lengths is not None
        else [min(s.usable_length for s in sources)]
    )
    if tokens[0] < 2:
        raise InputError(f"--lengths {lengths}: a length is at least 2 tokens")
    return EvalPlan(
        sources=sources,
        suite=suite,
        lengths=tokens,
        data=data,
        text_field=text_field,
        protocol=protocol,
        limit=limit,
        seed=seed,
        dtype=dtype,
        out=out or manifests.default_out("eval", suite),
    )


def eval_models(
    plan: EvalPlan, *, force: bool = False, progress: Callable[[str, int, int], None] | None = None
) -> EvalReport:
    """Run the suite and write results.json and ctxext.json."""
    from ctxext.evals.suite import evaluate

    report = evaluate(
        plan.sources,
        plan.suite,
        lengths=plan.lengths,
        data=plan.data,
        text_field=plan.text_field,
        limit=plan.limit,
        seed=plan.seed,
        protocol=plan.protocol,
        dtype=plan.dtype,
        progress=progress,
    )
    with staged_output(plan.out, force) as staging:
        (staging / "results.json").write_text(json.dumps(report.to_dict(), indent=2) + "\n", "utf-8")
        parents = {f"model {i}": manifests.parent(source.directory) for i, source in enumerate(plan.sources)}
        spec: dict[str, Any] = json.loads(json.dumps(asdict(report.request)))
        manifests.write(
            staging,
            manifests.new(
                "eval", spec=spec, parents=parents, facts={"longest": plan.lengths[-1], "rows": report.rows()}
            ),
        )
    return report


@dataclass(frozen=True)
class MergePlan:
    """A merge that was found possible."""

    source: ModelSource
    out: Path
    dtype: str | None
    force: bool


def plan_merge(run: str, out: Path | None, dtype: str | None, force: bool) -> MergePlan:
    """Find the bundle and its base, and refuse what cannot be merged, before torch is imported."""
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"--dtype {dtype!r}: allowed are {', '.join(DTYPES)}")
    source = resolve(run)
    if source.base is None:
        raise InputError(f"{run} holds no adapter: it is an ordinary model already, nothing to merge")
    out = out or manifests.default_out("merge", source.name)
    check_free(out, force, keep=[source.path, source.base.path])
    return MergePlan(source, out, dtype, force)


def merge_run(plan: MergePlan) -> MergeReport:
    """Merge, with the perplexity on held-out embedded text before and after the cast."""
    from ctxext.evals.suite import evaluate
    from ctxext.model.merge import merge

    length = min(MERGE_LENGTH, plan.source.usable_length)

    def measure(loaded: Any) -> float:
        report = evaluate([loaded], "perplexity", lengths=[length], limit=MERGE_TOKENS)
        return float(report.rows()[0]["perplexity"])

    return merge(plan.source, plan.out, dtype=plan.dtype, force=plan.force, measure=measure)
