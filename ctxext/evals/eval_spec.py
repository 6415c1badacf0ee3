"""The spec of an evaluation: suites, each with its fields. No torch."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import Field

from ctxext.config import presets
from ctxext.config.loader import Tokens, build, spec
from ctxext.config.parts import spread
from ctxext.data.documents import EMBEDDED
from ctxext.errors import InputError

Count = Annotated[int, Field(gt=0)]
Depths = Annotated[tuple[Annotated[float, Field(ge=0, le=1)], ...], Field(min_length=1)]
Lengths = Annotated[tuple[Tokens, ...], Field(min_length=1)] | None
FIVE_DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


@spec
class Perplexity:
    """Perplexity of text (evals/perplexity.py).

    lengths   None is the usable length of the models
    stride    tokens; None is the protocol's own
    limit     tokens of text; None is 32k, or twice the greatest length
    """

    suite: Literal["perplexity"] = "perplexity"
    lengths: Lengths = None
    data: str = EMBEDDED
    text_field: str = "text"
    protocol: Literal["hf-stride", "longlora", "truncate"] = "hf-stride"
    stride: Count | None = None
    limit: Count | None = None


@spec
class LongPpl:
    """Perplexity of key tokens (evals/longppl.py).

    evaluator     the model that finds the key tokens. There is no default: a model judged by its own keys judges itself
    short, step   tokens of the short context, and tokens scored with each. None: 4,096 and 1,024, or an eighth and a
                  thirty-second of the length where that is less
    limit         documents
    """

    suite: Literal["longppl"] = "longppl"
    evaluator: str | None = None
    lengths: Lengths = None
    data: str = EMBEDDED
    text_field: str = "text"
    short: Tokens | None = None
    step: Tokens | None = None
    limit: Count | None = None


@spec
class Passkey:
    """Passkey retrieval (evals/passkey.py): `cases` at each length and depth, `limit` of them in all, taken evenly.

    data     the text to hide in: embedded (held-out files), grass (repeated sentences), or a source of documents
    decode   generates, instead of one forward that contains the answer
    """

    suite: Literal["passkey"] = "passkey"
    lengths: Lengths = None
    data: str = EMBEDDED
    text_field: str = "text"
    depths: Depths = FIVE_DEPTHS
    cases: Count = 10
    limit: Count | None = None
    seed: int = 0
    decode: bool = False


@spec
class Niah:
    """Needle in a haystack, by generation (evals/niah.py): `cases` at each length and depth, `limit` in all."""

    suite: Literal["niah"] = "niah"
    lengths: Lengths = None
    data: str = EMBEDDED
    text_field: str = "text"
    depths: Depths = FIVE_DEPTHS
    cases: Count = 5
    limit: Count | None = None
    seed: int = 0


@spec
class Ruler:
    """RULER (evals/ruler.py): `cases` of each of `tasks` (None: all that have data) at each length.

    data               the text that needles are hidden in
    squad, hotpotqa    files for qa_1 and qa_2 in the official JSON
    from_cases         a JSONL file of existing cases, used instead of making cases
    """

    suite: Literal["ruler"] = "ruler"
    lengths: Lengths = None
    data: str = EMBEDDED
    text_field: str = "text"
    tasks: tuple[str, ...] | None = None
    cases: Count = 20
    limit: Count | None = None
    seed: int = 0
    squad: str | None = None
    hotpotqa: str | None = None
    from_cases: str | None = None


@spec
class LongBench:
    """LongBench (evals/longbench.py).

    data      a JSONL file, or a directory of them, in LongBench's format
    lengths   the most tokens of prompt and answer together; a longer prompt loses its middle
    prompts   LongBench's dataset2prompt.json, whose prompts replace ctxext's
    """

    suite: Literal["longbench"] = "longbench"
    lengths: Lengths = None
    data: str | None = None
    prompts: str | None = None
    tasks: tuple[str, ...] | None = None
    limit: Count | None = None


@spec
class Short:
    """lm-eval's own tasks, run by lm-eval (evals/short.py).

    limit     documents of each task
    include   a directory of further task definitions
    """

    suite: Literal["short"] = "short"
    tasks: Annotated[tuple[str, ...], Field(min_length=1)] = ("hellaswag", "arc_easy", "arc_challenge", "piqa")
    include: str | None = None
    limit: Count | None = None


Suite = Annotated[Perplexity | LongPpl | Passkey | Niah | Ruler | LongBench | Short, Field(discriminator="suite")]
SUITES: dict[str, type] = {
    "perplexity": Perplexity,
    "longppl": LongPpl,
    "passkey": Passkey,
    "niah": Niah,
    "ruler": Ruler,
    "longbench": LongBench,
    "short": Short,
}


@spec
class EvalSpec:
    """The suites, which run in order on each model.

    extrapolate        also runs lengths beyond what a model's positions were trained for
    dtype              of weights and activations
    tokens_per_batch   rows of one length run together up to this many tokens
    nope_log_scale     the a of model/attention.py's log scale of N layers; None leaves the model as it is
    """

    suites: Annotated[tuple[Suite, ...], Field(min_length=1)]
    extrapolate: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    tokens_per_batch: Tokens = 16_384
    nope_log_scale: Annotated[float, Field(gt=1, le=1e9)] | None = None


def eval_spec_from_options(suite: str, given: dict[str, Any]) -> EvalSpec:
    """Returns the spec of a command line: suites by name, joined by commas, or one preset; then the options.

    A key of `given` is a field of EvalSpec; `SUITE.field`; or a field of suites, which is set on all that have it.
    Raises InputError (an unknown name or field), SpecError (a value that is not allowed).
    """
    names = [name.strip() for name in suite.split(",")]
    if all(name in SUITES for name in names):
        data: dict[str, Any] = {"suites": [{"suite": name} for name in names]}
    else:
        if suite not in presets.names("eval") and not suite.endswith((".yaml", ".yml")):
            known = ", ".join([*SUITES, *presets.names("eval")])
            raise InputError(f"--suite {suite!r} is unknown; allowed are {known}, or a YAML file")
        data = {**presets.find("eval", suite).data}
    # A YAML file may be malformed. `build` raises the right message for it, so options are merged into good lists only.
    listed = data.get("suites")
    if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
        return build(EvalSpec, data, source=f"eval spec ({suite})")  # raises: the suites are malformed
    suites = [dict(one) for one in listed]
    whole = {field.name for field in fields(EvalSpec)} - {"suites"}
    spread(given, data, suites, names=whole, tag="suite", classes=SUITES, of=suite)
    return build(EvalSpec, {**data, "suites": suites}, source=f"eval spec ({suite}, options)")
