"""The training spec: what a finetune run is asked to do. Frozen, strict, no torch.

Each field says its unit. Presets (presets/finetune) state only what differs from the defaults here.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ctxext.config.loader import Tokens, spec
from ctxext.model.adapter_plan import LoraSpec
from ctxext.model.positions import Auto, RopeScaling

Positive = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0)]


@spec
class AttentionSpec:
    """How full layers attend while training; sliding layers always use their window, and inference is always dense.

    train       auto: s2 for models with full attention everywhere, dense for hybrids, whose few full layers can
                afford it; s2: S²-Attn (LongLoRA, arXiv 2309.12307, section 3.2)
    group_size  tokens of an S²-Attn group; None: ctx / 4
    backend     what computes it (ops/backends/choice.py); auto: by device, dtype and pattern. One that is named
                serves or is refused
    """

    train: Literal["auto", "s2", "dense"] = "auto"
    group_size: Tokens | None = None
    backend: Literal["auto", "naive", "blocked", "varlen", "flex"] = "auto"


@spec
class DataSpec:
    """Where text comes from.

    source              a file or directory of .txt, .md, .jsonl, .parquet; a `datasets` id; or `embedded`
    text_field          the field of a JSONL or Parquet row that holds the text
    document_mask       True: tokens do not see other documents packed into the same sequence
    synthetic_fraction  of the embedded corpus: the share of synthetic text
    synthetic_kinds     which synthetic texts (data/synthetic.py)
    """

    source: str = "embedded"
    text_field: str = "text"
    document_mask: bool = True
    synthetic_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.5
    synthetic_kinds: Annotated[tuple[Literal["passkey", "key_value", "copy", "repeat"], ...], Field(min_length=1)] = (
        "passkey",
        "key_value",
        "copy",
    )


@spec
class OptimizerSpec:
    """AdamW on fp32 master weights.

    name                   adamw, or bitsandbytes' adamw8bit (moments in 8 bits) and paged_adamw8bit (on the host when
                           the GPU is full; on a CPU the same as adamw8bit)
    learning_rate          of the LoRA matrices, or of everything under `tuning: full`
    whole_learning_rate    of embeddings and norms; None: learning_rate
    warmup_steps           optimizer steps of linear warm-up
    schedule               after warm-up: constant, cosine down to a tenth, or wsd (the last fifth linear to zero)
    clip                   the gradient norm may be this many times its running mean; larger ones are scaled down
    """

    name: Literal["adamw", "adamw8bit", "paged_adamw8bit"] = "adamw"
    learning_rate: Rate = 2e-5
    whole_learning_rate: Rate | None = None
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    warmup_steps: Annotated[int, Field(ge=0)] = 20
    schedule: Literal["constant", "cosine", "wsd"] = "constant"
    clip: Annotated[float, Field(gt=1)] = 3.0


@spec
class MemorySpec:
    """What is kept, recomputed, moved or made smaller. Every knob but `quantize` gives the same numbers.

    checkpoint  True: a layer keeps its input alone, and is computed again in the backward pass (no: everything is kept)
    keep        attention: full and S² layers keep their attention's output and logsumexp as well, instead of
                computing the attention twice; sliding layers are cheap and are recomputed whole
    tiles       tokens of a tile in which sliding and S² layers are recomputed and differentiated, so that the work
                memory of a layer is that of a tile; None: whole rows
    offload     the layers' inputs wait on the host (pinned, copied beside the computation on a GPU)
    quantize    the frozen weights of the linear layers in 4 (nf4, double quantisation) or 8 bits, through bitsandbytes
    """

    checkpoint: bool = True
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
    on_divergence   a loss or gradient that is not finite, or a spike: rollback goes back to the newest checkpoint once,
                    with the learning rates halved, and stops the second time; stop stops
    spike           nats a token by which a step's loss may exceed its running mean
    """

    save_steps: Positive = 50
    save_minutes: Annotated[float, Field(gt=0)] | None = 30.0
    keep: Positive = 2
    on_divergence: Literal["rollback", "stop"] = "rollback"
    spike: Rate = 3.0


@spec
class FinetuneSpec:
    """One run.

    ctx                tokens of a training sequence
    rope_scaling       see model/positions.py; always from the original trained length
    original_length    tokens; overrides what the model's files say
    tuning             lora (adapter plus embeddings and norms) or full
    steps              optimizer steps
    tokens_per_step    tokens; rounded down to whole sequences, at least one. Ignored when global_batch_size is given
    global_batch_size  sequences per optimizer step
    micro_batch_size   sequences per forward
    dtype              of the frozen weights and activations; auto: bfloat16 on a GPU, float32 on a CPU
    """

    ctx: Tokens
    rope_scaling: RopeScaling = Auto()
    original_length: Tokens | None = None
    tuning: Literal["lora", "full"] = "lora"
    lora: LoraSpec = LoraSpec()
    attention: AttentionSpec = AttentionSpec()
    data: DataSpec = DataSpec()
    optimizer: OptimizerSpec = OptimizerSpec()
    steps: Positive = 200
    tokens_per_step: Tokens = 512 * 1024
    global_batch_size: Positive | None = None
    micro_batch_size: Positive = 1
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    memory: MemorySpec = MemorySpec()
    faults: FaultSpec = FaultSpec()
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
