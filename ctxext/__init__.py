"""ctxext extends the context of pretrained causal LMs. The commands are available as functions (see ctxext/api.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ctxext.api import (
        chat,
        convert,
        evaluate,
        export_model,
        finetune,
        generate,
        merge,
        plan,
        probe,
        verify,
        write_report,
    )

__version__ = "0.1.0"
__all__ = ["__version__", "chat", "convert", "evaluate", "export_model", "finetune", "generate", "merge", "plan",
           "probe", "verify", "write_report"]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Imports a function on first access, so that `ctxext --help` imports none of them."""
    if name not in __all__:
        raise AttributeError(f"module 'ctxext' has no attribute {name!r}")
    from ctxext import api

    return getattr(api, name)
