"""Names for shell completion: presets, suites, probes (ctxext --install-completion)."""

from __future__ import annotations

from collections.abc import Callable


def of(*kinds: str) -> Callable[[str], list[str]]:
    """Returns a completer of preset names of one kind; of KIND/NAME for several kinds, and for all (no kind given)."""

    def complete(incomplete: str) -> list[str]:
        from ctxext.config import presets

        named = [(kind, name) for kind in kinds or presets.KINDS for name in presets.names(kind)]
        known = [name if len(kinds) == 1 else f"{kind}/{name}" for kind, name in named]
        return [name for name in known if name.startswith(incomplete)]

    return complete


def suites(incomplete: str) -> list[str]:
    """Completes suites of `ctxext eval` and its presets; after a comma, the next suite."""
    from ctxext.config import presets
    from ctxext.evals.eval_spec import SUITES

    before, comma, last = incomplete.rpartition(",")
    known = list(SUITES) if comma else [*SUITES, *presets.names("eval")]
    return [f"{before}{comma}{name}" for name in known if name.startswith(last)]


def probes(incomplete: str) -> list[str]:
    """Completes the name of a probe."""
    from ctxext.probes.probe_spec import PROBES

    return [name for name in ("all", *PROBES) if name.startswith(incomplete)]


COMPLETERS: dict[str, Callable[[str], list[str]]] = {"suites": suites, "probes": probes}  # by Option.complete
