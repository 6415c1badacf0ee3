"""LoRA and the modules trained whole, through PEFT: attached, saved, reopened, merged, and counted at every step.

What PEFT gets wrong when left alone, and what is done here: short names in `modules_to_save` match too much (full
names, and the set is asserted); tied embeddings come apart (`ensure_weight_tying`); modules trained whole stay in bf16
(the caller hands fp32 masters to `save_adapter`); a save that drops tensors says nothing (the file is reopened and
compared with what trained).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from ctxext.errors import CheckFailed, ModelError
from ctxext.model.adapter_plan import EMBEDDINGS, Trainables, in_adapted, is_fitted
from ctxext.model.weights import ADAPTER_FILE


def attach(model: PreTrainedModel, plan: Trainables, rank: int, base: str) -> PeftModel:
    """Put the planned adapter on a model; B starts at zero, so it computes what it did. `base` is recorded by PEFT.

    Raises CheckFailed when what trains is not exactly what was planned.
    """
    alphas = {group.name: group.alpha for group in plan.lora}
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=plan.lora[0].alpha,
        alpha_pattern=alphas if len(set(alphas.values())) > 1 else {},
        target_modules=list(alphas),
        modules_to_save=list(plan.whole) or None,
        ensure_weight_tying=bool(model.config.tie_word_embeddings and EMBEDDINGS in plan.whole),
    )
    adapted: PeftModel = get_peft_model(model, config, autocast_adapter_dtype=True)
    adapted.peft_config["default"].base_model_name_or_path = base  # PEFT takes the model's own, maybe relative, path
    # Tensors of the base that train in their place: PEFT has frozen them with everything else.
    direct = [in_adapted(name, alphas) for name in plan.direct]
    for name in direct:
        adapted.get_parameter(name).requires_grad_(True)
    found = trainable(adapted)
    whole = {f"base_model.model.{module}.modules_to_save.default.weight" for module in plan.whole}
    strangers = {name for name in found if ".lora_" not in name} ^ (whole | set(direct))
    count = sum(full_shape(parameter).numel() for parameter in found.values())
    if strangers or count != plan.parameters:
        raise CheckFailed(
            f"{count:,} parameters would train, {plan.parameters:,} were planned; {len(strangers)} modules differ"
            + (f", first {min(strangers)}" if strangers else ""),
            hint="please report this with your peft version",
        )
    return adapted


def trainable(model: Any) -> dict[str, Tensor]:
    """Every tensor that trains, by its name in the model; a tied head counts once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def full_shape(parameter: Tensor) -> torch.Size:
    """The shape of the whole parameter, also where ZeRO-3 has left a part of it, flat, on this rank."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def save_adapter(model: PeftModel, directory: Path, masters: Mapping[str, Tensor]) -> int:
    """Write adapter_config.json and adapter_model.safetensors, then reopen and account for every trained tensor.

    `masters` are the fp32 values of everything that trains, by parameter name; they are what is saved. Returns the
    number of tensors. Raises CheckFailed when one is not found again, equal to the last bit.
    """
    master_of = {id(parameter): masters[name] for name, parameter in trainable(model).items()}
    aliases = model.named_parameters(remove_duplicate=False)  # a tied head is the embedding under a second name
    state = dict(model.state_dict()) | {n: master_of[id(p)] for n, p in aliases if id(p) in master_of}
    saved = get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)
    saved |= {name: masters[name] for name in masters if _is_direct(name)}
    saved = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in saved.items()}
    save_file(saved, directory / ADAPTER_FILE, metadata={"format": "pt"})
    model.peft_config["default"].save_pretrained(str(directory))
    reopened = load_file(directory / ADAPTER_FILE)
    for name, tensor in masters.items():
        key = name.replace(".modules_to_save.default", "").replace(".default", "")
        if key not in reopened or not torch.equal(reopened[key], tensor.detach().cpu()):
            raise CheckFailed(
                f"{directory}: the trained tensor {name} was not found again after saving",
                hint="the run's checkpoint still has it; please report this with your peft version",
            )
    return len(reopened)


def _is_direct(name: str) -> bool:
    """Whether a trained tensor is one of the base's own. PEFT loads it by this name, and does not save it."""
    return ".lora_" not in name and ".modules_to_save." not in name


def open_adapter(model: PreTrainedModel, directory: Path) -> PeftModel:
    """Put a saved adapter on its base, for inference. Raises ModelError when a stored tensor finds no place."""
    adapted: PeftModel = PeftModel.from_pretrained(model, str(directory), local_files_only=True)
    stored = load_file(directory / ADAPTER_FILE)
    placed = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    own = dict(adapted.named_parameters())
    placed |= {name: own[name] for name in stored if is_fitted(name) and name in own}
    lost = sorted(stored.keys() ^ placed.keys())
    if lost:
        raise ModelError(f"{directory}: {len(lost)} trained tensors have no place, or are missing, first {lost[0]}")
    for name, tensor in stored.items():
        if not torch.equal(placed[name].cpu(), tensor.to(placed[name].dtype)):
            raise ModelError(f"{directory}: the trained tensor {name} was not taken over by the model")
    return adapted


def merge_adapter(adapted: PeftModel) -> PreTrainedModel:
    """Fold the adapter into an fp32 base; the result is an ordinary model, tied where the base was tied."""
    wide = {parameter.dtype for parameter in adapted.parameters()}
    if wide != {torch.float32}:
        raise ModelError(f"merging is done in fp32, the model holds {', '.join(map(str, wide))}")
    merged: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
    return merged
