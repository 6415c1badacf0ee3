"""Functions that join floors: an evaluation put on disk, a merge measured on the way."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ctxext import __version__
from ctxext.config import manifest as manifests
from ctxext.config.output import check_free, replacing
from ctxext.data.documents import EMBEDDED, read_documents
from ctxext.errors import InputError
from ctxext.evals.spec import EvalSpec, asked
from ctxext.evals.suite import with_lengths
from ctxext.evals.suites import check_suites, inputs, model_stamp
from ctxext.model.convert import DTYPES
from ctxext.model.source import ModelSource, require_tokenizer, resolve
from ctxext.units import format_tokens

if TYPE_CHECKING:
    from ctxext.evals.suite import EvalReport
    from ctxext.model.merge import MergeReport

REQUEST = "request.json"  # of an evaluation: what was asked of which weights
MERGE_LENGTH = 512  # tokens of a window; and at most so many windows of text
MERGE_TOKENS = 8192


@dataclass(frozen=True)
class EvalPlan:
    """An evaluation whose models were found and whose spec makes sense.

    against   the index in `sources` of the model that the others are compared with
    resumes   `out` holds an unfinished evaluation of the same request: what it has is not run again
    """

    sources: list[ModelSource]
    spec: EvalSpec
    against: int | None
    out: Path
    resumes: bool

    @cached_property
    def request(self) -> dict[str, Any]:
        """What makes two evaluations the same: the spec and all that it reads, the models, the version."""
        request = {
            "spec": asdict(self.spec),
            "reads": [inputs(suite) for suite in self.spec.suites],
            "against": self.against,
            "models": [model_stamp(source) for source in self.sources],
            "ctxext": __version__,
        }
        return json.loads(json.dumps(request))


def plan_eval(
    models: list[str],
    suite: str,
    given: dict[str, Any] | None = None,
    *,
    against: str | None = None,
    out: Path | None = None,
    force: bool = False,
) -> EvalPlan:
    """Find the models and read the spec (evals/spec.py, `asked`), before torch is imported.

    Without `out`, an unfinished evaluation of the same request under ./runs is gone on with. `against` is one of the
    models, or one more.
    """
    spec = asked(suite, given or {})
    sources = [resolve(model) for model in models]
    number = None
    if against is not None:
        other = resolve(against)
        paths = [source.directory.resolve() for source in sources]
        sources += [other] if other.directory.resolve() not in paths else []
        number = [source.directory.resolve() for source in sources].index(other.directory.resolve())
        if len(sources) < 2:
            raise InputError(f"--against {against} is the only model", hint="name the model to compare with it as well")
    for source in sources:
        require_tokenizer(source.directory)
    spec = with_lengths(spec, sources)
    check_suites(spec)
    plan = EvalPlan(sources, spec, number, out or manifests.default_out("eval", suite), False)
    if out is None:
        found = [path.parent for path in sorted(manifests.RUNS.glob(f"*/{REQUEST}")) if _unfinished(path.parent, plan)]
        return replace(plan, out=found[-1], resumes=True) if found else plan
    if _unfinished(out, plan) and not force:
        return replace(plan, resumes=True)
    check_free(out, force, keep=[source.path for source in sources])
    if (out / REQUEST).is_file():
        with (out / REQUEST).open() as file:
            _hold(file, out)
    return plan


def _unfinished(place: Path, plan: EvalPlan) -> bool:
    """Whether an evaluation of the plan's request began at `place`, has not ended, and is nobody's now."""
    if not (place / REQUEST).is_file() or (place / manifests.FILE_NAME).exists():
        return False
    with (place / REQUEST).open() as file:
        try:
            _hold(file, place)
            return bool(json.load(file) == plan.request)
        except (InputError, ValueError):
            return False


def _hold(file: IO[str], out: Path) -> None:
    """Keep others from going on with `out` meanwhile; a file system without locks is taken as it is."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{out} is being written by another evaluation", hint="give another --out") from None
    except OSError:
        return


def eval_models(
    plan: EvalPlan,
    *,
    force: bool = False,
    progress: Callable[[str, int, int], None] = lambda *_: None,
    notice: Callable[[str], None] = lambda _: None,
) -> EvalReport:
    """Run the suites. `out` grows as items are done (request.json first); results.json and ctxext.json come last."""
    from ctxext.evals.suite import evaluate

    keep = [source.path for source in plan.sources]
    with nullcontext() if plan.resumes else replacing(plan.out, force, keep):
        plan.out.mkdir(parents=True, exist_ok=True)
        if not plan.resumes:
            (plan.out / REQUEST).write_text(json.dumps(plan.request, indent=2) + "\n", "utf-8")
        with (plan.out / REQUEST).open() as held:
            _hold(held, plan.out)
            try:
                report = evaluate(
                    plan.sources, plan.spec, against=plan.against, place=plan.out, progress=progress, notice=notice
                )
            except BaseException:
                if not any(any((plan.out / name).glob("*")) for name in ("outcomes", "keys")):
                    # Nothing that took long to make: what was here before comes back.
                    shutil.rmtree(plan.out, ignore_errors=True)
                raise
            results = json.dumps(report.to_dict(), indent=2, allow_nan=False) + "\n"
            (plan.out / "results.json").write_text(results, "utf-8")
            draw_depths(report, plan.out)
            parents = {f"model {i}": manifests.parent(source.directory) for i, source in enumerate(plan.sources)}
            facts = {"seconds": report.seconds, "numbers": len(report.rows())}
            manifests.write(plan.out, manifests.new("eval", spec=plan.request["spec"], parents=parents, facts=facts))
    return report


def draw_depths(report: EvalReport, place: Path) -> None:
    """A heatmap a model of length x depth, as `<number>-<suite>-<model's number>.png`, of the suites with depths."""
    from ctxext.report.figures import heatmap

    for number, model in enumerate(report.models):
        for index, suite in enumerate(model.suites):
            rows = [row for row in suite.rows if "by_depth" in row.details]
            depths = sorted({depth for row in rows for depth in row.details["by_depth"]}, key=float)
            if not depths:
                continue
            heatmap(
                place / f"{index}-{suite.suite}-{number}.png",
                f"{model.model}: {suite.suite}, n = {', '.join(str(row.n) for row in rows)} by length",
                [format_tokens(row.length) for row in rows],
                depths,
                [[row.details["by_depth"].get(depth) for row in rows] for depth in depths],
                "length, tokens",
                "depth",
                highest=1.0,
                digits=2,
            )


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
    from ctxext.evals.perplexity import encode, perplexity
    from ctxext.model.merge import merge

    length = min(MERGE_LENGTH, plan.source.usable_length)

    def measure(loaded: Any) -> float:
        documents = read_documents(EMBEDDED, split="held-out")
        return perplexity(loaded, encode(documents, loaded.tokenizer, max_tokens=MERGE_TOKENS), length).perplexity

    return merge(plan.source, plan.out, dtype=plan.dtype, force=plan.force, measure=measure)
