"""Which programs honour a model's exact layout and positions: a fact for each target and class, with its sources.

Every fact comes from a stored public copy of the source (commit given), an issue or a documentation page, read in
2026-11. In addition, vLLM and llama.cpp were run on a CPU (benchmarks/runtimes.py); Ollama was not run. A feature that
could not be confirmed counts as not honoured. So does a feature that versions of the same year silently drop. No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from ctxext.errors import CheckFailed, InputError
from ctxext.export import spellings
from ctxext.model.config_fields import Fields
from ctxext.model.layout import LayerKind, pattern_text
from ctxext.model.model_config import ModelConfig

READ_DATE = "2026-11"
NOT_RUN = "this model itself was not run there: ctxext does not install or download the target"
COMPARED = "read in the named sources; models of this class were compared with transformers on a CPU"
CHECKED = {
    "hf": "loaded and compared with the source by the gate of every conversion",
    "vllm": f"{COMPARED} in vLLM 0.32.0; {NOT_RUN}",
    "gguf": f"{COMPARED} in the llama.cpp of llama-cpp-python 0.3.36; {NOT_RUN}",
    "ollama": "read in the named sources, not run: ctxext does not install or download the target",
}
TARGETS = ("hf", "vllm", "gguf", "ollama")
Kinds = tuple[LayerKind, ...]
Objection = tuple[str, str]  # what is not honoured; the nearest model that would be honoured
Rule = Callable[[ModelConfig, Kinds], list[Objection]]


@dataclass(frozen=True)
class Fact:
    """How a target runs a class of models.

    how       the class or program that runs it
    sources   where this fact and its rules come from
    rules     each returns what the target does not honour of a model
    run       whether the target was run on models of the class here; False: only its source was read
    """

    how: str
    sources: tuple[str, ...]
    rules: tuple[Rule, ...] = ()
    run: bool = True


@dataclass(frozen=True)
class Verdict:
    """The result of the check of one model for one target.

    `objections` is empty where the target honours the windows and the NoPE pattern exactly. `nearest` has the models
    that would be honoured instead.
    """

    target: str
    model_type: str
    layout: str
    objections: tuple[str, ...]
    nearest: tuple[str, ...]
    how: str
    sources: tuple[str, ...]
    checked: str
    not_checked: str

    @property
    def honoured(self) -> bool:
        return not self.objections

    def as_dict(self) -> dict[str, Any]:
        return {"honoured": self.honoured} | asdict(self)

    def refuse(self) -> None:
        """Raises CheckFailed where the target does not honour the model; the hint names the nearest honoured models."""
        if not self.honoured:
            lines = "\n".join(f"  {text}" for text in self.objections)
            raise CheckFailed(
                f"{self.target} does not support {self.model_type} {self.layout}\n{lines}",
                hint="supported would be: " + "; or ".join(self.nearest),
            )

    def rows(self) -> list[tuple[str, str]]:
        """Returns (name, value) rows for the screen."""
        rows = [("target", self.target), ("layout", f"{self.model_type}: {self.layout}")]
        rows += [("honoured", "yes, exactly" if self.honoured else "no"), ("how", self.how)]
        rows += [("not supported", text) for text in self.objections] + [("instead", text) for text in self.nearest]
        return [*rows, *(("source", text) for text in self.sources), (f"checked {self.checked}", self.not_checked)]


def verdict(target: str, config: ModelConfig, source: str = "SOURCE", raw: Fields | None = None) -> Verdict:
    """Checks whether `target` honours a config exactly.

    `source` is the command-line argument for the model that a conversion would start from. `raw` is the unchanged
    config.json, which the target reads. Raises InputError for an unknown target.
    """
    if target not in TARGETS:
        raise InputError(f"--target {target!r}: allowed are {', '.join(TARGETS)}")
    kinds = config.kinds
    fact = FACTS[target][config.family.name]
    found = [objection for rule in fact.rules for objection in rule(config, kinds)]
    found += [] if raw is None else spellings.objections(raw, target)
    # Several rules can give the same text: keep each text once, in order.
    objections, nearest = (tuple(dict.fromkeys(column)) for column in zip(*found, strict=True)) if found else ((), ())
    if UNCONVERTED in nearest:  # the target honours no layout of the converted class, FFFN included
        nearest = tuple(text for text in nearest if text != FFFN)
    nearest = tuple(text.replace("SOURCE", source) for text in nearest)
    layout = pattern_text(kinds)
    return Verdict(
        target,
        config.family.name,
        layout,
        objections,
        nearest,
        fact.how,
        fact.sources,
        READ_DATE,
        CHECKED[target] if fact.run else CHECKED["ollama"],
    )


def limits(kind: LayerKind, config: ModelConfig) -> bool:
    """Returns whether a layer's window hides any key at lengths that the model supports."""
    return kind.sliding_window is not None and kind.sliding_window < config.max_position_embeddings


def _layers(numbers: Sequence[int]) -> str:
    return f"layer{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def _windows(config: ModelConfig, kinds: Kinds, *, why: str, instead: str) -> list[Objection]:
    windowed = [i for i, kind in enumerate(kinds) if limits(kind, config)]
    letters, window = "".join(kind.letter for kind in kinds), max(kind.sliding_window or 0 for kind in kinds)
    here = instead.format(letters=letters, window=window)
    return [(f"the window of {_layers(windowed)}: {why}", here)] if windowed else []


def _every_fourth(config: ModelConfig, kinds: Kinds) -> list[Objection]:
    """llama.cpp's SmolLM3 always leaves out RoPE in layers 3, 7, 11, ..., and only there."""
    wrong = []
    for word, rope in (("would get RoPE", False), ("would lose it", True)):
        layers = [i for i, kind in enumerate(kinds) if kind.use_rope is rope and (i % 4 == 3) is rope]
        wrong += [f"{_layers(layers)} {word}"] if layers else []
    text = "the program always leaves RoPE out of layers 3, 7, 11, ..."
    plain = all(kind.use_rope and not limits(kind, config) for kind in kinds)  # as in the source's own class
    return [(f"{text}: {'; '.join(wrong)}", UNCONVERTED if plain else FFFN)] if wrong else []


def _biases(config: ModelConfig, kinds: Kinds) -> list[Objection]:
    if not any(name.endswith("proj.bias") for name in config.tensors):
        return []
    return [("the projections have biases, which llama.cpp does not load (llama-cpp-python 0.3.36)", UNCONVERTED)]


def _scaling(config: ModelConfig, kinds: Kinds, *, refused: dict[str, str], instead: str) -> list[Objection]:
    rope = config.rope
    kind = rope.get("rope_type", "default")
    found = [(f"RoPE scaling {kind}: {refused[kind]}", instead)] if kind in refused else []
    if kind == "yarn" and "attention_factor" in refused and rope.get("attention_factor") is not None:
        found.append((f"RoPE scaling yarn with attention_factor: {refused['attention_factor']}", instead))
    return found


def _llama3(config: ModelConfig, kinds: Kinds) -> list[Objection]:
    rope = config.rope
    taken = config.fields.get("original_max_position_embeddings") or 8192
    meant = rope.get("original_max_position_embeddings", config.max_position_embeddings)
    if rope.get("rope_type") != "llama3" or taken == meant:
        return []
    text = f"RoPE scaling llama3 from {meant} tokens: the converter uses {taken} instead"
    return [(text, f"write original_max_position_embeddings {meant} at the top of config.json")]


def _nope(config: ModelConfig, kinds: Kinds) -> list[Objection]:
    """vLLM's GraniteSWA, as of 0.29.0, uses one RoPE for all layers."""
    without = [i for i, kind in enumerate(kinds) if not kind.use_rope]
    instead = "`ctxext convert SOURCE --class smollm3` with the same layout, or F in place of N"
    return [(f"{_layers(without)} would get RoPE: vLLM 0.29.0 reads no layer_rope_theta", instead)] if without else []


def _never(config: ModelConfig, kinds: Kinds, *, why: str) -> list[Objection]:
    return [(why, UNCONVERTED)]


FFFN = "`ctxext convert SOURCE --hybrid FFFN` (full attention, no RoPE in every fourth layer), healed and trained again"
UNCONVERTED = (
    "if all layers of the source are F, the source without a conversion: `SOURCE`, or what "
    "`ctxext finetune SOURCE --ctx ...` makes of it"
)
OWN_CLASS = (
    "`ctxext convert SOURCE --hybrid {letters} --sliding-window {window}` (the same layout, in a class that has it)"
)
LINEAR_YARN = "another scaling, trained again: `--set rope_scaling=linear`, or yarn without an attention_factor"

BATCH = "its factor follows the running length, which vLLM shares between the sequences of a batch"
_VLLM_RUNNING = partial(_scaling, refused={"dynamic": BATCH, "longrope": BATCH}, instead=LINEAR_YARN)
_VLLM_NATIVE = partial(
    _scaling,
    refused={
        "dynamic": "vLLM's own class gives NaN beyond the original length (0.32.0)",
        "longrope": "vLLM's own class computes other positions (0.32.0)",
        "attention_factor": "versions of 2026-07 drop it (0.32.0 reads it)",
    },
    instead=LINEAR_YARN,
)
_VLLM_QWEN = partial(_windows, why="vLLM's own class ignores or refuses windows of some layers", instead=OWN_CLASS)
_GGUF_LOST = {"dynamic": "the converter ignores it", "longrope": "the converter writes no factors of this class"}
_GGUF_LOST |= {"attention_factor": "llama.cpp computes another (seen in llama-cpp-python 0.3.36)"}
_GGUF = partial(_scaling, refused=_GGUF_LOST, instead=LINEAR_YARN)
_GGUF_QWEN = partial(_scaling, refused=_GGUF_LOST | {"llama3": "written for Llama classes alone"}, instead=LINEAR_YARN)
_GGUF_WINDOW = partial(_windows, why="the converter writes none and every layer is full", instead=FFFN)
_GGUF_QWEN_WINDOW = partial(_windows, why="the converter writes none and every layer is full", instead=UNCONVERTED)
_GGUF_SINKS = partial(_never, why="no GGUF file of this class was tried, so that support is not known")
_GGUF_MELLUM = partial(_never, why="llama.cpp's Mellum needs experts and RoPE in every layer")
_OLLAMA_ROPE = partial(
    _scaling,
    refused=dict.fromkeys(
        ("linear", "dynamic", "yarn", "longrope", "llama3"), "Ollama's own engine does not read what llama.cpp writes"
    ),
    instead="positions without a scaling, trained again: `--set rope_scaling=none`, or a larger theta: "
    '`--set "rope_scaling={type: abf, theta: 1e6}"`; or `--target gguf` for llama.cpp itself',
)

_BACKEND = (
    "vllm-project/vllm, vllm/model_executor/models/transformers/base.py @ 03bf3c9: layer_types gives each sliding "
    "layer config.sliding_window; everything else of a layer, positions included, is transformers' own module",
    "vllm-project/vllm, docs/models/supported_models.md of v0.32.0: that backend does full and sliding attention",
)
_OWN_ROPE = (
    "vllm-project/vllm, vllm/model_executor/layers/rotary_embedding/__init__.py @ 07b12f1: the scalings; pull request "
    "48351 (open, 2026-07): an explicit attention_factor was dropped",
)
_QWEN_WINDOWS = (
    "vllm-project/vllm, issue 39514 (2026-04): Qwen3 reads no layer_types; qwen2.py @ 013a279 and issue 15705: windows "
    "of some layers are refused",
)
_MELLUM = (
    "vllm-project/vllm, vllm/model_executor/models/mellum.py @ 055e47c: a RuntimeError where no layer has experts; "
    "rotary_embedding/__init__.py @ 07b12f1: an error for a partial_rotary_factor of 0. Both stop the start",
)
_GRANITE = (
    "vllm-project/vllm, vllm/model_executor/models/granite_swa.py @ 0949f09: windows, sinks and biases are read; one "
    "RoPE serves all layers; later versions move the class to granite.py with a RoPE for each layer (not read here)",
)
_LLAMA_GRANITE = ("ggml-org/llama.cpp, src/models/granite-swa.cpp @ 38d3906: windows, sinks, RoPE by layer",)
_LLAMA_CPP = (
    "ggml-org/llama.cpp, conversion/llama.py @ 0274f0f and conversion/base.py @ 00bd27a: what a GGUF file contains "
    "(formerly convert_hf_to_gguf.py; Mistral becomes llama, no window is written)",
    "ggml-org/llama.cpp, issues 3371 and 3377: no sliding window for Mistral",
)
_LLAMA_QWEN = ("ggml-org/llama.cpp, conversion/qwen.py @ 03173d5, conversion/base.py @ 00bd27a: no window is written",)
_LLAMA_SMOLLM3 = (
    "ggml-org/llama.cpp, src/models/smollm3.cpp @ a0b8c17: RoPE where (layer + 1) % 4 != 0, one cache without a window",
    "ggml-org/llama.cpp, conversion/llama.py @ 0274f0f: SmolLM3 writes neither no_rope_layers nor a window",
)
_LLAMA_MELLUM = ("ggml-org/llama.cpp, src/models/mellum.cpp @ 82234e0 and conversion/mellum.py @ 051139f",)
_OLLAMA = (
    "ollama/ollama, convert/convert_llama.go @ 017eb8a: its own import reads rope_theta and rope_scaling, not the "
    "rope_parameters of transformers 5, so a GGUF file of llama.cpp is imported instead (docs/import.md)",
    "ollama/ollama, model/models/llama/model.go @ 02e2ab6, model/models/qwen3/model.go @ 0312c5a: of a scaling they "
    "read rope.freq_scale alone, which the converter does not write",
)
_OLLAMA_SMOLLM3 = ("ollama/ollama, llama/llama.cpp/src/models/smollm3.cpp @ 65e3eaf: carried along; issue 11347",)

NATIVE, BACKEND = "vLLM's own class", "vLLM's Transformers backend"
_HF = Fact("a stock class of transformers, no remote code", ("transformers 5.17 and 5.23, as tested here",))
_VLLM: dict[str, Fact] = {
    "llama": Fact(NATIVE, _OWN_ROPE, (_VLLM_NATIVE,)),
    "mistral": Fact(
        f"{NATIVE}, one window for all layers",
        ("vllm-project/vllm, pull request 2868: Llama with the config's window", *_OWN_ROPE),
        (_VLLM_NATIVE,),
    ),
    "qwen2": Fact(NATIVE, _QWEN_WINDOWS + _OWN_ROPE, (_VLLM_QWEN, _VLLM_NATIVE)),
    "qwen3": Fact(NATIVE, _QWEN_WINDOWS + _OWN_ROPE, (_VLLM_QWEN, _VLLM_NATIVE)),
    "smollm3": Fact(
        BACKEND,
        (*_BACKEND, "vllm-project/vllm, models/registry.py: SmolLM3ForCausalLM is TransformersForCausalLM"),
        (_VLLM_RUNNING,),
    ),
    "mellum": Fact(
        f"{BACKEND}, with --model-impl transformers; its own class fails for a model without experts",
        (*_BACKEND, *_MELLUM),
        (_VLLM_RUNNING,),
    ),
    "granite_swa": Fact(f"{NATIVE}, from 0.29.0 on", _GRANITE + _OWN_ROPE, (_nope, _VLLM_NATIVE), run=False),
}
GGUF, OLLAMA = "convert_hf_to_gguf.py, then llama.cpp", "convert_hf_to_gguf.py, then `ollama create`"
_LLAMA: dict[str, Fact] = {
    "llama": Fact(GGUF, _LLAMA_CPP, (_GGUF, _llama3, _biases)),
    "mistral": Fact(GGUF, _LLAMA_CPP, (_GGUF_WINDOW, _GGUF, _llama3)),
    "qwen2": Fact(GGUF, _LLAMA_QWEN, (_GGUF_QWEN_WINDOW, _GGUF_QWEN)),
    "qwen3": Fact(GGUF, _LLAMA_QWEN, (_GGUF_QWEN_WINDOW, _GGUF_QWEN)),
    "smollm3": Fact(GGUF, _LLAMA_SMOLLM3, (_GGUF_WINDOW, _every_fourth, _GGUF, _llama3, _biases)),
    "mellum": Fact(GGUF, _LLAMA_MELLUM, (_GGUF_MELLUM,)),
    "granite_swa": Fact(GGUF, _LLAMA_GRANITE, (_GGUF_SINKS,), run=False),
}
FACTS: dict[str, dict[str, Fact]] = {
    "hf": dict.fromkeys(_VLLM, _HF),
    "vllm": _VLLM,
    "gguf": _LLAMA,
    "ollama": {
        name: Fact(OLLAMA, fact.sources + _OLLAMA + _OLLAMA_SMOLLM3 * (name == "smollm3"), (*fact.rules, _OLLAMA_ROPE))
        for name, fact in _LLAMA.items()
    },
}
