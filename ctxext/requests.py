"""The request of each command: its arguments, their types, defaults and help. One class a command.

The options of the command line (cli/options.py), the signature of the function in api.py and the arguments of a step in
a pipeline (study/steps.py) are derived from these classes. A request does not name its output: a command has `--out`
and `--force`, a function has `out` and `force`, and a pipeline gives each step a directory. No torch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import wraps
from numbers import Number
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

from pydantic import ValidationError

from ctxext.config.faults import describe
from ctxext.config.loader import spec
from ctxext.errors import SpecError
from ctxext.units import parse_tokens

DEFAULT_PRESET = "lora-alpha"
AUTO, RETRIEVAL = "auto", "retrieval"  # the values of full_layers for which layers are chosen by measurement
Length = str | int  # tokens, as a number or as text such as "32k"
Settings = dict[str, Any]  # fields of a spec by dotted path

R = TypeVar("R")
T = TypeVar("T")


@dataclass(frozen=True)
class Option:
    """How the command line offers a field of a request.

    help      one sentence
    argument  whether it is an argument (MODEL) and not an option (--model)
    name      of the option, where it is not the field's name
    metavar   of the value, where it is not the name in capitals
    complete  what the shell completes: a kind of preset, "suites" or "probes"
    example   of one assignment, for the error message of --set
    least, most  of a number
    flags     "--yes/--no": a flag with a third state, where neither is given
    """

    help: str
    argument: bool = False
    name: str | None = None
    metavar: str | None = None
    complete: str | None = None
    example: str = ""
    least: int | None = None
    most: int | None = None
    flags: str | None = None


@spec
class PlanRequest:
    """What `plan` predicts: settings with which a finetune fits, and their memory, FLOPs and time."""

    model: Annotated[str, Option("A directory with a config.json (weights are not needed), or a preset", argument=True)]
    ctx: Annotated[Length | None, Option("Training context in tokens, such as 8192, 100k (k = 1024)")] = None
    hybrid: Annotated[
        str | None, Option("Layout that `convert` would give the model; several separated by commas; none: unconverted")
    ] = None
    gpu: Annotated[str | None, Option("A card, such as h100, 4090 or 24gb; `this` is this machine [default: this]")] = (
        None
    )
    memory: Annotated[
        str | int | None, Option("Memory of a card, such as 80G: instead of --gpu, or a lower limit for it")
    ] = None
    gpus: Annotated[int, Option("Number of cards, all in one machine", least=1, most=16)] = 1
    preset: Annotated[str, Option("A finetune preset or a YAML file", complete="finetune")] = DEFAULT_PRESET
    settings: Annotated[
        Settings,
        Option(
            "Fix a field of the spec, as key=value: the search leaves it unchanged", example="attention.train=dense"
        ),
    ] = field(default_factory=dict)


@spec
class ConvertRequest:
    """What `convert` makes: the layout of the new model, and how its full layers and sinks are chosen."""

    model: Annotated[str, Option("A local directory, a preset name, or a hub id", argument=True, complete="models")]
    hybrid: Annotated[
        str, Option("A layout preset, a YAML file, or a pattern of S, N, F such as SSSN", complete="hybrid")
    ]
    full_layers: Annotated[
        tuple[int | str, ...] | str | None,
        Option(
            "The full layers: odd, even, last, numbers from 0 such as 3,7,11; auto: the planner measures layouts and "
            "chooses; retrieval: the layers with the strongest retrieval heads, much faster. All others are sliding"
        ),
    ] = None
    budget: Annotated[
        str | int | None,
        Option(
            "auto, retrieval: number of full layers, or share of the KV cache such as 25% [default: half of the layers]"
        ),
    ] = None
    length: Annotated[
        Length | None,
        Option("auto, retrieval: tokens at which KV cache and FLOPs are counted [default: usable length]"),
    ] = None
    calibration: Annotated[
        str | None,
        Option("Text for the measurements of auto and retrieval and the fit of sinks [default: the embedded corpus]"),
    ] = None
    calibration_tokens: Annotated[
        Length | None, Option("auto, retrieval: tokens of this text to use [default: 8k]")
    ] = None
    i_know: Annotated[bool, Option("auto: allow a budget of zero full layers")] = False
    sliding_window: Annotated[int | None, Option("Window in tokens, instead of the preset's")] = None
    model_class: Annotated[
        str,
        Option(
            "Class of the output: smollm3 or granite_swa (llama, mistral, qwen2), mellum (qwen3), or auto",
            name="--class",
        ),
    ] = "auto"
    sinks: Annotated[
        str,
        Option(
            "auto: in a class with learned sinks (granite_swa), fit sinks for sliding layers if the model puts "
            "much of its attention on the first token; none: no sinks"
        ),
    ] = "auto"
    dtype: Annotated[str | None, Option("float32, bfloat16 or float16 [default: as stored]")] = None
    gate: Annotated[bool, Option("Check the logits of the converted model")] = True


@spec
class FinetuneRequest:
    """What `finetune` trains: the model, its context, its text, and the processes that train it.

    `ctx` may be stages, such as "8k,32k". Without a model the newest conversion under ./runs is trained.
    """

    model: Annotated[
        str | None,
        Option("A directory, preset or hub id [default: the newest conversion]", argument=True, complete="models"),
    ] = None
    ctx: Annotated[
        Length | None, Option("Training context in tokens, such as 8192, 100k (k = 1024), or stages: 8k,32k,100k")
    ] = None
    preset: Annotated[str, Option("A finetune preset or a YAML file", complete="finetune")] = DEFAULT_PRESET
    data: Annotated[str | None, Option("Files, a directory, or a datasets id [default: the embedded corpus]")] = None
    steps: Annotated[int | None, Option("Optimizer steps, instead of the preset's")] = None
    original_length: Annotated[
        Length | None, Option("Tokens that the model was first trained at, if its files are wrong")
    ] = None
    settings: Annotated[
        Settings, Option("Any field of the spec, as key=value; may be repeated", example="lora.rank=16")
    ] = field(default_factory=dict)
    zero: Annotated[str | None, Option("DeepSpeed ZeRO: 1, 2, 3, 2_offload, 3_offload or a JSON file")] = None
    nproc: Annotated[
        int | None,
        Option("Number of processes, with ZeRO 2 unless --zero is given [default: 1, or the number of GPUs]", least=1),
    ] = None
    hostfile: Annotated[
        str | None, Option("File of hosts that share a file system, reached by ssh: lines `name slots=N`")
    ] = None


@spec
class EvalRequest:
    """What `eval` measures: the models, and the suites with their settings.

    Fields that are left out keep the values of an eval preset. Without a model the newest output under ./runs is
    measured.
    """

    models: Annotated[
        tuple[str, ...] | str | None,
        Option("Directories, presets or hub ids [default: the newest output]", argument=True, metavar="[MODEL]..."),
    ] = None
    suite: Annotated[
        str,
        Option(
            "perplexity, longppl, passkey, niah, ruler, longbench, short, several joined by commas, "
            "or an eval preset such as smoke",
            complete="suites",
        ),
    ] = "perplexity"
    lengths: Annotated[
        tuple[Length, ...] | Length | None, Option("Lengths in tokens, such as 2k,4k,8k [default: the usable length]")
    ] = None
    against: Annotated[str | None, Option("A model to compare each of the others with, item by item")] = None
    data: Annotated[
        str | None, Option("Text to measure on, or to hide needles in [default: the embedded corpus's held-out files]")
    ] = None
    text_field: Annotated[str | None, Option("Field of JSONL and Parquet rows that has the text")] = None
    protocol: Annotated[str | None, Option("perplexity: hf-stride, longlora or truncate")] = None
    evaluator: Annotated[str | None, Option("longppl: the model that finds the key tokens")] = None
    limit: Annotated[
        Length | None,
        Option("perplexity: number of tokens; longppl: documents; other suites: cases, spread evenly over the lengths"),
    ] = None
    seed: Annotated[int | None, Option("Seed for drawing the cases")] = None
    dtype: Annotated[str | None, Option("float32 or bfloat16 [default: float32]")] = None
    extrapolate: Annotated[bool, Option("Also measure at lengths beyond a model's usable length")] = False
    nope_log_scale: Annotated[
        float | None,
        Option("A, such as 500: multiply queries at position t by log(t + A) / log(A) in layers without RoPE"),
    ] = None
    settings: Annotated[
        Settings, Option("Any field, as key=value or suite.key=value; may be repeated", example="passkey.cases=4")
    ] = field(default_factory=dict)


@spec
class ProbeRequest:
    """What `probe` looks at: the model, or two models, and the probes with their settings."""

    model: Annotated[str, Option("A directory, a run, a preset or a hub id", argument=True, metavar="MODEL_OR_RUN")]
    names: Annotated[
        tuple[str, ...] | str,
        Option(
            "receptive-field, layer-niah, gradient-influence, retrieval-heads, retrieval-trace, qk-distance, "
            "attention-distance, positions, or all [default: all]",
            argument=True,
            metavar="[NAME]...",
            complete="probes",
        ),
    ] = "all"
    compare: Annotated[str | None, Option("A model to compare with, such as the one before conversion or training")] = (
        None
    )
    preset: Annotated[str | None, Option("Sizes of all probes: smoke, paper, or a YAML file", complete="probe")] = None
    length: Annotated[Length | None, Option("Tokens [default: the usable length, at most 8k]")] = None
    samples: Annotated[int | None, Option("Texts or questions of each probe")] = None
    ablate: Annotated[int | None, Option("retrieval-heads: mask the top K heads, and K random ones")] = None
    data: Annotated[str | None, Option("Text to measure on [default: the embedded corpus's held-out files]")] = None
    seed: Annotated[int | None, Option("Seed for all random choices")] = None
    dtype: Annotated[str | None, Option("float32 or bfloat16 [default: float32]")] = None
    extrapolate: Annotated[bool, Option("Also measure at lengths beyond a model's usable length")] = False
    settings: Annotated[
        Settings,
        Option("Any field, as key=value or probe.key=value; may be repeated", example="retrieval-heads.draws=5"),
    ] = field(default_factory=dict)


@spec
class MergeRequest:
    """What `merge` writes: the run, the dtype, and changes of what was trained.

    `restore` is applied first, then `alpha_multiplier`; `nope_scale` is chosen for the result. Without a run the newest
    finetune under ./runs is merged.
    """

    run: Annotated[str | None, Option("A finetune run [default: the newest]", argument=True)] = None
    dtype: Annotated[str | None, Option("float32, bfloat16 or float16 [default: the base's]")] = None
    alpha_multiplier: Annotated[
        str | float | None,
        Option("Multiply the change of all trained tensors (LoRA, embeddings, norms) by X", metavar="auto|X"),
    ] = None
    nope_scale: Annotated[
        str | float | None,
        Option("Multiply the queries of layers without positions by X, in the weights", metavar="auto|X"),
    ] = None
    length: Annotated[
        Length | None,
        Option("--nope-scale auto: the length to calibrate for, such as 32k [default: the usable length]"),
    ] = None
    data: Annotated[
        str | None, Option("auto: text to choose and report on [default: the embedded corpus's held-out files]")
    ] = None
    restore: Annotated[
        str | None, Option("qk: take the projections of queries and keys from the base, untrained", metavar="qk")
    ] = None


@spec
class ExportRequest:
    """What `export` writes, and for which program."""

    model: Annotated[str, Option("A merged run, a conversion, a model directory", argument=True, metavar="RUN_OR_DIR")]
    target: Annotated[str, Option("hf, vllm, gguf or ollama")] = "hf"


@spec
class ReportRequest:
    """What `report` shows."""

    runs: Annotated[
        tuple[str, ...] | str,
        Option(
            "Outputs of eval, finetune and probe; of any other output only the manifest is shown",
            argument=True,
            metavar="RUN...",
        ),
    ]
    title: Annotated[str | None, Option("Title of the page [default: the first model's name]")] = None


@spec
class VerifyRequest:
    """What `verify` measures: the attention of training or of inference."""

    model: Annotated[str, Option("A directory, a run, a preset or a hub id", argument=True, metavar="MODEL_OR_RUN")]
    ctx: Annotated[Length | None, Option("Tokens [default: the run's ctx, or the usable length]")] = None
    attention: Annotated[str | None, Option("training or inference [default: training for a run, else inference]")] = (
        None
    )


@spec
class ChatRequest:
    """A conversation with a model, and how it answers."""

    model: Annotated[str, Option("A local directory, a finetune run, a preset or a hub id", argument=True)]
    max_new_tokens: Annotated[int, Option("Most tokens to generate")] = 512
    temperature: Annotated[float, Option("0: greedy; above 0: sampling")] = 0.0
    seed: Annotated[int, Option("Seed for sampling")] = 0
    chat: Annotated[
        bool | None, Option("Use the chat template [default: if there is one]", flags="--chat/--no-chat")
    ] = None
    dtype: Annotated[str | None, Option("float32, bfloat16 or float16 [default: bfloat16 on a GPU, else float32]")] = (
        None
    )
    device: Annotated[str | None, Option("cpu, cuda or cuda:N [default: a GPU if there is one]")] = None


@spec
class GenerateRequest(ChatRequest):
    """One text that a model continues: a prompt, or a file with a question after it."""

    max_new_tokens: Annotated[int, Option("Most tokens to generate")] = 256
    prompt: Annotated[str | None, Option("Text to continue")] = None
    file: Annotated[str | None, Option("A text file to continue, of any length; - is stdin")] = None
    question: Annotated[str | None, Option("Question to add after the file, after an empty line")] = None


def eval_fields(request: EvalRequest) -> dict[str, Any]:
    """Returns what a request sets in the spec of an evaluation. What it leaves out keeps the value of a preset."""
    given = _given(request, "models", "suite", "against", "limit", "lengths")
    if request.limit is not None:
        given["limit"] = parse_tokens(request.limit)
    # Text such as "2k,4k" is a list of lengths.
    if isinstance(request.lengths, str | int):
        given["lengths"] = [part.strip() for part in str(request.lengths).split(",")]
    elif request.lengths is not None:
        given["lengths"] = list(request.lengths)
    return given | request.settings


def probe_fields(request: ProbeRequest) -> dict[str, Any]:
    """Returns what a request sets in the spec of its probes. What it leaves out keeps the value of a preset."""
    return _given(request, "model", "names", "compare", "preset") | request.settings


def _given(request: Any, *others: str) -> dict[str, Any]:
    """The fields that are set: neither None nor False, and none of `others` and the settings."""
    values = {one.name: getattr(request, one.name) for one in fields(request) if one.name not in (*others, "settings")}
    return {name: value for name, value in values.items() if value is not None and value is not False}


def read_request(cls: type[R], given: Mapping[str, Any], *, source: str) -> R:
    """Returns the request of class `cls` with these arguments, as Python programs and the command line have them.

    Paths become text, other iterables become tuples, numbers of numpy become Python's. Raises SpecError with every
    fault; `source` names what was given.
    """
    values = {name: _plain(value) for name, value in given.items()}
    settings = given.get("settings")
    if "settings" in values and (settings is None or isinstance(settings, Mapping)):
        values["settings"] = dict(settings or {})
    try:
        return cls(**values)
    except ValidationError as error:
        raise SpecError(source, describe(cls, values, error)) from None


def _plain(value: Any) -> Any:
    """A value as the fields of a request have it: text, a number of Python, or a tuple of these."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Number) and hasattr(value, "item"):
        return value.item()
    if isinstance(value, Iterable) and not isinstance(value, str | bytes):
        return tuple(map(_plain, value))
    return value


def options(cls: type) -> dict[str, tuple[Any, Option]]:
    """Returns the type and the Option of every field of a request class, in its order."""
    hints = get_type_hints(cls, include_extras=True)
    return {one.name: (hints[one.name].__origin__, hints[one.name].__metadata__[0]) for one in fields(cls)}


def accepts(cls: type) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Makes `function(request, *, ...)` a function that also takes the fields of the request by name.

    The fields come first in the signature, in their order, and then the function's own keywords. A call has either a
    request or its fields. Raises TypeError, as Python does, for a name that there is not.
    """

    def with_fields(function: Callable[..., T]) -> Callable[..., T]:
        own = [one for one in inspect.signature(function).parameters.values() if one.kind is one.KEYWORD_ONLY]
        signature = inspect.Signature([*_parameters(cls), *own])

        @wraps(function)
        def call(*arguments: Any, **keywords: Any) -> T:
            if (arguments and isinstance(arguments[0], cls)) or isinstance(keywords.get("request"), cls):
                return function(*arguments, **keywords)
            try:
                given = signature.bind(*arguments, **keywords).arguments
            except TypeError as error:
                raise TypeError(f"{function.__name__}() {error}") from None
            rest = {one.name: given.pop(one.name) for one in own if one.name in given}
            return function(read_request(cls, given, source=function.__name__), **rest)

        call.__signature__ = signature  # type: ignore[attr-defined]
        return call

    return with_fields


def _parameters(cls: type) -> list[inspect.Parameter]:
    """The fields of a request as parameters of a function."""
    found = []
    for one in fields(cls):
        # A mapping is made for each request, so that its field has no default value.
        default = getattr(cls, one.name, {} if one.name == "settings" else inspect.Parameter.empty)
        kind, _ = options(cls)[one.name]
        found.append(
            inspect.Parameter(one.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=kind)
        )
    return found
