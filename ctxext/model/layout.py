"""The layer layout of a model: for each layer RoPE or no RoPE, and full attention or a sliding window.

    S   RoPE + sliding window        N   no positional encoding (NoPE) + full        F   RoPE + full

A `layer_pattern` repeats over the layers from layer 0 and is cut at the last layer. The alternation of sliding layers
and full layers without RoPE is "SWA-128-NoPE" of "Rethinking the Role of Efficient Attention in Hybrid Architectures"
(arXiv 2606.15378, abstract). The abstract does not state which of the two comes first; S at layer 0 is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ctxext.config import presets
from ctxext.config.loader import build, spec
from ctxext.errors import InputError, SpecError

LETTERS = "SNF"


@dataclass(frozen=True)
class LayerKind:
    """One layer's attention. `sliding_window` W: a query sees W keys, itself included; None is full attention."""

    use_rope: bool
    sliding_window: int | None

    @property
    def letter(self) -> str:
        """Returns the letter of this kind in a layout: S, s, N or F."""
        if self.sliding_window is not None:
            return "S" if self.use_rope else "s"  # "s": a sliding layer without RoPE; only in models made elsewhere
        return "F" if self.use_rope else "N"


@spec
class HybridSpec:
    """A layout preset: letters that repeat over the layers, and the window of the S layers in tokens."""

    layer_pattern: str
    sliding_window: int | None = None

    def __post_init__(self) -> None:
        wrong = sorted(set(self.layer_pattern) - set(LETTERS))
        if wrong or not self.layer_pattern:
            raise ValueError(
                f"layer_pattern {self.layer_pattern!r}: letters are S (RoPE + sliding window), "
                "N (NoPE + full attention), F (RoPE + full attention)"
            )
        if "S" in self.layer_pattern and (self.sliding_window is None or self.sliding_window < 1):
            raise ValueError(
                f"layer_pattern {self.layer_pattern!r} has sliding layers: sliding_window must be 1 or more, "
                f"not {self.sliding_window}"
            )

    @property
    def full_letter(self) -> str:
        """The letter of the layers listed in `--full-layers`: the pattern's only letter other than S.

        Raises InputError where the pattern does not have S and exactly one other letter.
        """
        letters = set(self.layer_pattern) - {"S"}
        if len(letters) != 1 or "S" not in self.layer_pattern:
            raise InputError(
                f"--full-layers needs a layout with S and exactly one of N and F, not {self.layer_pattern!r}",
                hint="use a preset such as swa128-nope (S and N) or swa128 (S and F)",
            )
        return letters.pop()


def find_hybrid(name: str, sliding_window: int | None = None) -> HybridSpec:
    """Returns a layout by preset name, YAML path or pattern (`SSSN`). `sliding_window` replaces the preset's window.

    Raises InputError for an unknown name, for a window without sliding layers, and for sliding layers without a window.
    """
    # A name that consists of the letters S, N and F only is a pattern, never a preset.
    if name and set(name) <= set(LETTERS):
        data: dict[str, object] = {"layer_pattern": name}
    else:
        data = dict(_preset(name).data)
    if sliding_window is not None:
        data["sliding_window"] = sliding_window
    if sliding_window is not None and "S" not in str(data.get("layer_pattern", "S")):
        raise InputError(f"--sliding-window {sliding_window}: layout {name!r} has no sliding layers")
    if "S" in str(data.get("layer_pattern", "")) and data.get("sliding_window") is None:
        raise InputError(
            f"layout {name!r} has sliding layers but no window",
            hint=f"give a preset or a YAML file with a window, or with convert: --hybrid {name} --sliding-window 128",
        )
    return build(HybridSpec, data, source=f"hybrid {name}")


def _preset(name: str) -> presets.Preset:
    """Returns the preset. For an unknown name of letters only, the error also says why it is not a pattern."""
    try:
        return presets.find("hybrid", name)
    except SpecError:
        raise
    except InputError as error:
        if not name.isalpha():
            raise
        wrong = next(letter for letter in name if letter not in LETTERS)
        capital = f"did you mean {name.upper()}?" if set(name.upper()) <= set(LETTERS) else None
        raise InputError(
            f"{error.message}; a pattern has the capital letters S, N and F only, not {wrong!r}",
            hint=capital or error.hint or "S is RoPE + sliding window, N is NoPE + full, F is RoPE + full",
        ) from None


def layer_kinds(hybrid: HybridSpec, num_layers: int, full_layers: str | None = None) -> tuple[LayerKind, ...]:
    """Returns the layout of a model of `num_layers` layers.

    `full_layers` is `odd`, `even`, `last` or a list such as `3,7,11` (layers counted from 0). These layers get the
    pattern's full letter and all others get S. Raises InputError for a layer that does not exist.
    """
    if full_layers is None:
        letters = [hybrid.layer_pattern[i % len(hybrid.layer_pattern)] for i in range(num_layers)]
    else:
        full = _full_layers(full_layers, num_layers)
        letters = [hybrid.full_letter if i in full else "S" for i in range(num_layers)]
    window = hybrid.sliding_window
    kinds = {"S": LayerKind(True, window), "N": LayerKind(False, None), "F": LayerKind(True, None)}
    return tuple(kinds[letter] for letter in letters)


def _full_layers(text: str, num_layers: int) -> set[int]:
    named = {"odd": range(1, num_layers, 2), "even": range(0, num_layers, 2), "last": [num_layers - 1]}
    if text in named:
        return set(named[text])
    try:
        layers = {int(part) for part in text.split(",")}
    except ValueError:
        raise InputError(
            f"--full-layers {text!r}: allowed are auto, retrieval, odd, even, last, or layers from 0 such as 3,7,11"
        ) from None
    wrong = sorted(i for i in layers if not 0 <= i < num_layers)
    if wrong:
        raise InputError(
            f"--full-layers {text}: no layer {wrong[0]} in a model of {num_layers} layers (0 to {num_layers - 1})"
        )
    return layers


def pattern_text(kinds: Sequence[LayerKind]) -> str:
    """Returns the layout as text, one letter per layer, and the windows in use: `SNSNSN, window 128`."""
    letters = "".join(kind.letter for kind in kinds)
    if len(set(letters)) == 1 and len(letters) > 8:
        letters = f"{len(letters)} x {letters[0]}"
    windows = sorted({kind.sliding_window for kind in kinds if kind.sliding_window is not None})
    return letters + (f", window {', '.join(map(str, windows))}" if windows else "")


def layout_facts(kinds: Sequence[LayerKind]) -> dict[str, object]:
    """Returns a layout in the form of a manifest: one letter per layer, and the one window of the sliding layers."""
    windows = [kind.sliding_window for kind in kinds if kind.sliding_window is not None]
    return {"layers": "".join(kind.letter for kind in kinds), "sliding_window": max(windows, default=None)}


def kinds_of(facts: Mapping[str, Any]) -> tuple[LayerKind, ...]:
    """Returns the layout that `layout_facts` describes."""
    window = facts["sliding_window"]
    letters = {"S": LayerKind(True, window), "s": LayerKind(False, window)}
    letters |= {"N": LayerKind(False, None), "F": LayerKind(True, None)}
    return tuple(letters[letter] for letter in facts["layers"])
