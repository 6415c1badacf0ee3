"""The softmax scale of layers without positions, for a given length: one constant c on their queries.

A NoPE layer's softmax spreads over more keys as the text gets longer. Larger scores make it sharp again (Wang et al.,
"Length Generalization of Causal Transformers without Position Encoding", arXiv 2404.12224, section 3: one scale for all
heads). A constant can be folded into weights that any engine runs: into q_proj and its bias, or, if an RMSNorm follows
q_proj and would undo that, into the norm's weight.

`choose` calibrates c at the target length by the loss of passkey answers, because the loss of text hardly depends on c:
on `tiny`, text at 8 times the length did not distinguish any c from 1, while the share of passkeys found rose from 52%
to 76%. The loss of text is a guard, and decides only if the model finds no passkeys. Results are reported by length, on
other keys and on the other half of the text. Not done: a c for each head (2404.12224, section 4, trains them), and log
n, which no stock class has (model/load.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ctxext.errors import InputError
from ctxext.evals.compare import Difference, differences, paired
from ctxext.evals.eval_spec import Passkey
from ctxext.evals.item_runner import Ledger, Outcome, SuiteJob, run_job
from ctxext.evals.passkey import job as passkey_job
from ctxext.model.load import LoadedModel, causal_lm
from ctxext.model.source import ModelSource
from ctxext.retrofit.dial import difference_row
from ctxext.retrofit.halves import Half, Notice, by_length, criterion, losses, significantly_better
from ctxext.units import counted, format_tokens

ANSWERS, TEXT = "passkey answers", "text"  # the measures that c can be chosen by
GRID = (1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6)
REFINE = 0.05  # step on both sides of the best of GRID
WINDOWS = 16  # of the target length to choose by: this length alone decides
REPORTING, CHOOSING = 0, 1  # seeds of the keys: `ctxext eval` uses 0, so that its keys chose nothing either
CASES = (8, 4)  # by seed, for each length and each of five depths
TOLERANCE = 0.02  # nats a token: allowed cost on text at the original length, with 97.5% confidence: perplexity +2%


def nope_layers(source: ModelSource) -> list[int]:
    """Returns the full layers without positions."""
    return [i for i, kind in enumerate(source.kinds) if kind.letter == "N"]


def query_module(model: Any, layer: int) -> nn.Module:
    """Returns the last module with weights on the path of a layer's queries: q_norm if there is one, or q_proj."""
    attention: Any = causal_lm(model).get_decoder().layers[layer].self_attn
    found: nn.Module = attention.q_norm if hasattr(attention, "q_norm") else attention.q_proj
    return found


def hold(model: Any, layers: Sequence[int], c: float) -> list[RemovableHandle]:
    """Multiplies the queries of `layers` by c with forward hooks, not in weights. Remove the handles to undo it."""
    multiply = partial(_times, c)
    return [query_module(model, layer).register_forward_hook(multiply) for layer in layers]


def _times(c: float, module: nn.Module, given: Any, out: Tensor) -> Tensor:
    return out * c


@contextmanager
def held(model: Any, layers: Sequence[int], c: float) -> Iterator[None]:
    """Applies `hold` for the duration of the block."""
    handles = hold(model, layers, c)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def fold(model: Any, layers: Sequence[int], c: float) -> None:
    """Multiplies the weights that produce the queries of `layers` by c, permanently.

    `model` is merged, with fp32 weights.
    """
    for layer in layers:
        for parameter in query_module(model, layer).parameters():
            parameter.mul_(c)


@dataclass(frozen=True)
class NopeScale:
    """The result of `choose`.

    `decided_by` is ANSWERS or TEXT. `tried` maps c to its nats a token at `target` on the cases or text that chose.
    `guard` maps 1, and each c that was checked, to nats a token by length on the text to choose by.

    The other results compare c = 1 and the best c, by length, on text and keys that chose nothing: `losses` and
    `answers` in nats a token, `passkey` the share found, `differences` between the two. `cases` and `tokens` are (to
    choose by, to report on).
    """

    data: str
    target: int
    layers: tuple[int, ...]
    chosen: float
    why: str
    decided_by: str
    cases: tuple[int, int]
    tokens: tuple[int, int]
    tried: dict[float, float]
    guard: dict[float, dict[int, float]]
    losses: dict[str, dict[int, float]]
    passkey: dict[str, dict[int, float]]
    answers: dict[str, dict[int, float]]
    differences: tuple[Difference, ...]

    def as_dict(self) -> dict[str, Any]:
        """Returns plain data for `--json`."""
        return asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        """Returns (name, value) lines for the screen."""
        layers, answers = ", ".join(map(str, self.layers)), self.decided_by == ANSWERS
        keys = (
            f"{ANSWERS}, {counted(self.cases[0], 'case')} of seed {CHOOSING}, limited by the loss of "
            if answers
            else ""
        )
        rows = [
            ("NoPE scale", f"{self.chosen:g} on the queries of layers {layers}; {self.why}"),
            (
                "chosen by",
                f"the loss at {format_tokens(self.target)} of {keys}{self.tokens[0]:,} tokens of {self.data}",
            ),
        ]
        rows += [(f"  c = {c:g}, text", _nats(found)) for c, found in self.guard.items() if answers]
        rows += [(f"  {name}, other half", _nats(found)) for name, found in self.losses.items()]
        for name, shares in self.passkey.items():
            shown = ", ".join(f"{share:.0%} at {format_tokens(n)}" for n, share in shares.items())
            rows.append(
                (
                    f"  {name}, passkey",
                    f"{shown} (other keys, seed {REPORTING}, {counted(self.cases[1], 'case')} a length)",
                )
            )
            rows.append((f"  {name}, their answers", _nats(self.answers[name])))
        return rows + [difference_row(difference) for difference in self.differences]


def _nats(found: dict[int, float]) -> str:
    return ", ".join(f"{loss:.4f} at {format_tokens(n)}" for n, loss in found.items()) + " (nats a token)"


def reported_lengths(original: int, target: int) -> list[int]:
    """Returns the original length, its doublings below the target, and the target."""
    lengths = [min(original, target)]
    while 2 * lengths[-1] < target:
        lengths.append(2 * lengths[-1])
    return [*lengths, target] if lengths[-1] < target else lengths


def choose(
    loaded: LoadedModel, data: str, lengths: Sequence[int], both: tuple[Half, Half], notice: Notice = lambda _: None
) -> NopeScale:
    """Calibrates c at the last of `lengths` and reports at all of them. The model is unchanged afterwards.

    The first of `lengths` is the original length, and `both` are the halves for `lengths`. If the model finds a passkey
    at the original length, the loss of the answers is minimised, otherwise that of text; see `decide`. The best c is
    also reported if it is not chosen.
    """
    layers, target = nope_layers(loaded.source), lengths[-1]
    # The guard needs text at the original and at the target length only.
    choosing = Half(both[0].texts, [w for w in both[0].windows if w.length in (lengths[0], target)])
    finds = _finds_passkeys(loaded, lengths[0], notice)
    decided_by = ANSWERS if finds else TEXT
    # Different keys for choosing and reporting, so that the report is not biased by the choice.
    by, on = (_passkeys(loaded, *ask) if finds else None for ask in (([target], CHOOSING), (lengths, REPORTING)))
    tried: dict[float, list[Outcome]] = {}
    texts: dict[float, list[Outcome]] = {}

    def text(c: float) -> list[Outcome]:
        if c not in texts:
            with held(loaded.model, layers, c):
                texts[c] = losses(loaded, choosing)
        return texts[c]

    def measure(c: float) -> None:
        if by:
            with held(loaded.model, layers, c):
                found = _answers(_run(by))
        else:
            found = text(c)
        tried[c] = [outcome for outcome in found if outcome.length == target]
        loss = f"{criterion(tried[c]):.4f} nats a token of {decided_by} at {format_tokens(target)}"
        notice(f"NoPE scale {c:g}: {loss}")

    # A coarse grid, then one step of REFINE on both sides of its best.
    for c in GRID:
        measure(c)
    around = decide(tried, text, lengths[0])[1]
    for c in (round(around - REFINE, 4), round(around + REFINE, 4)):
        measure(c)
    chosen, best, why = decide(tried, text, lengths[0])
    # Report c = 1 and the best on text and keys that chose nothing.
    kept, keys = _others(loaded, layers, list(dict.fromkeys((1.0, best))), both[1], on, notice)
    nats = {name: _answers(outcomes) for name, outcomes in keys.items()}
    return NopeScale(
        data,
        target,
        tuple(layers),
        chosen,
        f"{why}; chosen by {decided_by}",
        decided_by,
        (5 * CASES[CHOOSING], 5 * CASES[REPORTING]) if finds else (0, 0),
        (choosing.tokens, both[1].tokens),
        {c: criterion(outcomes) for c, outcomes in sorted(tried.items())},
        {c: by_length(outcomes) for c, outcomes in sorted(texts.items())},
        {name: by_length(outcomes) for name, outcomes in kept.items()},
        {name: by_length(outcomes) for name, outcomes in keys.items()},
        {name: by_length(outcomes) for name, outcomes in nats.items()},
        _compared({"perplexity": kept, "passkey": keys, ANSWERS: nats}),
    )


def decide(
    tried: dict[float, list[Outcome]], text: Callable[[float], list[Outcome]], original: int
) -> tuple[float, float, str]:
    """Returns (the c to use, the c to report next to 1, why).

    `tried` maps c to its outcomes at the target length, `text` returns the outcomes of a c on text. The best c is used
    if it differs significantly from 1, as the best of that many tries, and if text does not suffer: at the target
    length the loss of text is not significantly worse, and at `original` tokens the interval of the loss increase ends
    at TOLERANCE or below (on `tiny` 1.3 cost 0.0195 nats there and 0.0329 on the other half). If text suffers, the next
    best c is checked.
    """
    order = sorted(tried, key=lambda c: criterion(tried[c]))
    over, harm = [], ""
    # From the best c down to the last that is better than 1.
    for c in order[: order.index(1.0)]:
        better, figures = significantly_better(tried[c], tried[1.0], len(tried))
        if not better:
            return 1.0, order[0], f"1 is kept: {c:g} is not significantly better ({figures}){harm}"
        found = _harm(text(c), text(1.0), original)
        if not found:
            return c, c, f"{figures} against 1{harm}"
        over.append(f"{c:g}")
        harm = f"; rejected: {', '.join(over)}, the last because it {found}"
    return 1.0, order[0], f"1 is kept: no value was better{harm and ' without harm to text'}{harm}"


def _harm(mine: list[Outcome], plain: list[Outcome], original: int) -> str:
    """The damage to text that rules a c out, in words; "" if there is none."""
    pairs = [(a, b) for a, b in zip(mine, plain, strict=True) if a.length == original]
    # The upper end of the interval counts, so that an uncertain loss also rules c out.
    cost, _, most, _ = paired([pairs])
    if most > TOLERANCE:
        figures = f"{cost:.4f} nats a token, at most {most:.4f} with 97.5% confidence"
        return f"may cost more than {TOLERANCE:g} on text at {format_tokens(original)} ({figures})"
    target = max(outcome.length for outcome in mine)
    long, long_plain = ([o for o in outcomes if o.length == target] for outcomes in (mine, plain))
    worse, figures = significantly_better(long_plain, long)
    return f"makes text worse at {format_tokens(target)} (1 minus it: {figures})" if worse else ""


def _others(
    loaded: LoadedModel,
    layers: Sequence[int],
    values: Sequence[float],
    half: Half,
    keys: SuiteJob | None,
    notice: Notice,
) -> tuple[dict[str, list[Outcome]], dict[str, list[Outcome]]]:
    """The outcomes of each c of `values` on text and keys that chose nothing."""
    texts, found = dict[str, list[Outcome]](), dict[str, list[Outcome]]()
    for c in values:
        notice(f"NoPE scale {c:g} on {'other keys and ' if keys else ''}other text, at all lengths")
        with held(loaded.model, layers, c):
            texts[f"c = {c:g}"] = losses(loaded, half)
            if keys:
                found[f"c = {c:g}"] = _run(keys)
    return texts, found


def _compared(found: dict[str, dict[str, list[Outcome]]]) -> tuple[Difference, ...]:
    """The differences by suite, the second model minus the first, where there are two."""
    compared: list[Difference] = []
    for suite, named in found.items():
        if len(named) == 2:
            # Answers are compared like perplexity, in nats, and renamed to their own suite afterwards.
            (plain, others), (name, mine) = named.items()
            made = differences("perplexity" if suite == ANSWERS else suite, name, mine, plain, others)  # both in nats
            compared += [replace(difference, suite=suite) for difference in made]
    return tuple(compared)


def _finds_passkeys(loaded: LoadedModel, length: int, notice: Notice) -> bool:
    """Whether the model can find passkeys at all; by chance one in 100,000 is found."""
    try:
        found = any(outcome.score for outcome in _run(_passkeys(loaded, [length], CHOOSING)))
    except InputError as error:  # too short for a needle and a question
        notice(f"passkey is not measured: {error.message}")
        return False
    if not found:
        notice(f"passkey is not measured: the model finds none at {format_tokens(length)}")
    return found


def _passkeys(loaded: LoadedModel, lengths: Sequence[int], seed: int) -> SuiteJob:
    """Passkeys hidden in the held-out files of the embedded corpus."""
    return passkey_job(loaded, Passkey(lengths=tuple(lengths), cases=CASES[seed], seed=seed), Path())


def _run(keys: SuiteJob) -> list[Outcome]:
    ledger = Ledger()
    run_job(keys, ledger, 16_384, lambda *_: None)
    return [ledger.outcomes[item.id] for item in keys.items]


def _answers(found: Sequence[Outcome]) -> list[Outcome]:
    """The same cases, scored by the loss of the answer's tokens."""
    return [replace(o, score=o.details["nats"], weight=o.details["tokens"]) for o in found]
