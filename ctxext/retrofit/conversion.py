"""A conversion with the planner's choice of full layers and with fitted sinks. No torch until a model is measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ctxext.data.documents import EMBEDDED
from ctxext.extras import can_draw
from ctxext.model.convert import (
    ConversionPlan,
    ConversionReport,
    may_fit_sinks,
    plan_conversion,
    run_conversion,
    with_kinds,
)
from ctxext.progress import Progress
from ctxext.requests import AUTO, RETRIEVAL, ConvertRequest
from ctxext.retrofit.layers import Request, request_of

if TYPE_CHECKING:
    from ctxext.retrofit.planner import LayerPlan

Say = Callable[[str], None]


def planned_conversion(
    request: ConvertRequest, out: Path | None, *, allow_pickle: bool = False, force: bool = False
) -> ConversionPlan:
    """Returns the plan of a conversion, without the planner's choice of layers; checks the model's files."""
    full_layers = request.full_layers
    if isinstance(full_layers, tuple):
        full_layers = ",".join(map(str, full_layers))
    return plan_conversion(
        request.model,
        request.hybrid,
        out=out,
        full_layers=None if full_layers in (AUTO, RETRIEVAL) else full_layers,
        sliding_window=request.sliding_window,
        dtype=request.dtype,
        model_class=request.model_class,
        sinks=request.sinks,
        allow_pickle=allow_pickle,
        force=force,
    )


def plan_layers(plan: ConversionPlan, request: ConvertRequest) -> Request | None:
    """Returns the request to the planner; None where `full_layers` is neither "auto" nor "retrieval".

    Raises InputError where an option of the planner is given without it.
    """
    method = request.full_layers if request.full_layers in (AUTO, RETRIEVAL) else None
    requested = {name: getattr(request, name) for name in ("budget", "length", "calibration", "calibration_tokens")}
    requested = {name: value for name, value in requested.items() if value is not None}
    if request.i_know:
        requested["i_know"] = True
    if method is None and may_fit_sinks(plan):
        requested.pop("calibration", None)  # the sinks are fitted on this text
    source = plan.source
    return request_of(source.shape, source.kinds, plan.hybrid, source.usable_length, method, requested)


def choose_full_layers(plan: ConversionPlan, request: Request | None, say: Say, progress: Progress) -> LayerPlan | None:
    """Returns the planner's choice of layers, by measurement; None without a request."""
    if request is None:
        return None
    from ctxext.retrofit.planner import choose_layers

    say(f"measuring which layers of {plan.source.name} to keep full")
    return choose_layers(plan, request, say=say, progress=lambda what, *counts: progress(f"measuring {what}", *counts))


def write_conversion(
    plan: ConversionPlan,
    chosen: LayerPlan | None,
    *,
    calibration: str | None = None,
    gate: bool,
    force: bool,
    say: Say,
    progress: Progress,
) -> ConversionReport:
    """Writes the conversion, with the planner's results in the same directory.

    `calibration` is the text that sinks are fitted on; None: the embedded corpus.
    """
    attachments: dict[str, bytes] = {}
    facts: dict[str, object] = {}
    # The planner's layout replaces that of the plan, before sinks are fitted for it.
    if chosen is not None:
        plan = with_kinds(plan, chosen.kinds)
        facts["planner"] = chosen.facts()
        attachments = {"retrofit.json": (json.dumps(chosen.as_dict(), indent=2) + "\n").encode()}
        if can_draw(say, "pareto.png"):
            from ctxext.retrofit.picture import pareto_png

            attachments["pareto.png"] = pareto_png(chosen)
    else:
        from ctxext.retrofit.retrieval import hidden_retrieval

        progress("measuring the retrieval heads", 0, 1)
        if (line := hidden_retrieval(plan)) is not None:
            say(line)
    sinks = None
    if plan.sinks:
        from ctxext.retrofit.fitted_sinks import fit_sinks

        progress("measuring the first token", 0, 1)
        sinks = fit_sinks(plan, say=say, calibration=calibration or EMBEDDED)
    say(f"converting {plan.source.name} to {plan.out}")
    return run_conversion(
        plan,
        gate=gate,
        force=force,
        sinks=sinks,
        attachments=attachments,
        facts=facts,
        progress=lambda done, total: progress("proving" if done == total else "copying weights", done, total),
    )
