"""Which layers of a real model stay full: choices by retrieval and by text against fixed patterns, before any training.

    python benchmarks/layer_choice.py MODEL BOOKS        # minutes for SmolLM2-135M on two cores; --search: longer

MODEL is a llama that relies on its first token. Sliding layers have windows of 128 tokens and fitted sinks, as `convert
--class granite_swa` writes them; the layers that are measured here are the stock ones, streamed as the planner does.
The layers with the strongest retrieval heads (`convert --full-layers retrieval`) are compared with evenly spaced and
with drawn layers, as full layers with RoPE and without. With --search, two searches are compared as well. In the first,
layers lose their full attention in rounds: in each round those whose window costs the passkeys least leave the full
layers, and the rest are measured again in the new layout. In the second, the choice grows again from five layers, by
the layers that help text and passkeys most. Each layer is then also measured alone: with a window, and without RoPE.
Choices are made on one novel and compared on another one, with other passkeys. One layout a line in
benchmarks/results/layer-choice-cpu.jsonl; what is there is not measured again.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from arms import Row, Rows, machine, table
from torch import Tensor

from ctxext.cli import console
from ctxext.data.haystack import key_places, passkey_cases
from ctxext.data.prompts import framing
from ctxext.model.convert import plan_conversion
from ctxext.model.layout import LayerKind
from ctxext.model.load import load_tokenizer
from ctxext.retrofit.damage import Layers, Samples, final_states, head_scores
from ctxext.retrofit.fitted_sinks import open_conversion, sinks_of_windows
from ctxext.train.loss import token_losses

WINDOW, T = 128, 1024  # tokens
CHOSEN_ON, COMPARED_ON = "eliot_daniel_deronda.md", "norris_the_octopus.md"
DEPTHS = (0.05, 0.25, 0.45, 0.65, 0.8)  # of passkeys; all are further from the question than the window
BUDGETS = (15, 10, 8, 5, 3)  # full layers of 30, in rounds
COMPARED = (15, 8, 5, 3)
GROWN = (5, 8)  # from so many layers to so many
ANSWER_SHARE = 0.3  # weight of the loss at the answers beside that of text, where layers are added
SLIDING, FULL, NOPE = LayerKind(True, WINDOW), LayerKind(True, None), LayerKind(False, None)
Full = tuple[int, ...]


class Bench:
    """A model's layers and rows of ids: `texts` of text first, then passkeys with their answers in place."""

    def __init__(self, model: Path, book: Path, texts: int, seed: int):
        plan = plan_conversion(str(model), "SF", sliding_window=WINDOW, model_class="granite_swa", sinks="auto")
        layers = open_conversion(plan, [SLIDING, FULL, NOPE], torch.device("cpu"))
        self.layers: Layers = replace(layers, values=sinks_of_windows(plan, layers, SLIDING))
        self.count, self.texts = len(plan.source.kinds), texts
        self.tokenizer = tokenizer = load_tokenizer(model)
        begin = framing(tokenizer)[0]
        ids = tokenizer(book.read_text("utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
        # Rows far from each other; each begins as the tokenizer begins a text.
        own, far = T - len(begin), len(ids) // (texts + 1)
        rows = [[*begin, *ids[i * far : i * far + own]] for i in range(1, texts + 1)]
        self.cases = cases = passkey_cases(tokenizer, T, depths=DEPTHS, per_depth=1, seed=seed)
        rows += [[*case.prompt_ids, *case.answer_ids] for case in cases]
        self.ids = torch.tensor(rows)  # [n,T]
        self.answers = [len(case.prompt_ids) for case in cases]

    @torch.no_grad()
    def measure(self, kinds: Sequence[tuple[LayerKind, ...]]) -> list[Row]:
        """The loss of each layout: on text beyond the first window, at the answers; and the share of passkeys found."""
        states = final_states(self.layers, self.ids, kinds)
        return [self._row(states[each]) for each in kinds]

    def _row(self, states: Tensor) -> Row:
        head, labels = self.layers.head, self.ids.roll(-1, 1)
        text, loss = states[: self.texts, WINDOW:-1].flatten(0, 1), []
        beyond = token_losses(text, head, labels[: self.texts, WINDOW:-1].flatten())
        found = 0
        for row, start in enumerate(self.answers, start=self.texts):
            scores = (states[row, start - 1 : -1] @ head.t()).log_softmax(-1)  # (tokens of the answer, V)
            label = labels[row, start - 1 : -1]
            loss.append(-scores.gather(-1, label[:, None]).mean())
            # Greedy decoding writes the answer exactly where every token of it is the most likely one.
            found += bool((scores.argmax(-1) == label).all())
        return {"text": float(beyond.mean()), "answer": float(sum(loss)) / len(loss), "found": found / len(loss)}


def layout(count: int, full: Full, kind: LayerKind = FULL) -> tuple[LayerKind, ...]:
    """Layers `full` are of `kind`, all others sliding."""
    return tuple(kind if i in full else SLIDING for i in range(count))


def measured(rows: Rows, part: str, bench: Bench, kinds: dict[str, tuple[LayerKind, ...]]) -> dict[str, Row]:
    """The rows of layouts by name. Those that are not in the file are measured together."""
    have = {row["arm"]: row for row in rows.rows if row["part"] == part}
    missing = {name: each for name, each in kinds.items() if name not in have}
    if missing:
        for name, row in zip(missing, bench.measure(list(missing.values())), strict=True):
            rows.once(part, name, 0, lambda row=row: row)
    return {row["arm"]: row for row in rows.rows if row["part"] == part and row["arm"] in kinds}


def alone(rows: Rows, bench: Bench, part: str, kind: LayerKind) -> None:
    """Each layer by itself as `kind`, all others as in the source."""
    every = range(bench.count)
    kinds = {str(i): tuple(kind if i == j else FULL for j in every) for i in every}
    measured(rows, part, bench, {"source": (FULL,) * bench.count} | kinds)


def in_rounds(rows: Rows, bench: Bench) -> dict[int, Full]:
    """The full layers at each budget: in each round the layers whose window costs the passkeys least leave."""
    full, chosen = tuple(range(bench.count)), {}
    for budget in BUDGETS:
        # What the window of each remaining full layer costs, in the layout of this round.
        without = {i: layout(bench.count, tuple(j for j in full if j != i)) for i in full}
        part = "window alone" if len(full) == bench.count else f"without, {_text(full)}"
        cost = measured(rows, part, bench, {str(i): kinds for i, kinds in without.items()})
        kept = sorted(full, key=lambda i: cost[str(i)]["answer"], reverse=True)[:budget]
        chosen[budget] = full = tuple(sorted(kept))
    return chosen


def grown(rows: Rows, bench: Bench, start: Full) -> dict[int, Full]:
    """The full layers `start` and those that reduce the loss of text and passkeys most, one after the other."""
    full = start
    while len(full) < GROWN[1]:
        others = [i for i in range(bench.count) if i not in full]
        kinds = {str(i): layout(bench.count, (*full, i)) for i in others}
        cost = measured(rows, f"with, {_text(full)}", bench, kinds)
        best = min(others, key=lambda i: cost[str(i)]["text"] + ANSWER_SHARE * cost[str(i)]["answer"])
        full = tuple(sorted((*full, best)))
    return {len(full): full}


def at_once(rows: Rows, count: int) -> dict[int, Full]:
    """The full layers at each budget by the first round alone: those whose own window costs the passkeys most."""
    cost = {int(row["arm"]): row for row in rows.rows if row["part"] == "window alone" and row["arm"] != "source"}
    order = sorted(range(count), key=lambda i: cost[i]["answer"], reverse=True)
    return {budget: tuple(sorted(order[:budget])) for budget in BUDGETS}


def by_heads(rows: Rows, bench: Bench) -> dict[int, Full]:
    """The full layers at each budget whose heads attend most to the answers of the passkeys, summed over the heads."""

    def scores() -> Row:
        needles, answers = torch.zeros(2, *bench.ids.shape, dtype=torch.bool)
        for row, case in enumerate(bench.cases, start=bench.texts):
            answers[row, len(case.prompt_ids) - 1 : -1] = True
            needles[row, list(key_places(bench.tokenizer, case))] = True
        found = head_scores(bench.layers, Samples(bench.ids, bench.texts, answers, needles))
        assert found is not None
        return {str(i): float(score) for i, score in enumerate(found.sum(1))}

    rows.once("retrieval heads, summed by layer", "source", 0, scores)
    (row,) = rows.of("retrieval heads, summed by layer")["source"]
    order = sorted(range(bench.count), key=lambda i: -row[str(i)])
    return {budget: tuple(sorted(order[:budget])) for budget in BUDGETS}


def evenly(count: int, budget: int) -> Full:
    """Full layers at equal distances; the last layer of each stretch, as in SF and SSSF."""
    return tuple(round((i + 1) * count / budget) - 1 for i in range(budget))


def compare(rows: Rows, bench: Bench, choices: dict[str, dict[int, Full]], letter: str, kind: LayerKind) -> None:
    """Every choice at every budget, on other text and other passkeys."""
    measured(rows, "compared", bench, {"source": (FULL,) * bench.count, "no full layer": (SLIDING,) * bench.count})
    for budget in COMPARED:
        kinds = {
            f"{budget} {letter}, {name}: {_text(chosen[budget])}": layout(bench.count, chosen[budget], kind)
            for name, chosen in choices.items()
            if budget in chosen
        }
        measured(rows, "compared", bench, kinds)


def _text(full: Full) -> str:
    return ",".join(map(str, full))


def report(rows: Rows, model: Path) -> str:
    """Markdown: the choices, then each layer alone."""
    lines = [
        f"{model.name}, windows of {WINDOW} tokens with fitted sinks, rows of {T:,} tokens, untrained. {machine()}.",
        "",
        "`python benchmarks/layer_choice.py MODEL BOOKS`",
        "",
        f"Nats a token on {COMPARED_ON} beyond the first window, and at the answers of passkeys; passkeys found:",
        "",
    ]
    compared = [row for row in rows.rows if row["part"] == "compared"]
    sets = [[row["arm"], f"{row['text']:.3f}", f"{row['answer']:.2f}", f"{row['found']:.0%}"] for row in compared]
    lines += table(["full layers", "text", "answers", "passkeys found"], sets)
    heads = ["layer", "retrieval heads, summed"]
    scores = {row["arm"]: row for row in rows.rows if row["part"].startswith("retrieval heads")}["source"]
    own = []
    for part in ("window alone", "NoPE alone"):
        if found := {row["arm"]: row for row in rows.rows if row["part"] == part}:
            own.append(found)
            heads += [f"{part}: text", "answers"]
    layers = []
    for i in (name for name in scores if name.isdigit()):
        cells = [i, f"{scores[i]:.2f}"]
        for found in own:
            cells += [
                f"{found[i][key] - found['source'][key]:+.3f}" if i in found else "" for key in ("text", "answer")
            ]
        layers.append(cells)
    lines += [
        "",
        f"Each layer in the source, and alone changed, above the source ({CHOSEN_ON}):",
        "",
        *table(heads, layers),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("books", type=Path)
    parser.add_argument("--search", action="store_true", help="compare the choices of two searches as well")
    parser.add_argument("--texts", type=int, default=2, help="rows of text in a measurement")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    console.quiet_libraries()
    rows = Rows(given.out / "layer-choice-cpu.jsonl")
    bench = Bench(given.model, given.books / CHOSEN_ON, given.texts, seed=1)
    choices = {"even": {budget: evenly(bench.count, budget) for budget in BUDGETS}, "heads": by_heads(rows, bench)}
    if given.search:
        alone(rows, bench, "window alone", SLIDING)
        choices["retrieval, in rounds"] = in_rounds(rows, bench)
        choices["grown"] = grown(rows, bench, choices["retrieval, in rounds"][GROWN[0]])
        choices["retrieval, at once"] = at_once(rows, bench.count)
    rng = random.Random(0)
    choices["drawn"] = {budget: tuple(sorted(rng.sample(range(bench.count), budget))) for budget in BUDGETS}
    other = Bench(given.model, given.books / COMPARED_ON, given.texts, seed=2)
    for letter, kind in (("F", FULL), ("N", NOPE)):
        compare(rows, other, choices, letter, kind)
    if given.search:
        alone(rows, bench, "NoPE alone", NOPE)
    text = report(rows, given.model)
    (given.out / "layer-choice-cpu.md").write_text(text, "utf-8")
    print(text)


if __name__ == "__main__":
    main()
