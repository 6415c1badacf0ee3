"""Prints the lines of code of every file against the budget: package 21,000, file 350, function 60, training loop 90.

Docstrings, comments and blank lines are not counted, so that nobody saves on them. A line that is over budget is
marked; nothing fails here (tests/test_floors.py does).
"""

from __future__ import annotations

import ast
import textwrap
from pathlib import Path

PACKAGE, FILE, FUNCTION, LOOP = 21_000, 350, 60, 90


def code_lines(text: str, tree: ast.Module) -> int:
    """Lines that hold code: neither blank, nor comments, nor docstrings."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    prose: set[int] = set()
    for node in ast.walk(tree):
        first = node.body[0] if isinstance(node, documented) and node.body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            prose |= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    lines = enumerate(text.splitlines(), start=1)
    return sum(1 for n, line in lines if n not in prose and line.strip() and not line.lstrip().startswith("#"))


def longest_function(text: str, tree: ast.Module) -> tuple[int, str]:
    """Lines of code and name of the longest function, decorators not counted."""
    lines, longest = text.splitlines(), (0, "")
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            own = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
            longest = max(longest, (code_lines(own, ast.parse(own)), node.name))
    return longest


def main() -> None:
    root = Path(__file__).parent.parent
    total = 0
    print(f"{'lines':>6}  {'longest function':<32}  file")
    for path in sorted((root / "ctxext").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        lines = code_lines(text, tree)
        total += lines
        length, name = longest_function(text, tree)
        budget = LOOP if path.parts[-2:] == ("train", "loop.py") else FUNCTION
        over = ["file"] * (lines >= FILE) + ["function"] * (length >= budget)
        mark = f"  over: {', '.join(over)}" if over else ""
        print(f"{lines:>6}  {f'{length:>4} {name}':<32}  {path.relative_to(root)}{mark}")
    print(f"{total:>6}  of {PACKAGE:,}{'  over' if total > PACKAGE else ''}")


if __name__ == "__main__":
    main()
