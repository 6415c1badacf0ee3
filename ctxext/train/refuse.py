"""Refusals that need no arithmetic. No torch."""

from __future__ import annotations

from ctxext.errors import InputError, ModelError
from ctxext.model.source import ModelSource
from ctxext.train import recompute
from ctxext.train.finetune_spec import FinetuneSpec
from ctxext.units import format_tokens

NF4_BLOCK = 64  # weights that share a scale; bitsandbytes' CPU kernels accept only whole blocks


def refuse(source: ModelSource, spec: FinetuneSpec, gpu: bool) -> None:
    """Raises InputError or ModelError for what cannot be trained, as far as that needs no arithmetic."""
    if source.base is not None:
        raise InputError(f"{source.name} is an adapter on {source.base.name}", hint="merge it first: ctxext merge")
    if source.config.fields.get("attention_dropout"):
        raise ModelError(
            f"{source.name}: attention_dropout {source.config.fields['attention_dropout']} is not supported",
            hint="set it to 0 in config.json",
        )
    # Options of the validation that this model or ctx does not support.
    passkey = spec.validation.passkey
    if passkey is not None and max(passkey.lengths) > spec.ctx:
        raise InputError(
            f"validation.passkey.lengths: {format_tokens(max(passkey.lengths))} tokens are more than ctx",
            hint=f"allowed are lengths up to {format_tokens(spec.ctx)}",
        )
    if spec.validation.max_short_ppl_increase and (spec.original_length or source.original_length) is None:
        raise InputError(
            "validation.max_short_ppl_increase: this model's original training length is not known",
            hint="give it with --original-length",
        )
    # Weights that would be 1 for every token.
    weights = spec.token_weights
    for name, tokens in (("least", weights.least), ("short", weights.short)):
        if tokens is not None and tokens >= spec.ctx:
            raise InputError(
                f"token_weights.{name}: {format_tokens(tokens)} tokens with ctx {format_tokens(spec.ctx)}: every token "
                "would have the same weight",
                hint=f"allowed are fewer than ctx ({format_tokens(spec.ctx)})",
            )
    # Memory options that this model does not support.
    recompute.check(spec.memory, [kind.sliding_window for kind in source.kinds])
    if spec.memory.quantize != "none" and spec.tuning == "full":
        raise InputError(
            f"memory.quantize: {spec.memory.quantize} freezes the weights that tuning: full trains",
            hint="train with tuning=lora, or memory.quantize=none",
        )
    odd = [width for width in (source.shape.hidden_size, source.shape.intermediate_size) if width % NF4_BLOCK]
    if spec.memory.quantize == "nf4" and odd and not gpu:
        raise InputError(
            f"memory.quantize: nf4 on a CPU needs widths divisible by {NF4_BLOCK}, but {source.name} has {odd[0]}",
            hint="use memory.quantize=int8",
        )
