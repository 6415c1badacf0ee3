"""Prints the lines of every file against the budget: package 7,000, file 400, function 60, training loop 120.

A line that is over budget is marked; nothing fails here (tests/test_floors.py does).
"""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE, FILE, FUNCTION, LOOP = 7_000, 400, 60, 120


def longest_function(tree: ast.Module) -> tuple[int, str]:
    """Lines and name of the longest function, decorators not counted."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = [((node.end_lineno or node.lineno) - node.lineno + 1, node.name) for node in functions]
    return max(lengths, default=(0, ""))


def main() -> None:
    root = Path(__file__).parent.parent
    total = 0
    print(f"{'lines':>6}  {'longest function':<32}  file")
    for path in sorted((root / "ctxext").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        lines = len(text.splitlines())
        total += lines
        length, name = longest_function(ast.parse(text))
        budget = LOOP if path.parts[-2:] == ("train", "loop.py") else FUNCTION
        over = ["file"] * (lines >= FILE) + ["function"] * (length >= budget)
        mark = f"  over: {', '.join(over)}" if over else ""
        print(f"{lines:>6}  {f'{length:>4} {name}':<32}  {path.relative_to(root)}{mark}")
    print(f"{total:>6}  of {PACKAGE:,}{'  over' if total > PACKAGE else ''}")


if __name__ == "__main__":
    main()
