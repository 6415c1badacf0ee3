"""The RoPE doctor: each layer's intended positions, its measured ones, their history, and the lengths they support.

Rotations are measured, not read from the config. In a text that repeats one token, every layer's state is the same at
every position (attention over equal values returns that value). So a query differs from the one at the start only by
its rotation, and the angle between the two, divided by the distance, is the frequency. A layer without RoPE does not
turn. This measures what the attention receives, whatever config.json says.

D head dim; its dimensions i and i + D/2 turn together.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ctxext.config import manifest as manifests
from ctxext.config.manifest import Manifest
from ctxext.errors import ModelError
from ctxext.model.frequencies import inverse_frequencies
from ctxext.model.load import causal_lm, hidden_states
from ctxext.model.positions import original_theta
from ctxext.model.source import ModelSource, from_directory, read_config
from ctxext.probes.probe_finding import Curve, Curves, ProbeFinding, Table
from ctxext.probes.probe_spec import Positions
from ctxext.probes.subject import Subject
from ctxext.progress import CountProgress

TOKENS = 256  # of the text; positions far from the start distinguish slow rotations from none
BY_LENGTH = ("dynamic", "longrope")  # rotations that change where a text is longer than the original length
MOST_TOKENS = 32_768  # limit of a text for these
SURE = math.pi / 2  # radians: a frequency is measured where its intended angle is at most this, so it is unambiguous
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}  # relative, of a frequency


def measure(subject: Subject, spec: Positions, progress: CountProgress) -> ProbeFinding:
    """Measures all layers' rotations and returns a table of layers, one of the model's history, and a picture.

    The picture shows the frequencies as wavelengths.
    """
    source = subject.source
    rope, config = source.config.rope, source.config
    half = config.shape.head_dim // 2
    plain = [original_theta(config) ** (-i / half) for i in range(half)] if rope else []
    tokens = _tokens(source, rope)
    # dynamic and longrope frequencies depend on the length of the text, so compute them for the measured length.
    meant, scale = (
        inverse_frequencies(rope, config.shape.head_dim, config.max_position_embeddings, tokens) if rope else ([], 1.0)
    )
    realised = _realised(subject, meant or [1.0] * half, tokens)
    progress(1, 1)
    layers = [_layer(source, index, realised[index], meant, plain) for index in range(len(source.kinds))]
    steps = history(source)
    notes = _notes(source, layers, subject.dtype)
    if rope.get("rope_type") in BY_LENGTH:
        notes += (f"{rope['rope_type']} depends on the length of the text: intended and measured at {tokens:,} tokens",)
    facts: dict[str, Any] = {
        "rope": {key: value for key, value in rope.items() if value is not None},
        "original_length": source.original_length,
        "usable_length": source.usable_length,
        "measured_tokens": tokens,
        "attention_scale": {"meant": scale, "built": _built_scale(subject)},
        "intended": meant,
        "layers": layers,
        "history": steps,
    }
    return ProbeFinding(
        facts, _pictures(source, realised, meant, plain), (_layers_table(layers), _history_table(steps)), notes
    )


def _tokens(source: ModelSource, rope: dict[str, Any]) -> int:
    """Returns the text's length: long enough that rotations which change with the length have changed."""
    if rope.get("rope_type") not in BY_LENGTH:
        return TOKENS
    original = rope.get("original_max_position_embeddings") or source.config.max_position_embeddings
    return max(TOKENS, min(source.usable_length, 2 * original, MOST_TOKENS))


def _realised(subject: Subject, meant: list[float], tokens: int) -> Tensor:
    """Returns fp64 [L, D/2]: the angle per token by which each layer's queries turn, in a text of `tokens` tokens.

    The queries are taken as the attention receives them.
    """
    found: dict[int, Tensor] = {}
    # One position for each frequency: far enough to turn visibly, near enough that the angle does not wrap around.
    places = torch.tensor([max(1, min(TOKENS - 1, int(SURE / f))) for f in meant])  # [D/2]

    def watch(module: nn.Module, query: Tensor, *_: Any) -> None:
        q = query[0, :, :TOKENS].double().cpu()  # [H,TOKENS,D]
        half = q.shape[-1] // 2
        z = torch.complex(q[..., :half], q[..., half:])  # [H,TOKENS,D/2]
        turned = z[:, places, torch.arange(half)] * z[:, 0].conj()  # [H,D/2]
        # All heads turn by the same angle. The sum weights long vectors more, whose angles have less rounding error.
        found[int(module.layer_idx)] = turned.sum(0).angle() / places

    token = torch.full((1, tokens), _plain_token(subject), device=subject.loaded.device)
    with torch.no_grad():
        hidden_states(subject.loaded.model, token, watch=watch)
    return torch.stack([found[layer] for layer in range(len(subject.kinds))])


def _plain_token(subject: Subject) -> int:
    """Returns an ordinary token, that of the letter e."""
    ids = subject.loaded.tokenizer.encode("e", add_special_tokens=False)
    return int(ids[-1])


def _built_scale(subject: Subject) -> float:
    """Returns the factor of the built model on cos and sin."""
    rotary = getattr(causal_lm(subject.loaded.model).get_decoder(), "rotary_emb", None)
    named = [name for name in vars(rotary) if name.endswith("attention_scaling")] if rotary is not None else []
    return float(getattr(rotary, named[0])) if named else 1.0


def _layer(source: ModelSource, index: int, realised: Tensor, meant: list[float], plain: list[float]) -> dict[str, Any]:
    """Returns the facts of one layer; lengths in tokens."""
    kind = source.kinds[index]
    wanted = meant if kind.use_rope else [0.0] * len(realised)
    # Relative differences; absolute (radians a token) where no rotation is intended.
    apart = [abs(got - want) / (want or 1.0) for got, want in zip(realised.tolist(), wanted, strict=True)]
    stretch = [p / m for p, m in zip(plain, meant, strict=True)] if kind.use_rope else []
    return {
        "layer": index,
        "kind": kind.letter,
        "sees": kind.sliding_window,
        "realised": realised.tolist(),
        "apart": max(apart),
        "longest_wavelength": 2 * math.pi / min(meant) if kind.use_rope else None,
        "stretched": [min(stretch), max(stretch)] if stretch else None,
        "bears": _supported_length(source, index),  # earlier versions wrote this key
    }


def _supported_length(source: ModelSource, index: int) -> int | None:
    """Returns the tokens of text up to which the layer's positions are as trained; None: positions set no limit."""
    kind = source.kinds[index]
    if not kind.use_rope:
        return None
    # A window within the original length never shows the layer a distance that it was not trained on.
    within = kind.sliding_window is not None and kind.sliding_window <= (source.original_length or 0)
    return None if within else source.usable_length


def history(source: ModelSource) -> list[dict[str, Any]]:
    """Returns how the model was made, oldest step first: every output of ctxext among its parents that still exists."""
    steps: list[dict[str, Any]] = []
    path, manifest = source.path, source.manifest
    seen: set[Path] = set()
    # Follow the first parent that is not seen yet; `seen` also ends a cycle of paths.
    while path is not None and path not in seen:
        seen.add(path)
        steps.append(_step(path, manifest))
        parents = [Path(entry["path"]) for entry in manifest.parents.values() if entry.get("path")] if manifest else []
        path = next((parent for parent in parents if parent not in seen), None)
        manifest = None
        if path is not None and not path.is_dir():
            steps.append({"path": _shown(path), "made_by": "missing"})
            break
        if path is not None:
            try:
                manifest = manifests.read(path)
            except ModelError:
                steps.append({"path": _shown(path), "made_by": "its ctxext.json is damaged"})
                break
    return steps[::-1]


def _step(path: Path, manifest: Manifest | None) -> dict[str, Any]:
    """Returns one output: what made it, and its layers and positions."""
    try:
        source = from_directory(path, weights=False)
        read_config(path)
    except ModelError as error:
        return {"path": _shown(path), "made_by": manifest.kind if manifest else "unknown", "fault": str(error)}
    rope = source.config.rope
    spec = manifest.spec if manifest else {}
    return {
        "path": _shown(path),
        "made_by": manifest.kind if manifest else "not by ctxext",
        "layers": "".join(kind.letter for kind in source.kinds),
        "rope": rope.get("rope_type", "default") if rope else None,
        "factor": rope.get("factor") if rope else None,
        "theta": rope.get("rope_theta") if rope else None,
        "trained_at": spec.get("ctx") if isinstance(spec.get("ctx"), int) else None,
        "usable_length": source.usable_length,
        "original_length": source.original_length,
    }


def _shown(path: Path) -> str:
    """Returns a path for display: as given, or resolved if it contains `..`.

    `..` is not removed textually, because it may follow a link.
    """
    return str(path.resolve() if ".." in path.parts else path)


def _notes(source: ModelSource, layers: list[dict[str, Any]], dtype: str) -> tuple[str, ...]:
    """Returns the doctor's findings as lines."""
    notes, original, rope = [], source.original_length, source.config.rope
    wrong = [str(one["layer"]) for one in layers if one["apart"] > TOLERANCE[dtype]]
    if wrong:
        notes.append(f"layers {', '.join(wrong)} rotate by other angles than those of config.json: see `apart`")
    if original is None:
        notes.append("RoPE is scaled and the original length is not stored: give --original-length to extend further")
    # A longer usable length without rescaled positions: nothing but training beyond the original length supports it.
    full = [one for one in layers if one["kind"] == "F"]
    plain = rope.get("rope_type") == "default" and rope["rope_theta"] == original_theta(source.config)
    if full and original and source.usable_length > original and plain:
        notes.append(
            f"config.json gives a usable length of {source.usable_length:,}; the RoPE of the full layers is that "
            f"of the original length {original:,}, so only training at longer contexts can support it"
        )
    # Sliding layers whose window is within the original length do not need stretched positions.
    small = [one for one in layers if one["kind"] == "S" and one["bears"] is None and one["stretched"][1] > 1.001]
    if small:
        notes.append(
            f"{len(small)} sliding layers do not see beyond their training distances, but their RoPE is stretched "
            f"up to {max(one['stretched'][1] for one in small):g} times"
        )
    if any(one["kind"] == "N" for one in layers):
        notes.append(
            "N layers have no positions and so no length limit; measure with eval what they retrieve at a length"
        )
    return tuple(notes)


def _pictures(source: ModelSource, realised: Tensor, meant: list[float], plain: list[float]) -> tuple[Curves, ...]:
    if not meant:
        return ()
    places = tuple(float(i) for i in range(len(meant)))
    layers = [i for i, kind in enumerate(source.kinds) if kind.use_rope]
    mean = realised[layers].mean(0).tolist()
    lines = [
        Curve("as first trained", places, tuple(2 * math.pi / f for f in plain)),
        Curve("intended", places, tuple(2 * math.pi / f for f in meant)),
        Curve(
            "realised, mean of the layers with RoPE", places, tuple(2 * math.pi / f if f > 0 else None for f in mean)
        ),
    ]
    title = "Tokens of a full turn, by pair of dimensions"
    level, name = (float(source.original_length), "first trained at") if source.original_length else (None, "")
    return (
        Curves(
            "wavelengths", title, "pair of dimensions", "tokens", tuple(lines), log=True, level=level, level_name=name
        ),
    )


def _layers_table(layers: list[dict[str, Any]]) -> Table:
    rows = [
        (
            str(one["layer"]),
            one["kind"],
            "all" if one["sees"] is None else f"{one['sees']:,}",
            "none" if one["stretched"] is None else f"{one['stretched'][0]:.3g} to {one['stretched'][1]:.3g}",
            f"{one['apart']:.1e}",
            "no limit" if one["bears"] is None else f"{one['bears']:,}",
        )
        for one in layers
    ]
    caption = (
        "what a layer sees, how much its wavelengths were stretched, how far its measured rotations are from the "
        "intended (relative; without RoPE: radians a token), and the tokens its positions support"
    )
    return Table(caption, ("layer", "kind", "sees", "stretched", "apart", "supports"), tuple(rows))


def _history_table(steps: list[dict[str, Any]]) -> Table:
    def shown(value: Any) -> str:
        return (
            ""
            if value is None
            else f"{value:,}"
            if isinstance(value, int)
            else f"{value:g}"
            if isinstance(value, float)
            else str(value)
        )

    names = ("made_by", "layers", "rope", "factor", "theta", "trained_at", "usable_length", "path")
    rows = tuple(tuple(shown(step.get(name)) for name in names) for step in steps)
    header = ("made by", "layers", "RoPE", "factor", "theta", "trained at", "usable to", "path")
    return Table("how the model was made, first step first; lengths in tokens", header, rows)
