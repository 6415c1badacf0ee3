"""The training spec: what a finetune run is asked to do. Frozen, strict, no torch.

Each field says its unit. Presets (presets/finetune) state only what differs from the defaults here.
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
    """How full layers attend while training; sliding layers always use their window, and inference is always dense.

    train       auto: s2 for models with full attention everywhere, dense for hybrids, whose few full layers can
                afford it; s2: S²-Attn (LongLoRA, arXiv 2309.12307, section 3.2)
    group_size  tokens of an S²-Attn group; None: ctx / 4
    sinks       first tokens of its document that a query of S²-Attn sees beside its group. auto: 1 for a model that
                puts much of its attention on the first token, which is measured when training starts (train/sinks.py),
                else 0, as published. auto is 0 with memory.tiles and, with a warning, under ZeRO 3
    grow        groups double, in equal parts of the S²-Attn steps, up to half of ctx and more
    shift       half: the shifted heads' groups are moved by G // 2, as published; random: by a draw at each step
    dense_last  the last share of the steps trains dense
    backend     what computes it (ops/backends/choice.py); auto: by device, dtype and pattern. One that is named
                serves or is refused
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
        raise ValueError(f"text_field: given, but rows of format: {format} have fields of their own")


@spec
class MixturePart:
    """One source of a mixture: `weight` is its share of the sequences beside the others'; the rest as in DataSpec."""

    source: str
    weight: Rate = 1.0
    format: Format = "text"
    text_field: str = "text"

    def __post_init__(self) -> None:
        _check_format(self.source, self.format, self.text_field)


@spec
class SamplesSpec:
    """Text that the model writes itself, as it was before any conversion: `source: self`.

    tokens       how many are sampled, once for a model and these settings; training goes through them again
    temperature  of the sampling, from all of the vocabulary
    batch        documents written at a time, each from its first token to its end, or to the model's original length
    seed         of the sampling; runs of other seeds share the text
    """

    tokens: Tokens = 512 * 1024
    temperature: Rate = 1.0
    batch: Positive = 32
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0


@spec
class DataSpec:
    """Where text comes from.

    source              a file or directory of text (.txt, .text, .md) or rows (.jsonl, .json, .parquet), .gz and .zst
                        too; a `datasets` id; `embedded`; or `self`
    format              what a JSONL or Parquet row is: text; messages (of roles, by the tokenizer's chat template);
                        prompt (`prompt` and `completion`, joined as they are) or prompt_chat (these as a user's and an
                        assistant's message). Of all but text the loss is on the answers alone (data/chat.py)
    text_field          the field of a JSONL or Parquet row that holds the text
    mixture             several sources in proportion to weights, instead of `source`, `format` and `text_field`
    min_tokens          of a document; shorter ones are left out
    max_tokens          of a document; longer ones are left out
    bos                 True: a document begins with BOS where the tokenizer adds one to a text (of rows that a chat
                        template renders: where the template writes one)
    document_mask       True: tokens do not see other documents packed into the same sequence
    synthetic_fraction  of the embedded corpus: the share of synthetic text
    synthetic_kinds     which synthetic texts (data/synthetic.py)
    samples             of `self`: how it is sampled
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
        given = [
            name
            for name, default in (("source", EMBEDDED), ("format", "text"), ("text_field", "text"))
            if getattr(self, name) != default
        ]
        if given:
            raise ValueError(f"{', '.join(given)}: given beside mixture, whose parts have their own")
        whole = sum(part.weight for part in self.mixture)
        seen = set[tuple[str, str, str]]()
        for part in self.mixture:
            if part.weight < whole / 1000:
                raise ValueError(f"mixture: {part.source} has less than a thousandth of the weight ({part.weight:g})")
            key = (part.source, part.format, part.text_field)
            if key in seen:
                raise ValueError(f"mixture: {part.source} stands there twice")
            seen.add(key)

    @property
    def parts(self) -> tuple[MixturePart, ...]:
        """Every source as a part; one where there is no mixture."""
        return self.mixture or (MixturePart(source=self.source, format=self.format, text_field=self.text_field),)

    @property
    def described(self) -> str:
        """The sources in words."""
        if not self.mixture:
            return self.source
        return "a mixture of " + ", ".join(f"{part.source} ({part.weight:g})" for part in self.mixture)


@spec
class Objective:
    """What a part of a run with a teacher minimises: weights of errors summed over the tokens that count.

    share      of the steps, beside the other objectives' shares
    kl         nats: KL of the teacher's next-token distribution from the model's
    top_k      the KL is over the teacher's k most probable tokens and all others as one; None: over all
    ce         nats: cross entropy of the text
    hidden     the squared error of every layer's output, over the mean square of the teacher's in the same sequence
    attention  the same of every layer's attention alone, each given the teacher's input to it, so that errors do not
               add up (after the per-layer stage of HALO, arXiv 2601.22156; whose input its layers get is our guess)
    beyond     nats: cross entropy of the tokens further into their document than the teacher was trained for; the
               other errors are of the tokens before
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
            raise ValueError(f"top_k: {self.top_k}, but kl has no weight")


@spec
class DistillSpec:
    """Learning from a teacher, to get back what a conversion lost.

    teacher     self: the model's own frozen weights in the layout and positions they were pretrained with, no second
                model in memory; or a directory, preset or hub id of a model with the same vocabulary
    objectives  one after the other
    """

    teacher: str = "self"
    objectives: Annotated[tuple[Objective, ...], Field(min_length=1)] = (Objective(kl=1.0),)


@spec
class OptimizerSpec:
    """AdamW on fp32 master weights.

    name                   adamw, or bitsandbytes' adamw8bit (moments in 8 bits) and paged_adamw8bit (on the host when
                           the GPU is full; on a CPU the same as adamw8bit)
    learning_rate          of the LoRA matrices, or of everything under `tuning: full`
    whole_learning_rate    of embeddings and norms; None: learning_rate
    sinks_learning_rate    of sinks and biases that a conversion has fitted and an adapter trains (lora.sinks): logits
                           and values of another size than matrices
    warmup_steps           optimizer steps of linear warm-up
    schedule               after warm-up: constant, cosine down to a tenth, or wsd (the last fifth linear to zero)
    clip                   the gradient norm may be this many times its running mean; larger ones are scaled down
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
    """What is kept, recomputed, moved or made smaller. Every knob but `quantize` gives the same numbers.

    checkpoint  True: a layer keeps its input alone, and is computed again in the backward pass (no: everything is
                kept); a number k: one input is kept for every k layers, which are computed again together
    keep        attention: full and S² layers keep their attention's output and logsumexp as well, instead of
                computing the attention twice; sliding layers are cheap and are recomputed whole
    tiles       tokens of a tile in which sliding and S² layers are recomputed and differentiated, so that the work
                memory of a layer is that of a tile; None: whole rows
    offload     the layers' inputs wait on the host (pinned, copied beside the computation on a GPU)
    quantize    the frozen weights of the linear layers in 4 (nf4, double quantisation) or 8 bits, through bitsandbytes
    """

    checkpoint: bool | Positive = True
    keep: Literal["nothing", "attention"] = "nothing"
    tiles: Tokens | None = None
    offload: bool = False
    quantize: Literal["none", "nf4", "int8"] = "none"


@spec
class FaultSpec:
    """What survives, and what happens when training goes wrong.

    save_steps      optimizer steps between checkpoints; the first step is always saved
    save_minutes    minutes between checkpoints, whichever comes first; None: by steps alone
    keep            checkpoints kept, the newest
    keep_at_end     they stay when the run is done, for `ctxext probe` to follow it through; else they are removed
    on_divergence   a loss or gradient that is not finite, or a spike: rollback goes back to the newest checkpoint once,
                    with the learning rates halved, and stops the second time; stop stops
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
    """A passkey grid: `cases` at each of `lengths` (tokens, up to ctx) and `depths` (0 first, 1 last)."""

    lengths: Annotated[tuple[Tokens, ...], Field(min_length=1)]
    depths: Annotated[tuple[Annotated[float, Field(ge=0, le=1)], ...], Field(min_length=1)] = (0.0, 0.5, 1.0)
    cases: Positive = 2


@spec
class ValidationSpec:
    """Held-out loss during training, always under the attention the model will run with, never S²-Attn.

    every_steps             optimizer steps between two; also before the first and after the last. None: never
    sequences               of ctx tokens; of a user's text at most a tenth
    result                  what a run leaves: the last weights, or the best by held-out loss
    max_short_ppl_increase  share by which perplexity at the original length may rise, such as 0.1; None: any
    passkey                 a grid that every validation measures as well; in a shorter stage, the lengths that fit
    """

    every_steps: Positive | None = 50
    sequences: Positive = 2
    result: Literal["last", "best"] = "last"
    max_short_ppl_increase: Annotated[float, Field(gt=0)] | None = None
    passkey: PasskeySpec | None = None

    def __post_init__(self) -> None:
        if self.passkey is not None and self.every_steps is None:
            raise ValueError("passkey: given, but every_steps: null means that nothing is validated")
        if self.max_short_ppl_increase is not None and self.every_steps is None:
            raise ValueError("max_short_ppl_increase: given, but every_steps: null means that nothing is validated")


@spec
class TelemetrySpec:
    """Where else the numbers of metrics.jsonl and validation.jsonl go; each needs its package.

    tensorboard  event files in the run's directory
    wandb        a project of Weights & Biases
    """

    tensorboard: bool = False
    wandb: str | None = None


@spec
class FinetuneSpec:
    """One run.

    ctx                tokens of a training sequence, and what the result is made for
    stages             shorter contexts to train at first, ascending, each for an equal share of the steps
    rope_scaling       see model/positions.py; always from the original trained length
    original_length    tokens; overrides what the model's files say
    tuning             lora (adapter plus embeddings and norms) or full
    steps              optimizer steps
    tokens_per_step    tokens; rounded down to whole sequences, at least one. Ignored when global_batch_size is given
    global_batch_size  sequences per optimizer step
    micro_batch_size   sequences per forward
    dtype              of the frozen weights and activations; auto: bfloat16 on a GPU, float32 on a CPU
    distill            learn from a teacher; None: from the text alone
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
