"""The alpha dial: chooses how much of the trained change to keep (0 = base, 1 = trained).

Every trained weight is base + delta: LoRA's scaled product, and the change of embeddings and norms that trained whole
(a tied head changes with its embedding). A multiplier m sets each weight to base + m * delta: 0 is the base, 1 is as
trained. The idea is that of WiSE-FT (Wortsman et al., arXiv 2109.01903: interpolation of weights between a model and
its fine-tuned version). Multipliers per group of layers, and above 1, are ours.

`choose` sweeps m over GRID for all weights together. Then it tries FACTORS for each group in turn, starting from the
best setting so far. It compares losses at a short and at a long length on one half of held-out text (halves.py), and
reports on the other half. Not done: groups finer than a third of the layers, separate m for LoRA and norms, other
measures than the loss.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor

from ctxext.errors import InputError
from ctxext.evals.compare import Difference, differences
from ctxext.evals.item_runner import Outcome
from ctxext.model.load import LoadedModel, active_module, causal_lm
from ctxext.retrofit.halves import Half, Notice, by_length, criterion, losses, significantly_better
from ctxext.units import format_tokens

GRID = (0.0, 0.25, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5)
FACTORS = (0.7, 0.85, 1.15, 1.3)
THIRDS = ("early", "middle", "late")  # of the layers, from the first to the last
ENDS = "ends"  # embeddings, head and the final norm
GROUPS = (*THIRDS, ENDS)

Multipliers = dict[str, float]  # by group


@dataclass(frozen=True)
class TrainedModule:
    """A trained module. `turn(m)` sets its weights to base + m * delta; m = 1 restores them bit for bit."""

    group: str
    turn: Callable[[float], None]


def trained(model: Any) -> list[TrainedModule]:
    """Returns the trained modules of a live bundle (the PEFT model of `load_model` in fp32).

    The result holds a copy of the weights that trained whole. Raises InputError if there is no trained module.
    """
    layers = causal_lm(model).config.num_hidden_layers
    parts: list[TrainedModule] = []
    seen: set[int] = set()
    for name, module in model.named_modules():
        found = re.search(r"\.layers\.(\d+)\.", name)
        # Outside the layers are the embeddings, the head and the final norm.
        group = THIRDS[3 * int(found[1]) // layers] if found else ENDS
        if isinstance(module, LoraLayer):
            parts.append(TrainedModule(group, partial(_scale, module, dict(module.scaling))))
        elif isinstance(module, ModulesToSaveWrapper):
            for key, weight in active_module(module).named_parameters():
                if id(weight) not in seen:  # a tied head is the embedding under a second name
                    base = module.original_module.get_parameter(key).detach()
                    parts.append(TrainedModule(group, partial(_between, weight, base, weight.detach().clone())))
                seen.add(id(weight))
    if not parts:
        raise InputError("the multiplier needs an adapter, and this model has none")
    return parts


def _scale(module: LoraLayer, scaling: dict[str, float], m: float) -> None:
    module.scaling.update({name: m * scale for name, scale in scaling.items()})


@torch.no_grad()
def _between(weight: Tensor, base: Tensor, end: Tensor, m: float) -> None:
    weight.copy_(end if m == 1 else base + m * (end - base))


def restore(model: Any, names: Sequence[str]) -> list[str]:
    """Sets the modules with these names, such as q_proj, back to the base. Returns their full names.

    Call it before `trained`: restored modules then stay at the base for every multiplier. Raises InputError if no
    module with such a name was trained.
    """
    restored: list[str] = []
    for name, module in model.named_modules():
        if name.rpartition(".")[2] not in names:
            continue
        if isinstance(module, LoraLayer):
            _scale(module, dict(module.scaling), 0.0)
            restored.append(name)
        elif isinstance(module, ModulesToSaveWrapper):
            for key, weight in active_module(module).named_parameters():
                _between(weight, module.original_module.get_parameter(key).detach(), weight, 0.0)
            restored.append(name)
    if not restored:
        raise InputError(f"--restore: this run did not train {', '.join(names)}", hint="leave --restore out")
    return restored


def turn(parts: Sequence[TrainedModule], multipliers: Multipliers) -> None:
    """Sets every part to the multiplier of its group."""
    for part in parts:
        part.turn(multipliers[part.group])


def everywhere(m: float) -> Multipliers:
    """Returns the same multiplier for all groups."""
    return dict.fromkeys(GROUPS, m)


@dataclass(frozen=True)
class Setting:
    """One point of the sweep. `stage` is "all", or the group that is varied.

    `losses` are in nats a token by length.
    """

    stage: str
    multipliers: Multipliers
    losses: dict[int, float]
    criterion: float


@dataclass(frozen=True)
class Dial:
    """The result of `choose`. Lengths are tokens.

    `settings` are measured on the half to choose by. `reported` (nats a token by length, for the chosen setting, m = 1
    and m = 0) and `differences` are measured on the other half.
    """

    data: str
    lengths: tuple[int, ...]
    chosen: Multipliers
    why: str
    tokens: tuple[int, int]
    settings: tuple[Setting, ...]
    reported: dict[str, dict[int, float]]
    differences: tuple[Difference, ...]

    def as_dict(self) -> dict[str, Any]:
        """Returns plain data for `--json`, with the rule of the choice."""
        return {"rule": "mean over lengths of nats a token, paired by window; 1 unless one is better"} | asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        """Returns (name, value) lines for the screen."""
        where = " and ".join(format_tokens(length) for length in self.lengths)
        rows = [
            ("alpha multiplier", f"{words(self.chosen)}; {self.why}"),
            ("chosen by", f"the mean loss at {where}, {self.tokens[0]:,} tokens of {self.data}"),
        ]
        for name, found in self.reported.items():
            shown = ", ".join(f"{loss:.4f} at {format_tokens(length)}" for length, loss in found.items())
            rows.append((f"  {name}, other half", f"{shown} (nats a token, {self.tokens[1]:,} tokens)"))
        return rows + [difference_row(difference) for difference in self.differences]


def difference_row(d: Difference) -> tuple[str, str]:
    """Returns a paired difference as one line."""
    name = f"  {d.suite}, {d.model} minus {d.against}, {format_tokens(d.length)}"
    return name, f"{d.value:+.4f} {d.unit} ({d.low:+.4f} to {d.high:+.4f}, p = {d.p:.4f}, n = {d.n}): {d.called}"


def words(multipliers: Multipliers) -> str:
    """Returns one number if all groups share it, otherwise each group with its number."""
    if len(set(multipliers.values())) == 1:
        return f"{multipliers[ENDS]:g}"
    return ", ".join(f"{group} {m:.3g}" for group, m in multipliers.items())


def choose(
    loaded: LoadedModel, data: str, lengths: Sequence[int], both: tuple[Half, Half], notice: Notice = lambda _: None
) -> Dial:
    """Sweeps the multipliers, chooses, reports, and leaves the model at the chosen setting.

    A setting is taken only if the paired test shows that its criterion is lower than that of the current best, which is
    m = 1 at first and then changes group by group. `both` are the halves of `data` for `lengths`.
    """
    parts = trained(loaded.model)
    groups = [group for group in GROUPS if any(part.group == group for part in parts)]
    settings: list[Setting] = []
    total = len(GRID) + len(groups) * len(FACTORS)

    def measure(stage: str, multipliers: Multipliers) -> list[Outcome]:
        turn(parts, multipliers)
        outcomes = losses(loaded, both[0])
        settings.append(Setting(stage, multipliers, by_length(outcomes), criterion(outcomes)))
        shown = ", ".join(f"{loss:.4f} at {format_tokens(n)}" for n, loss in settings[-1].losses.items())
        notice(f"alpha multiplier {len(settings)} of {total}: {words(multipliers)} gives {shown}")
        return outcomes

    try:
        # Measure the whole grid first; m = 1 is the setting to beat.
        swept = {m: measure("all", everywhere(m)) for m in GRID}
        chosen, best, why = everywhere(1.0), swept[1.0], "1 is kept: no value of the grid was better"
        for stage in ("all", *groups):
            tried = [(everywhere(m), outcomes) for m, outcomes in swept.items() if m]  # the base (0) is never chosen
            if stage != "all":
                # Around the best setting so far, vary one group alone.
                varied = [chosen | {stage: round(f * chosen[stage], 4)} for f in FACTORS]
                tried = [(multipliers, measure(stage, multipliers)) for multipliers in varied]
            # The best of several tries needs a stricter test (Bonferroni).
            multipliers, outcomes = min(tried, key=lambda pair: criterion(pair[1]))
            better, figures = significantly_better(outcomes, best, len(tried))
            if better:
                chosen, best = multipliers, outcomes
                why = f"{significantly_better(best, swept[1.0])[1]} against 1"
            elif stage == "all" and multipliers != chosen:
                why = f"1 is kept: {words(multipliers)} is not significantly better ({figures})"
        # Report on the other half, which chose nothing.
        reported = _report(loaded, parts, chosen, both[1])
    finally:
        turn(parts, everywhere(1.0))
    turn(parts, chosen)
    # Differences of the chosen setting (or of m = 1 if that is kept) from the others.
    name, *others = reported
    compared = [d for other in others for d in differences("perplexity", name, reported[name], other, reported[other])]
    return Dial(
        data,
        tuple(lengths),
        chosen,
        why,
        (both[0].tokens, both[1].tokens),
        tuple(settings),
        {name: by_length(outcomes) for name, outcomes in reported.items()},
        tuple(compared),
    )


def _report(
    loaded: LoadedModel, parts: Sequence[TrainedModule], chosen: Multipliers, half: Half
) -> dict[str, list[Outcome]]:
    """Losses on the half that was not used for choosing. The chosen setting is first: "chosen", or "m = 1"."""
    found = {}
    for name, multipliers in (("chosen", chosen), ("m = 1", everywhere(1.0)), ("m = 0", everywhere(0.0))):
        if name != "chosen" or chosen != everywhere(1.0):
            turn(parts, multipliers)
            found[name] = losses(loaded, half)
    return found


def draw(dial: Dial, path: Path) -> None:
    """Draws the trade-off to `path` (PNG): loss at the short against loss at the long length, and both against m.

    The left picture shows m from 0.5 up, and the groups. With smaller m the points near 1 would be too close together.
    """
    from matplotlib.figure import Figure

    swept = [setting for setting in dial.settings if setting.stage == "all"]
    short, long = dial.lengths[0], dial.lengths[-1]
    figure = Figure(figsize=(9.0, 3.8), dpi=160, layout="constrained")
    plane, lines = figure.subplots(1, 2)
    # Left: loss at the short length against loss at the long one.
    near = [setting for setting in swept if setting.multipliers[ENDS] >= 0.5]
    path_x, path_y = ([setting.losses[n] for setting in near] for n in (short, long))
    plane.plot(path_x, path_y, "-", color="#0072B2", marker="o", ms=5, label="all groups together, labelled with m")
    for setting, x, y in zip(near, path_x, path_y, strict=True):
        plane.annotate(f"{setting.multipliers[ENDS]:g}", (x, y), xytext=(6, 3), textcoords="offset points", fontsize=8)
    looks = (("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"))
    for group, (colour, marker) in zip(GROUPS, looks, strict=True):
        points = [setting.losses for setting in dial.settings if setting.stage == group]
        xs, ys = ([found[n] for found in points] for n in (short, long))
        plane.plot(xs, ys, marker, color=colour, ms=4, label=f"only {group} varied")
    x, y = (next(s.losses[n] for s in dial.settings if s.multipliers == dial.chosen) for n in (short, long))
    plane.plot([x], [y], "*", color="black", ms=13, zorder=5, label=f"chosen: {words(dial.chosen)}")
    plane.set(
        xlabel=f"loss at {format_tokens(short)}, nats a token", ylabel=f"loss at {format_tokens(long)}, nats a token"
    )
    # Right: both losses against m.
    for length, style, colour in ((short, "-o", "#0072B2"), (long, "--s", "#D55E00"))[: len(dial.lengths)]:
        figures = [setting.losses[length] for setting in swept]
        lines.plot(GRID, figures, style, color=colour, label=f"at {format_tokens(length)}")
    lines.axvline(1.0, color="0.5", linestyle=":", label="as trained")
    lines.set(xlabel="multiplier m of everything that trained", ylabel="loss, nats a token")
    for ax in (plane, lines):
        ax.grid(color="0.9")
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(fontsize=7.5, frameon=False)
    figure.suptitle(f"Measured on {dial.tokens[0]:,} tokens of {dial.data}", fontsize=9, x=0.01, ha="left")
    figure.savefig(path, metadata={"Software": None})
