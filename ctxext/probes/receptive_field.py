"""Measures what a long view is good for: layers see less, and loss and retrieval are measured again.

All full layers, all sliding layers, or one layer at a time see R tokens (themselves included) at inference; everything
else is unchanged (model/attention.py `intervening`): "Rethinking the Role of Efficient Attention in Hybrid
Architectures", arXiv 2606.15378, code, where R is about 2,048. This is damage without training: it shows what the model
as it is gets through these layers, not what it could do without them.

The loss is that of perplexity's protocol `truncate`, whole windows side by side: the cheapest, because every token runs
once, and pessimistic. Passkeys are answered in one forward each (evals/passkey.py); the loss of their answers shows
damage before the first answer is lost. The evaluator, which finds LongPPL's keys, is never restricted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from ctxext.evals import longppl, passkey, perplexity
from ctxext.evals.eval_spec import FIVE_DEPTHS, LongPpl, Passkey, Perplexity
from ctxext.evals.item_runner import Ledger, SuiteJob, run_job
from ctxext.model.attention import Intervention, intervening
from ctxext.model.load import causal_lm
from ctxext.probes.probe_finding import Bars, Curve, Curves, Number, Picture, ProbeFinding, Table
from ctxext.probes.probe_spec import ReceptiveField
from ctxext.probes.subject import Subject
from ctxext.progress import CountProgress

PROTOCOL: Final = "truncate"
TOKENS_PER_BATCH = 16_384
SMALLEST = 16  # visible tokens
LINES = {"full": "full layers", "sliding": "sliding layers"}
MEASURED = {  # name: (title of the picture, its unit)
    "loss": ("Loss", "nats a token"),
    "passkey": ("Passkeys found", "share"),
    "answer_loss": ("Loss of the passkeys", "nats a token"),
    "longppl_loss": ("Loss of key tokens (log LongPPL)", "nats a token"),
}
Scores = dict[str, Number]


@dataclass(frozen=True)
class Restriction:
    """One restriction: `layers` see `visible` tokens; `group` is one of spec.restrict."""

    group: str
    visible: int
    layers: tuple[int, ...]


def measure(subject: Subject, spec: ReceptiveField, progress: CountProgress) -> ProbeFinding:
    """Measures loss, passkeys and LongPPL unrestricted and under each restriction.

    Raises what these evaluations raise, and InputError or ModelError for an evaluator that does not support the
    request.
    """
    assert spec.length is not None
    limits, notes = restrictions(subject, spec)
    jobs = _jobs(subject, spec)
    each = sum(len(job.items) for job in jobs)
    total = (len(limits) + 1) * each

    def scores(number: int, restriction: Restriction | None) -> Scores:
        return _scores(subject, jobs, restriction, lambda done: progress(number * each + done, total))

    # Measurement 0 is unrestricted; all others are compared with it.
    whole = scores(0, None)
    found = [(one, scores(number, one)) for number, one in enumerate(limits, start=1)]
    if whole.get("longppl_loss", 0.0) is None:
        notes.append(f"the evaluator found no key tokens at {spec.length:,} tokens: no LongPPL")
    if whole["passkey"] == 0:
        notes.append("no passkey is found even without restrictions: compare their loss, not their share")
    rows = [(one.group, {"visible": one.visible, "layers": list(one.layers), **score}) for one, score in found]
    facts = {
        "length": spec.length,
        "protocol": f"perplexity {PROTOCOL}, passkeys at five depths",
        "data": spec.data,
        "tokens": sum(window.size - 1 for window in jobs[0].items),
        "passkeys": len(jobs[1].items),
        "evaluator": spec.evaluator,
        "layers": subject.letters,
        "unrestricted": whole,
        "restricted": {group: [row for name, row in rows if name == group] for group in spec.restrict},
    }
    pictures: list[Picture] = [*_curves(whole, found, spec.length), *_bars(whole, found, subject.letters)]
    return ProbeFinding(facts, tuple(pictures), (_table(whole, found, subject, spec),), tuple(notes))


def restrictions(subject: Subject, spec: ReceptiveField) -> tuple[list[Restriction], list[str]]:
    """Returns the restrictions in order, and notes on missing layers and on windows that are already narrower."""
    assert spec.length is not None
    powers = [1 << i for i in range(spec.length.bit_length()) if SMALLEST <= 1 << i < spec.length]
    visible = sorted(set(spec.visible or powers))
    windows = [kind.sliding_window for kind in subject.kinds]
    groups = {
        "full": tuple(i for i, window in enumerate(windows) if window is None),
        "sliding": tuple(i for i, window in enumerate(windows) if window is not None),
    }
    made, notes = list[Restriction](), list[str]()
    for group, layers in groups.items():
        if group in spec.restrict and layers:
            made += [Restriction(group, R, layers) for R in visible]
        elif group in spec.restrict:
            notes.append(f"the model has no {group} layer, so that line is left out")
    if "layers" in spec.restrict:
        R = spec.layer_visible or visible[0]
        made += [Restriction("layers", R, (i,)) for i in range(len(windows))]
        if any(window is not None and window <= R for window in windows):
            notes.append(
                f"windows of at most {R:,} tokens are not narrowed by R = {R:,}: the bars of such layers are 0"
            )
    return made, notes


def _jobs(subject: Subject, spec: ReceptiveField) -> list[SuiteJob]:
    """Returns the jobs of perplexity, passkeys and, with an evaluator, LongPPL; they run under every restriction."""
    length = spec.length
    assert length is not None
    if spec.evaluator is not None:
        long = LongPpl(evaluator=spec.evaluator, lengths=(length,), data=spec.data)
        # The LongPPL job reads the keys when it is made, so the directory is not needed afterwards.
        with TemporaryDirectory() as place:
            longppl.prepare(long, Path(place), subject.dtype, subject.device, lambda *_: None)
            last = [longppl.job(subject.loaded, long, Path(place))]
    else:
        last = []
    text = Perplexity(lengths=(length,), data=spec.data, protocol=PROTOCOL, limit=max(spec.tokens, length))
    cases = math.ceil(spec.samples / len(FIVE_DEPTHS))
    keys = Passkey(lengths=(length,), data=spec.data, cases=cases, limit=spec.samples, seed=spec.seed)
    return [perplexity.job(subject.loaded, text, Path()), passkey.job(subject.loaded, keys, Path()), *last]


def _scores(
    subject: Subject, jobs: Sequence[SuiteJob], restriction: Restriction | None, progress: Callable[[int], None]
) -> Scores:
    """Returns the jobs' numbers, by the names of MEASURED, with the layers restricted while they run."""
    changes = {i: Intervention(visible=restriction.visible) for i in restriction.layers} if restriction else {}
    before, rows = 0, []
    with intervening(causal_lm(subject.loaded.model).get_decoder(), changes):
        for job in jobs:

            def count(done: int, _: int, before: int = before) -> None:
                progress(before + done)

            # A new ledger each time: results of another restriction must not be used again.
            rows += run_job(job, Ledger(), TOKENS_PER_BATCH, count)
            before += len(job.items)
    # Each job has one length, so it gives one row.
    text, keys, *long = rows
    scores: Scores = {
        "loss": text.details["nats_per_token"],
        "passkey": keys.value,
        "passkey_low": keys.low,
        "passkey_high": keys.high,
        "answer_loss": keys.details["answer_nats"],
    }
    for row in long:
        scores["longppl_loss"] = math.log(row.value) if row.value and math.isfinite(row.value) else None
    return scores


def _curves(whole: Scores, found: list[tuple[Restriction, Scores]], length: int) -> list[Curves]:
    pictures = []
    for name, (title, unit) in MEASURED.items():
        lines = []
        for group, label in LINES.items():
            points = [(one.visible, score[name]) for one, score in found if one.group == group and name in score]
            if points and whole[name] is not None:
                lines.append(Curve(label, tuple(x for x, _ in points), tuple(y for _, y in points)))
        if lines:
            pictures.append(
                Curves(
                    name.replace("_", "-"),
                    f"{title} at {length:,} tokens, layers seeing fewer",
                    "visible tokens R",
                    unit,
                    tuple(lines),
                    x_tokens=True,
                    level=whole[name],
                    level_name="nothing restricted",
                )
            )
    return pictures


def _bars(whole: Scores, found: list[tuple[Restriction, Scores]], letters: str) -> list[Bars]:
    """Returns what is lost where one layer alone is restricted: more is worse."""
    mine = [(one, score) for one, score in found if one.group == "layers"]
    if not mine:
        return []
    pictures = []
    for name, (title, unit) in MEASURED.items():
        if whole.get(name) is None:
            continue
        lost = (-1, "Passkeys lost") if name == "passkey" else (1, f"{title}, above nothing restricted,")
        pictures.append(
            Bars(
                f"layers-{name.replace('_', '-')}",
                f"{lost[1]} where one layer sees {mine[0][0].visible:,} tokens",
                "layer",
                unit,
                tuple(str(one.layers[0]) for one, _ in mine),
                tuple(_apart(score[name], whole[name], lost[0]) for _, score in mine),
                letters,
            )
        )
    return pictures


def _apart(value: Number, whole: Number, sign: int) -> Number:
    return None if value is None or whole is None else sign * (value - whole)


def _table(whole: Scores, found: list[tuple[Restriction, Scores]], subject: Subject, spec: ReceptiveField) -> Table:
    names = [name for name in MEASURED if name in whole]

    def row(what: str, visible: str, score: Scores) -> tuple[str, ...]:
        return (what, visible, *("" if (x := score[name]) is None else f"{x:.3f}" for name in names))

    rows = [row("nothing", "", whole)]
    for one, score in found:
        layer = f"layer {one.layers[0]} ({subject.letters[one.layers[0]]})"
        rows.append(row(LINES.get(one.group, layer), f"{one.visible:,}", score))
    caption = f"layers that see R tokens, at {spec.length:,} tokens; losses in nats a token"
    header = ("restricted", "R", *(name.replace("_", " ") for name in names))
    return Table(caption, header, tuple(rows))
