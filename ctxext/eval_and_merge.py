"""Functions that combine several packages: evaluations written to disk, and merges with measurements."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ctxext import __version__
from ctxext.config import manifest as manifests
from ctxext.config.locks import hold
from ctxext.config.output import check_free, claim, disk_faults, replacing, write_whole
from ctxext.data import fingerprints
from ctxext.data.documents import EMBEDDED, MOST_COMPARED, fingerprint, read_documents
from ctxext.errors import InputError
from ctxext.evals.eval_spec import EvalSpec, eval_spec_from_options
from ctxext.evals.suite import with_lengths
from ctxext.evals.suites import check_suites, inputs, model_stamp
from ctxext.extras import can_draw
from ctxext.model.companions import read_object, require_tokenizer
from ctxext.model.convert import DTYPES
from ctxext.model.layout import pattern_text
from ctxext.model.source import ModelSource, resolve
from ctxext.ops.cost import ModelShape, parameter_count
from ctxext.progress import Progress, ignore
from ctxext.units import format_tokens, parse_tokens

if TYPE_CHECKING:
    from ctxext.evals.suite import EvalReport
    from ctxext.model.merge import MergeReport

REQUEST = "request.json"  # of an evaluation: the spec and the weights that it was requested for
RESUME_HINT = "free some space, then give the same command again: it resumes"
MERGE_LENGTH = 512  # most tokens of a window when a merge measures perplexity
MERGE_TOKENS = 8192  # most tokens of text for this measurement
MERGE_CPU_FLOPS = 1e12  # of one measurement on a CPU: some ten seconds
MERGE_SHORTEST = 64  # fewest tokens that a NoPE scale may be calibrated for


@dataclass(frozen=True)
class EvalPlan:
    """A checked evaluation: its models exist and its spec is valid.

    against   the index in `sources` of the model that the others are compared with; None: no comparison
    resumes   whether `out` holds an unfinished evaluation of the same request; its finished items are not run again
    """

    sources: list[ModelSource]
    spec: EvalSpec
    against: int | None
    out: Path
    resumes: bool

    @cached_property
    def request(self) -> dict[str, Any]:
        """The spec and all its inputs, the models and the version; evaluations with equal requests are the same."""
        # Through JSON and back, so that it compares equal to a request read from disk (tuples become lists).
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
    """Finds the models and checks the spec (evals/eval_spec.py), before torch is imported.

    Without `out`, the plan resumes an unfinished evaluation of the same request under ./runs, if there is one.
    `against` is one of the models, or an additional one. Raises InputError for a model, a field or an output that
    cannot be used.
    """
    spec = eval_spec_from_options(suite, given or {})
    if not models:
        raise InputError("no model given: allowed is one or more")
    sources = [resolve(model) for model in models]
    number = None
    # Compare resolved paths, so that a model named in two ways is not evaluated twice.
    if against is not None:
        other = resolve(against)
        paths = [source.directory.resolve() for source in sources]
        sources += [other] if other.directory.resolve() not in paths else []
        number = [source.directory.resolve() for source in sources].index(other.directory.resolve())
        if len(sources) < 2:
            raise InputError(f"--against {against} is the only model", hint="name the model to compare with it as well")
    for source in sources:
        require_tokenizer(source.directory)
    # Default lengths depend on the models, so the spec is complete only here.
    spec = with_lengths(spec, sources)
    check_suites(spec)
    plan = EvalPlan(sources, spec, number, out or manifests.default_out("eval", suite), False)
    if out is None:
        found = [path.parent for path in sorted(manifests.RUNS.glob(f"*/{REQUEST}")) if _unfinished(path.parent, plan)]
        return replace(plan, out=found[-1], resumes=True) if found else plan
    if _unfinished(out, plan) and not force:
        return replace(plan, resumes=True)
    check_free(out, force, keep=[path for source in sources for path in source.paths])
    # With `force`, an evaluation that another process is running must not be replaced.
    if (out / REQUEST).is_file():
        with (out / REQUEST).open() as file:
            hold(file, out, "evaluation")
    return plan


def _unfinished(place: Path, plan: EvalPlan) -> bool:
    """Returns whether `place` has an unfinished evaluation of the plan's request that no process is running."""
    if not (place / REQUEST).is_file() or (place / manifests.FILE_NAME).exists():
        return False
    with (place / REQUEST).open() as file:
        try:
            hold(file, place, "evaluation")
            return bool(json.load(file) == plan.request)
        except (InputError, ValueError):
            return False


def eval_models(
    plan: EvalPlan, *, force: bool = False, progress: Progress = ignore, notice: Callable[[str], None] = lambda _: None
) -> EvalReport:
    """Runs the suites and returns the report; writes each result to `out` as soon as it is done.

    request.json is written first; results.json and the manifest (ctxext.json) are written last, so an interrupted
    evaluation can be resumed. `progress` and `notice` are callbacks. Raises EnvironmentFault for a full disk.
    """
    from ctxext.evals.suite import evaluate

    keep = [path for source in plan.sources for path in source.paths]
    room = nullcontext() if plan.resumes else replacing(plan.out, force, keep)
    with room, disk_faults(plan.out, hint=RESUME_HINT):
        if not plan.resumes:
            _begin(plan)
        with (plan.out / REQUEST).open() as held:
            hold(held, plan.out, "evaluation")
            try:
                report = evaluate(
                    plan.sources, plan.spec, against=plan.against, place=plan.out, progress=progress, notice=notice
                )
            except BaseException:
                if not any(any((plan.out / name).glob("*")) for name in ("outcomes", "keys")):
                    # No results yet: remove `out`, so that `replacing` restores the older output.
                    shutil.rmtree(plan.out, ignore_errors=True)
                raise
            # The manifest comes last: it marks the evaluation as finished.
            results = json.dumps(report.to_dict(), indent=2, allow_nan=False) + "\n"
            write_whole(plan.out / "results.json", results)
            if can_draw(notice, "the heatmaps of length and depth"):
                draw_depths(report, plan.out)
            parents = {f"model {i}": manifests.parent(source.directory) for i, source in enumerate(plan.sources)}
            rows = report.rows()  # train/measured.py reads `longest`
            longest = max((row["length"] or 0 for row in rows), default=0)
            read = {suite.suite: list(suite.read) for suite in report.models[0].suites if suite.read}
            facts = {"seconds": report.seconds, "numbers": len(rows), "longest": longest, "read": read}
            manifests.write(plan.out, manifests.new("eval", spec=plan.request["spec"], parents=parents, facts=facts))
    return report


def _begin(plan: EvalPlan) -> None:
    """Makes `out` with its request. Raises InputError where another process made it first."""
    claim(plan.out)
    try:
        write_whole(plan.out / REQUEST, json.dumps(plan.request, indent=2) + "\n")
    except BaseException:
        plan.out.rmdir()
        raise


def draw_depths(report: EvalReport, place: Path) -> None:
    """Draws a heatmap of length x depth for each model and each suite with depths.

    The files are `<suite's number>-<suite>-<model's number>.png` in `place`.
    """
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


Chosen = float | Literal["auto"] | None


@dataclass(frozen=True)
class MergePlan:
    """A checked merge.

    alpha, nope_scale   a factor to merge into the weights, `auto` to choose it by measurement, or None: as trained
    length              tokens that nope_scale `auto` calibrates for; None is the usable length
    data                held-out text for `auto`, a source of data/documents.py
    restore             qk: queries and keys are those of the base; None: as trained
    """

    source: ModelSource
    out: Path
    dtype: str | None
    force: bool
    alpha: Chosen = None
    nope_scale: Chosen = None
    length: int | None = None
    data: str = EMBEDDED
    restore: str | None = None

    @property
    def requested(self) -> dict[str, Any]:
        """The requested adjustments, for the manifest."""
        given = {"alpha_multiplier": self.alpha, "nope_scale": self.nope_scale, "length": self.length,
                 "restore": self.restore}  # fmt: skip
        requested = {name: value for name, value in given.items() if value is not None}
        return requested | ({"data": self.data} if "auto" in requested.values() else {})


def plan_merge(
    run: str,
    out: Path | None,
    dtype: str | None,
    force: bool,
    *,
    alpha_multiplier: str | float | None = None,
    nope_scale: str | float | None = None,
    length: str | int | None = None,
    data: str | None = None,
    restore: str | None = None,
) -> MergePlan:
    """Finds the bundle and its base, and checks the options, before torch is imported.

    Raises InputError for options that do not fit together, for a model without an adapter, for a NoPE scale without a
    full NoPE layer (N), and for an output that exists. Raises as `read_documents` does for `data`.
    """
    # Checks of the arguments alone come first; the later ones read the model's files.
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"--dtype {dtype!r}: allowed are {', '.join(DTYPES)}")
    if restore not in (None, "qk"):
        raise InputError(f"--restore {restore}: allowed is qk, the projections of queries and keys")
    if nope_scale == "log":
        raise InputError(
            "--nope-scale log: no stock class multiplies a query by the log of its position, so an exported model "
            "would lose the scale without a message",
            hint="merge a constant (--nope-scale auto), or measure it with `ctxext eval --nope-log-scale 500`",
        )
    alpha, scale = _chosen("--alpha-multiplier", alpha_multiplier), _chosen("--nope-scale", nope_scale)
    if length is not None and scale != "auto":
        raise InputError(f"--length {length} has an effect only with --nope-scale auto, which was not given")
    if data is not None and "auto" not in (alpha, scale):
        raise InputError(
            f"--data {data} has no effect: this merge measures nothing",
            hint="give --alpha-multiplier or --nope-scale auto",
        )
    source = resolve(run)
    if source.base is None:
        raise InputError(f"{run} has no adapter to merge: it is an ordinary model already")
    if restore is not None:
        trained = read_object(source.directory / "adapter_config.json").get("target_modules") or []
        if not {"q_proj", "k_proj"} & set(trained):
            raise InputError("--restore qk: this run did not train q_proj or k_proj", hint="leave --restore out")
    if scale is not None and not any(kind.letter == "N" for kind in source.kinds):
        raise InputError(
            f"--nope-scale {nope_scale}: the layout {pattern_text(source.kinds)} has no N layer (NoPE, full)",
            hint="this is for conversions such as swa128-nope; leave it out",
        )
    tokens = None if length is None else parse_tokens(length)
    if tokens is not None and tokens < MERGE_SHORTEST:
        raise InputError(f"--length {length}: allowed are {MERGE_SHORTEST} tokens or more")
    if data is not None:
        read_documents(data)
    out = out or manifests.default_out("merge", source.name)
    check_free(out, force, keep=[source.path, source.base.path])
    return MergePlan(source, out, dtype, force, alpha, scale, tokens, data or EMBEDDED, restore)


def _chosen(option: str, given: str | float | None) -> Chosen:
    """Returns `auto`, None or a number above 0 and up to 4; raises InputError for anything else."""
    if given is None:
        return None
    if given == "auto":
        return "auto"
    try:
        number = float(given)
    except ValueError:
        number = math.nan
    if not 0 < number <= 4:
        raise InputError(f"{option} {given}: allowed are auto, or a number above 0 and up to 4")
    return number


def merge_run(plan: MergePlan, *, notice: Callable[[str], None] = lambda _: None) -> MergeReport:
    """Merges an adapter into its base and returns the report.

    The adjustments of the plan are applied first. The perplexity on held-out embedded text is measured before and after
    the cast to the stored dtype. `notice` is called with each warning.
    """
    from ctxext.evals.perplexity import encode, perplexity
    from ctxext.model.merge import merge
    from ctxext.retrofit.adjust import adjust

    length = min(MERGE_LENGTH, plan.source.usable_length)

    def measure(loaded: Any) -> tuple[float, str]:
        documents = read_documents(EMBEDDED, split="held-out")
        tokens = merge_tokens(plan.source.shape, length, on_cpu=loaded.device.type == "cpu")
        found = perplexity(loaded, encode(documents, loaded.tokenizer, max_tokens=tokens), length)
        protocol = found.row("held-out embedded text").protocol
        return found.perplexity, f"{format_tokens(found.tokens_scored)} tokens at length {length}, {protocol}"

    # A choice made on training text favours what the model memorised, so the user gets a warning.
    seen = seen_in_training(plan.source, plan.data)
    if seen and "auto" in (plan.alpha, plan.nope_scale):
        notice(
            f"warning: {plan.data} was trained on ({seen}): what is chosen on training text may not hold for other text"
        )
    return merge(
        plan.source,
        plan.out,
        dtype=plan.dtype,
        force=plan.force,
        measure=measure,
        adjust=partial(
            adjust,
            alpha=plan.alpha,
            nope_scale=plan.nope_scale,
            length=plan.length,
            data=plan.data,
            notice=notice,
            restore=plan.restore,
        ),
        requested=plan.requested,
    )


def merge_tokens(shape: ModelShape, length: int, *, on_cpu: bool) -> int:
    """Returns how many tokens of text a merge measures perplexity on: fewer for a large model on a CPU."""
    if not on_cpu:
        return MERGE_TOKENS
    # 2 FLOPs a parameter and token; with a stride of half a window each token is computed twice.
    affordable = MERGE_CPU_FLOPS / (4 * parameter_count(shape))
    return int(min(MERGE_TOKENS, max(2 * length, affordable)))


def seen_in_training(source: ModelSource, data: str) -> str | None:
    """Returns the training source of a bundle that overlaps `data`: the same, a part, or one that contains it.

    None where there is no overlap. It is also None for the embedded corpus, because training reads only the part of it
    that is not held out.
    """
    assert source.manifest is not None
    spec, facts = source.manifest.spec.get("data", {}), source.manifest.facts.get("data", {})
    if data == EMBEDDED:
        return None
    # Equal content first, which finds copies at other paths; then equal or nested paths.
    known = facts.get("fingerprint")
    if known is not None and known in (fingerprint(data, most=MOST_COMPARED), fingerprints.by_time(data)):
        return str(facts.get("source"))
    here = Path(data).resolve()
    for trained in [spec.get("source"), *(part.get("source") for part in spec.get("mixture", []))]:
        there = Path(trained or EMBEDDED).resolve()
        if trained == data or (there.exists() and (here.is_relative_to(there) or there.is_relative_to(here))):
            return str(trained)
    return None
