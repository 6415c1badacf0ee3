"""Optional packages: which are installed, and what to do where one is missing. Nothing heavy is imported.

`pip install ctxext` brings what convert, finetune on one device, eval, verify, merge, generate and export need. The
extras bring more: `train` (DeepSpeed, bitsandbytes), `data` (datasets of the hub, Parquet, .zst), `eval` (lm-eval, the
words of RULER's needles), `report` (pictures and reports), `all`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

from ctxext.errors import EnvironmentFault

EXTRAS = {"pyarrow": "data", "matplotlib": "report"}  # the extra that brings a package


def require(package: str, purpose: str) -> None:
    """Raises EnvironmentFault where `package` is not installed. `purpose` is what needs it, such as "a report"."""
    if find_spec(package) is None:
        raise EnvironmentFault(
            f"{purpose} needs the package {package}, which is not installed",
            hint=f'pip install "ctxext[{EXTRAS[package]}]"',
        )


def can_draw(say: Callable[[str], None], what: str) -> bool:
    """Returns whether pictures can be drawn; logs that `what` is left out where matplotlib is not installed."""
    if find_spec("matplotlib") is not None:
        return True
    say(f'{what} is not drawn: matplotlib is not installed (pip install "ctxext[report]")')
    return False
