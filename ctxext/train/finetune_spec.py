"""The training spec: the options of a finetune run. Frozen, strict, no torch.

Each field states its unit. Presets (presets/finetune) list only the values that differ from these defaults.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ctxext.config.loader import Tokens, spec
from ctxext.data.documents import EMBEDDED, SELF
from ctxext.model.adapter_plan import LoraSpec
from ctxext.model.positions import Auto, RopeScaling

Positive = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]
Format = Literal["text", "messages", "prompt", "prompt_chat"]


@spec
class AttentionSpec:
    """How full layers attend in training. Sliding layers always use their window, and inference is always dense.

    train       auto: s2 for models with full attention in all layers, dense for hybrids, which have few full layers;
                s2: S²-Attn (LongLoRA, arXiv 2309.12307, section 3.2)
    group_size  tokens of an S²-Attn group; None: ctx / 4
    sinks       first tokens of its document that an S²-Attn query sees in addition to its group. auto: 1 for a model
                that puts much of its attention on the first token, measured at the start of training
                (train/sink_tokens.py); otherwise 0, as published. auto is 0 with memory.tiles
    grow        groups double, in equal parts of the S²-Attn steps, up to half of ctx or more
    shift       half: the groups of the shifted heads move by G // 2, as published; random: by a random amount drawn at
                each step
    dense_last  the share of the steps, at the end, that train dense
    backend     the attention backend (ops/backends/choice.py); auto: chosen by device, dtype and pattern. A named
                backend runs or is refused; there is no fallback
    """

    train: Literal["auto", "s2", "dense"] = "auto"
    group_size: Tokens | None = None
    sinks: Annotated[int, Field(ge=0, le=64)] | Literal["auto"] = "auto"
    grow: bool = False
    shift: Literal["half", "random"] = "half"
    dense_last: Annotated[float, Field(ge=0, le=1)] = 0.0
    backend: Literal["auto", "naive", "blocked", "varlen", "flex"] = "auto"


def _check_format(source: str, format: Format, text_field: str) -> None:
    texts = {EMBEDDED: "the embedded corpus", SELF: "what a model samples"}
    if format != "text" and source in texts:
        raise ValueError(f"format: {format}, but {texts[source]} is text")
    if format != "text" and text_field != "text":
        raise ValueError(f"text_field: given, but format: {format} sets its own fields")


@spec
class MixturePart:
    """One source of a mixture. `weight` is its share of the sequences, relative to the others; rest as in DataSpec."""

    source: str
    weight: Rate = 1.0
    format: Format = "text"
    text_field: str = "text"

    def __post_init__(self) -> None:
        _check_format(self.source, self.format, self.text_field)


@spec
class SamplesSpec:
    """Text that the model samples itself, in its state before any conversion: `source: self`.

    tokens       how many tokens are sampled, once per model and settings; training repeats them as needed
    temperature  of the sampling, from the whole vocabulary
    batch        documents sampled at a time, each from its first token to its end, or to the model's original length
    seed         of the sampling; runs with other seeds share the text
    """

    tokens: Tokens = 512 * 1024
    temperature: Rate = 1.0
    batch: Positive = 32
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0


@spec
class DataSpec:
    """Where the training text comes from.

    source              a file or directory of text (.txt, .text, .md) or rows (.jsonl, .json), all of these also as
                        .gz or .zst; rows in .parquet; a `datasets` id; `embedded`; or `self` (text that the model
                        samples, SamplesSpec)
    format              the content of a row: text; messages (with roles, rendered by the tokenizer's
                        chat template); prompt (`prompt` and `completion`, concatenated) or prompt_chat (the two as a
                        user's and an assistant's message). For all formats except text, the loss is on the answers
                        alone (data/chat.py)
    text_field          the field of a row that holds the text
    mixture             several sources in proportion to their weights, instead of `source`, `format` and `text_field`
    min_tokens          documents with fewer tokens are left out
    max_tokens          documents with more tokens are left out
    bos                 True: a document begins with BOS if the tokenizer adds one to a text. No effect on rows that a
                        chat template renders: the template decides
    document_mask       True: tokens do not see other documents packed into the same sequence
    synthetic_fraction  of the embedded corpus: the share of synthetic text
    synthetic_kinds     of the embedded corpus: which synthetic texts (data/synthetic.py)
    samples             of `self`: the sampling settings
    """

    source: str = EMBEDDED
    format: Format = "text"
    text_field: str = "text"
    mixture: tuple[MixturePart, ...] = ()
    min_tokens: Tokens | None = None
    max_tokens: Tokens | None = None
    bos: bool = True
    document_mask: bool = True
    synthetic_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.5
    synthetic_kinds: Annotated[tuple[Literal["passkey", "key_value", "copy", "repeat"], ...], Field(min_length=1)] = (
        "passkey",
        "key_value",
        "copy",
    )
    samples: SamplesSpec = SamplesSpec()

    def __post_init__(self) -> None:
        if self.max_tokens is not None and (self.min_tokens or 0) > self.max_tokens:
            raise ValueError(f"min_tokens {self.min_tokens} is more than max_tokens {self.max_tokens}")
        if not self.mixture:
            _check_format(self.source, self.format, self.text_field)
            return
        # A mixture replaces the three fields of a single source, so that both together are ambiguous.
        given = [
            name
            for name, default in (("source", EMBEDDED), ("format", "text"), ("text_field", "text"))
            if getattr(self, name) != default
        ]
        if given:
            raise ValueError(f"{', '.join(given)}: given together with mixture; set them in its parts")
        whole = sum(part.weight for part in self.mixture)
        seen = set[tuple[str, str, str]]()
        for part in self.mixture:
            # A tiny share is refused, and so is the same source twice.
            if part.weight < whole / 1000:
                raise ValueError(f"mixture: {part.source} has less than a thousandth of the weight ({part.weight:g})")
            key = (part.source, part.format, part.text_field)
            if key in seen:
                raise ValueError(f"mixture: {part.source} is listed twice")
            seen.add(key)

    @property
    def parts(self) -> tuple[MixturePart, ...]:
        """All sources as parts; one part if there is no mixture."""
        return self.mixture or (MixturePart(source=self.source, format=self.format, text_field=self.text_field),)

    @property
    def described(self) -> str:
        """The sources in words."""
        if not self.mixture:
            return self.source
        return "a mixture of " + ", ".join(f"{part.source} ({part.weight:g})" for part in self.mixture)


@spec
class Objective:
    """The loss of one part of a run with a teacher: weights of terms summed over the tokens that count.

    share      of the steps, relative to the other objectives' shares
    kl         nats: KL divergence of the student's next-token distribution from the teacher's
    top_k      the KL uses the teacher's k most probable tokens and all other tokens as one; None: all tokens
    ce         nats: cross entropy of the text
    hidden     the squared error of every layer's output, divided by the mean square of the teacher's output in the same
               sequence
    attention  the same for every layer's attention alone. Each layer gets the teacher's input, so that errors do not
               add up (after the per-layer stage of HALO, arXiv 2601.22156; which input its layers get is our guess)
    beyond     nats: cross entropy of the tokens beyond the length that the teacher was trained for, within their
               document; the other terms use the tokens before
    """

    share: Rate = 1.0
    kl: Weight = 0.0
    top_k: Positive | None = None
    ce: Weight = 0.0
    hidden: Weight = 0.0
    attention: Weight = 0.0
    beyond: Weight = 1.0

    def __post_init__(self) -> None:
        if not (self.kl or self.ce or self.hidden or self.attention):
            raise ValueError("give at least one of kl, ce, hidden, attention a weight above 0")
        if self.top_k is not None and not self.kl:
            raise ValueError(f"top_k: {self.top_k} is given, but kl has no weight")


@spec
class DistillSpec:
    """Distillation from a teacher, to recover what a conversion lost.

    teacher     self: the model's own frozen weights in the layout and positions of their pretraining, without a second
                model in memory; or a directory, preset or hub id of a model with the same vocabulary
    objectives  one after the other
    """

    teacher: str = "self"
    objectives: Annotated[tuple[Objective, ...], Field(min_length=1)] = (Objective(kl=1.0),)


@spec
class TokenWeights:
    """Weights of the tokens in the loss (train/token_weights.py). Held-out losses never have weights.

    kind    equal: every scored token counts the same; prefix: tokens that see much of their own document count more,
            rare lengths most (after EXACT, arXiv 2605.10544); longce: tokens that the model predicts better with the
            whole context than with a short one count more (LongCE, arXiv 2410.23771), for three more forward passes
    extra   prefix: the extra weight of all tokens with a long prefix together, as a share of the scored tokens
    least   prefix: from how many visible tokens a prefix is long; None: a quarter of ctx
    short   longce: tokens of the short context; None: an eighth of ctx
    limit   largest weight of a token
    """

    kind: Literal["equal", "prefix", "longce"] = "equal"
    extra: Rate = 0.5
    least: Tokens | None = None
    short: Annotated[Tokens, Field(ge=2)] | None = None
    limit: Annotated[float, Field(gt=1)] = 5.0

    def __post_init__(self) -> None:
        # An option of another kind would be ignored without a word.
        options = {"prefix": ("extra", "least"), "longce": ("short",)}
        for kind, names in options.items():
            for name in names:
                if kind != self.kind and getattr(self, name) != type(self).__dataclass_fields__[name].default:
                    raise ValueError(f"{name}: is an option of kind: {kind}, and kind is {self.kind}")

    @property
    def described(self) -> str:
        """The weights in words."""
        if self.kind == "prefix":
            return f"{self.extra:g} of all tokens more for those with a long prefix, at most {self.limit:g} a token"
        return f"LongCE, at most {self.limit:g} a token; three more forward passes"


def long_prefix(weights: TokenWeights, ctx: int) -> int:
    """Returns from how many visible tokens a prefix is long: as given, or a quarter of the row."""
    return weights.least or max(1, ctx // 4)


def short_length(weights: TokenWeights, ctx: int) -> int:
    """Returns the tokens of LongCE's short context: as given, or an eighth of the row."""
    return weights.short or max(2, ctx // 8)


@spec
class OptimizerSpec:
    """AdamW on fp32 master weights.

    name                   adamw, or bitsandbytes' adamw8bit (8-bit moments) and paged_adamw8bit (moments move to the
                           host when the GPU is full; on a CPU the same as adamw8bit)
    learning_rate          of the LoRA matrices, or of all weights under `tuning: full`
    whole_learning_rate    of embeddings and norms; None: learning_rate
    sinks_learning_rate    of sinks and biases that a conversion fitted and an adapter trains (lora.sinks); these are
                           logits and values, on another scale than matrices
    warmup_steps           optimizer steps of linear warm-up
    schedule               after warm-up: constant, cosine down to a tenth, or wsd (the last fifth linear to zero)
    clip                   the gradient norm may be this many times its running mean; larger gradients are scaled down
    """

    name: Literal["adamw", "adamw8bit", "paged_adamw8bit"] = "adamw"
    learning_rate: Rate = 2e-5
    whole_learning_rate: Rate | None = None
    sinks_learning_rate: Rate = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    warmup_steps: Annotated[int, Field(ge=0)] = 20
    schedule: Literal["constant", "cosine", "wsd"] = "constant"
    clip: Annotated[float, Field(gt=1)] = 3.0


@spec
class MemorySpec:
    """What is kept, recomputed, offloaded or quantised. All options except `quantize` give the same numbers.

    checkpoint  True: a layer keeps only its input and is recomputed in the backward pass; False: all activations are
                kept; a number k: one input is kept for every k layers, which are recomputed together
    keep        attention: full and S² layers also keep the output and logsumexp of their attention, which is then
                computed only once; sliding layers are cheap and are fully recomputed
    tiles       tokens of a tile. Sliding and S² layers are recomputed and differentiated tile by tile, so that the
                working memory of a layer is that of one tile; None: whole rows
    offload     the layers' inputs are stored on the host (pinned; on a GPU the copy overlaps the computation)
    quantize    the frozen weights of the linear layers in 4 (nf4, double quantisation) or 8 bits, with bitsandbytes
    """

    checkpoint: bool | Positive = True
    keep: Literal["nothing", "attention"] = "nothing"
    tiles: Tokens | None = None
    offload: bool = False
    quantize: Literal["none", "nf4", "int8"] = "none"


@spec
class FaultSpec:
    """Checkpoints, and the reaction to a divergence.

    save_steps      optimizer steps between checkpoints; the first step is always saved
    save_minutes    minutes between checkpoints, whichever comes first; None: only save_steps counts
    keep            how many checkpoints are kept, newest first
    keep_at_end     True: checkpoints stay after the run, so that `ctxext probe` can follow the training; False: they
                    are removed
    on_divergence   for a loss or gradient that is not finite, and for a spike. rollback: the first time, return to the
                    newest checkpoint with half the learning rates; the second time, stop. stop: stop
    spike           nats a token by which a step's loss may exceed its running mean
    """

    save_steps: Positive = 50
    save_minutes: Annotated[float, Field(gt=0)] | None = 30.0
    keep: Positive = 2
    keep_at_end: bool = False
    on_divergence: Literal["rollback", "stop"] = "rollback"
    spike: Rate = 3.0


@spec
class PasskeySpec:
    """A passkey grid: `cases` for each pair of `lengths` (tokens, up to ctx) and `depths` (0 first, 1 last)."""

    lengths: Annotated[tuple[Tokens, ...], Field(min_length=1)]
    depths: Annotated[tuple[Annotated[float, Field(ge=0, le=1)], ...], Field(min_length=1)] = (0.0, 0.5, 1.0)
    cases: Positive = 2


@spec
class ValidationSpec:
    """Held-out loss during training, always under the model's inference attention, never S²-Attn.

    every_steps             optimizer steps between two validations; also before the first and after the last step.
                            None: never
    sequences               how many sequences of ctx tokens; at most a tenth of a user's text
    result                  which weights a run returns: the last, or the best by held-out loss
    max_short_ppl_increase  share by which perplexity at the original length may rise, such as 0.1; None: no limit
    passkey                 a grid that every validation also measures; a shorter stage uses the lengths that fit
    """

    every_steps: Positive | None = 50
    sequences: Positive = 2
    result: Literal["last", "best"] = "last"
    max_short_ppl_increase: Annotated[float, Field(gt=0)] | None = None
    passkey: PasskeySpec | None = None

    def __post_init__(self) -> None:
        if self.passkey is not None and self.every_steps is None:
            raise ValueError("passkey: given, but every_steps: null turns validation off")
        if self.max_short_ppl_increase is not None and self.every_steps is None:
            raise ValueError("max_short_ppl_increase: given, but every_steps: null turns validation off")


@spec
class TelemetrySpec:
    """Additional targets for the numbers of metrics.jsonl and validation.jsonl; each needs its package.

    tensorboard  event files in the run's directory
    wandb        the name of a Weights & Biases project
    """

    tensorboard: bool = False
    wandb: str | None = None


@spec
class FinetuneSpec:
    """One training run.

    ctx                tokens of a training sequence, and the target context of the result
    stages             shorter contexts that train first, ascending, each for an equal share of the steps
    rope_scaling       see model/positions.py; always relative to the original trained length
    original_length    tokens; overrides the value in the model's files
    tuning             lora (adapter plus embeddings and norms) or full
    steps              optimizer steps
    tokens_per_step    tokens; rounded down to whole sequences, at least one. Ignored when global_batch_size is given
    global_batch_size  sequences per optimizer step
    micro_batch_size   sequences per forward
    dtype              of the frozen weights and activations; auto: bfloat16 on a GPU, float32 on a CPU
    distill            learn from a teacher; None: from the text alone
    token_weights      of the loss; with a teacher, of all its terms
    """

    ctx: Tokens
    stages: tuple[Tokens, ...] = ()
    rope_scaling: RopeScaling = Auto()
    original_length: Tokens | None = None
    tuning: Literal["lora", "full"] = "lora"
    lora: LoraSpec = LoraSpec()
    attention: AttentionSpec = AttentionSpec()
    data: DataSpec = DataSpec()
    distill: DistillSpec | None = None
    token_weights: TokenWeights = TokenWeights()
    optimizer: OptimizerSpec = OptimizerSpec()
    validation: ValidationSpec = ValidationSpec()
    steps: Positive = 200
    tokens_per_step: Tokens = 512 * 1024
    global_batch_size: Positive | None = None
    micro_batch_size: Positive = 1
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    memory: MemorySpec = MemorySpec()
    faults: FaultSpec = FaultSpec()
    telemetry: TelemetrySpec = TelemetrySpec()
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0

    def __post_init__(self) -> None:
        contexts = [*self.stages, self.ctx]
        if sorted(set(contexts)) != contexts:
            raise ValueError(f"stages: contexts must ascend to ctx, got {', '.join(map(str, contexts))}")
        if self.steps < len(contexts):
            raise ValueError(f"steps: {len(contexts)} contexts need as many steps, got {self.steps}")
        if self.distill is not None and self.steps < len(self.distill.objectives):
            raise ValueError(f"steps: {len(self.distill.objectives)} objectives need as many steps, got {self.steps}")
