"""Writes docs/models.md: what works for which model, from the zoo of tests/zoo and its recorded outcomes.

`make docs` runs it. With `--measure` every checkpoint goes through every station first (minutes), and the outcomes are
written to tests/zoo/outcomes.json. tests/zoo/test_zoo.py holds both files.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.zoo.known import KNOWN  # noqa: E402
from tests.zoo.models import ZOO  # noqa: E402

PAGE, RECORDS = ROOT / "docs" / "models.md", ROOT / "tests" / "zoo" / "outcomes.json"
COLUMNS = {
    "`doctor`, `plan`": ("doctor", "plan"),
    "`convert`": ("convert", "retrofit"),
    "`eval`, `verify`": ("logits", "eval", "verify"),
    "`finetune`, `merge`": ("finetune", "merge"),
    "`export`": ("export",),
    "ids": ("ids", "ids after convert"),
}
FAULT = "fault: "
HEAD = """# Which models work

Made by `make docs` from tests/zoo, where thirty-six checkpoints that people bring are written down as facts: their
config.json with its own spelling, the kind of their tokenizer, special tokens, the features of their chat template.
Widths, depth, windows and vocabulary are scaled down, and the weights are random. Each goes through every command. Its
logits and token ids are compared with stock transformers' after each. **ids**: text and conversations become the ids
that tokenizer.json gives, before and after a conversion.

*yes*: the result is transformers'. *no*: the command refuses and says why. *fault*: the result differs, and that is a
known fault.
"""
SOURCES = """
## Where the facts come from

"Not found, from memory" means that no public copy of the file was at hand: such a fact may be wrong in detail.
"""


def page() -> str:
    """The text of docs/models.md."""
    records = json.loads(RECORDS.read_text("utf-8"))
    lines = [HEAD, f"| model | type | {' | '.join(COLUMNS)} | remark |", "|---" * (len(COLUMNS) + 3) + "|"]
    for slug, row in ZOO.items():
        cells = [cell([records[slug][station] for station in stations]) for stations in COLUMNS.values()]
        if cells[-1] == "no" and records[slug]["ids"] == "yes":  # there is no conversion whose ids could be wrong
            cells[-1] = "yes"
        lines.append(f"| {row.name} | {row.model_type} | {' | '.join(cells)} | {remark(records[slug])} |")
    return "\n".join([*lines, SOURCES, *(f"- {row.name}: {row.source}." for row in ZOO.values())]) + "\n"


def cell(outcomes: list[str]) -> str:
    """One word for the stations of a column."""
    if any(one.startswith(FAULT) for one in outcomes):
        return "fault"
    return "yes" if set(outcomes) == {"yes"} else "no"


def remark(outcomes: dict[str, str]) -> str:
    """The reasons of a row, each once."""
    reasons = [one.partition(": ")[2] for one in outcomes.values() if one != "yes"]
    return ". ".join(dict.fromkeys(reasons))


def measure(slugs: Collection[str]) -> dict[str, dict[str, str]]:
    """The outcome of every station for each of these checkpoints. A wrong result that is not in KNOWN ends it."""
    from tests.zoo.stations import STATIONS, YES, Subject, outcome

    found: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as place:
        os.environ["XDG_CACHE_HOME"] = str(Path(place) / "cache")
        for slug in slugs:
            row = ZOO[slug]
            subject = Subject(row, Path(place) / slug)
            found[slug] = {}
            for station in STATIONS:
                try:
                    found[slug][station] = outcome(station, subject)
                except AssertionError:
                    if (slug, station) not in KNOWN:
                        raise
                    found[slug][station] = FAULT + KNOWN[slug, station]
                print(f"{slug}, {station}: {found[slug][station]}", file=sys.stderr)
                if found[slug][station] == YES and (slug, station) in KNOWN:
                    print(f"{slug}, {station}: no fault any more: remove it from tests/zoo/known.py", file=sys.stderr)
    return found


def main() -> None:
    if "--measure" in sys.argv[1:]:
        # Checkpoints named after --measure are measured alone; the records of the others stay.
        named = sys.argv[sys.argv.index("--measure") + 1 :]
        records = json.loads(RECORDS.read_text("utf-8")) | measure(named or ZOO)
        RECORDS.write_text(json.dumps(records, indent=1, ensure_ascii=False) + "\n", "utf-8")
    PAGE.write_text(page(), "utf-8")


if __name__ == "__main__":
    main()
