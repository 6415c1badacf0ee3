"""What `convert --full-layers auto` chooses against the fixed patterns, and against every choice, before any healing.

    python benchmarks/full_layers.py                 # some fifteen minutes on one CPU thread; goes on where it stopped
    python benchmarks/full_layers.py --seeds 1 --out elsewhere

stories260K   calibrated on its own samples, one text a seed; measured on other samples of its own
tiny          calibrated on the training half of the embedded corpus; measured on the held-out files

At each window, with full layers without RoPE (N) and with it (F), for as many full layers as SN and SSSN have: loss on
text that the planner did not see, of its choice, of the fixed patterns and of the best of all choices.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import cache, partial
from itertools import combinations, product
from pathlib import Path

import torch
from arms import Row, Rows, machine, middle, own_samples, row_loss, table, text_loss
from retrofit import STORIES, TEMPERATURE

from ctxext.cli import console
from ctxext.model.convert import plan_conversion
from ctxext.model.hybrids import hybrid_config
from ctxext.model.layout import LayerKind
from ctxext.model.load import LoadedModel, load_model
from ctxext.model.relayout import relayout
from ctxext.retrofit.layers import fixed_choices, plan_request
from ctxext.retrofit.planner import choose_layers

LENGTH, WINDOWS = 512, (32, 64, 128)
CALIBRATION_TOKENS, HELD_OUT = 8192, 30_000


def losses(loaded: LoadedModel, letter: str, window: int, count: int, held_out: torch.Tensor | None) -> Row:
    """The loss of every choice of `count` full layers, by the choice as text."""
    found, L = Row(), len(loaded.kinds)
    for choice in combinations(range(L), count):
        kinds = [LayerKind(letter == "F", None) if i in choice else LayerKind(True, window) for i in range(L)]
        config = hybrid_config(loaded.source.config, kinds)
        other = LoadedModel(relayout(loaded.model, config), loaded.tokenizer, loaded.source, loaded.device)
        loss = (
            text_loss(other, LENGTH, HELD_OUT)[f"loss at {LENGTH:,}"] if held_out is None else row_loss(other, held_out)
        )
        found[",".join(map(str, choice))] = loss
    return found


def chosen(model: str, letter: str, window: int, count: int, calibration: str | None) -> str:
    """The planner's choice, as text."""
    plan = plan_conversion(model, f"S{letter}", sliding_window=window)
    request = plan_request(
        plan.source.shape, plan.source.kinds, plan.hybrid, plan.source.usable_length, budget=str(count), length=None,
        calibration=calibration, tokens=CALIBRATION_TOKENS, i_know=False,
    )  # fmt: skip
    return ",".join(map(str, choose_layers(plan, request).chosen.full))


def case(model: str, letter: str, window: int, count: int, calibration: str | None, of_all: Callable[[], Row]) -> Row:
    auto, found = chosen(model, letter, window, count, calibration), of_all()
    patterns = fixed_choices(len(load_model(model).kinds), count)
    fixed = {",".join(map(str, full)): name for name, full in reversed(patterns.items())}  # the first name stays
    best_fixed = min((choice for choice in fixed if choice in found), key=lambda choice: float(found[choice]))
    best = min(found, key=lambda choice: float(found[choice]))
    return {
        "auto": found[auto],
        "fixed": found[best_fixed],
        "best": found[best],
        "chose": auto,
        "best fixed": f"{fixed[best_fixed].replace('N', letter)} {best_fixed}",
        "best of all": best,
        "choices": len(found),
    }


def written_samples(model: str, tokens: int, seed: int, place: Path) -> str:
    """Text of the model's own, in a file for the planner: as one document, since stories260K never saw an EOS within
    a text and goes wrong after one (LOG.md)."""
    tokenizer = load_model(model).tokenizer
    rows = own_samples(model, tokens, LENGTH, seed, TEMPERATURE)
    place.mkdir(parents=True, exist_ok=True)
    path = place / f"samples-{seed}.txt"
    path.write_text("\n".join(tokenizer.decode(row, skip_special_tokens=True) for row in rows), "utf-8")
    return str(path)


def of_model(rows: Rows, name: str, model: str, calibrations: list[str | None], held_out: torch.Tensor | None) -> None:
    loaded = load_model(model)
    for letter, window, count in product("NF", WINDOWS, sorted({len(loaded.kinds) // 2, 1}, reverse=True)):
        of_all = cache(partial(losses, loaded, letter, window, count, held_out))
        for seed, calibration in enumerate(calibrations):
            measured = partial(case, model, letter, window, count, calibration, of_all)
            rows.once(name, f"{letter}, W = {window}, {count} full", seed, measured)


def report(rows: Rows) -> str:
    lines = [
        "Loss in nats a token before healing, on text the planner did not see; medians over the calibration texts.",
        f"{machine()}.",
    ]
    for part in dict.fromkeys(row["part"] for row in rows.rows):
        made, won, of_fixed = [], 0, 0
        for arm, found in rows.of(part).items():
            numbers = [middle(found, key) for key in ("auto", "fixed", "best")]
            won += sum(row["auto"] <= row["best"] for row in found)
            of_fixed += sum(row["auto"] <= row["fixed"] for row in found)
            chose = "; ".join(dict.fromkeys(row["chose"] for row in found))
            told = [chose, found[0]["best fixed"], found[0]["best of all"], str(found[0]["choices"])]
            made.append([arm, *(f"{x:.4f}" for x in numbers if x is not None), *told])
        count = sum(map(len, rows.of(part).values()))
        heads = ["layout", "auto", "best fixed", "best of all", "auto chose", "fixed is", "best is", "of"]
        lines += ["", f"## {part}", "", *table(heads, made), ""]
        lines += [f"auto is at most the best fixed in {of_fixed} of {count}, the best of all in {won}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark-full-layers"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console.quiet_libraries()
    rows = Rows(options.out / "full-layers-cpu.jsonl")
    of_model(rows, "tiny", "tiny", [None], None)
    if STORIES.is_dir():
        write = partial(written_samples, str(STORIES), 4 * CALIBRATION_TOKENS, place=options.work)
        held_out = own_samples(str(STORIES), HELD_OUT, LENGTH, 77, TEMPERATURE)
        of_model(rows, "stories260K", str(STORIES), [write(seed=seed) for seed in range(options.seeds)], held_out)
    else:
        console.say(f"stories260K is left out: {STORIES} is absent")
    text = report(rows)
    (options.out / "full-layers-cpu.md").write_text(text, "utf-8")
    print(text)


if __name__ == "__main__":
    main()
