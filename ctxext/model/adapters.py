"""LoRA and fully trained modules through PEFT: attach, save, reopen and merge, with a count at every step.

PEFT has these problems by default, and this module avoids them:

short names in `modules_to_save` match too many modules   full names are used, and the trainable set is checked
tied embeddings become untied                             `ensure_weight_tying`
fully trained modules stay in bf16                        the caller passes fp32 masters to `save_adapter`
a save that drops tensors gives no error                  the file is reopened and compared with the trained tensors
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
    """Attaches the planned adapter to a model. B starts at zero, so the outputs do not change at first.

    `base` is the path of the base that PEFT records. Raises CheckFailed when the trainable set differs from the plan.
    """
    # PEFT takes one alpha for all modules, and `alpha_pattern` where they differ.
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
    # Tensors of the base that train in place: PEFT froze them with everything else.
    direct = [in_adapted(name, alphas) for name in plan.direct]
    for name in direct:
        adapted.get_parameter(name).requires_grad_(True)
    # Compare with the plan by name (all but LoRA's matrices) and by count. Shapes are the full ones, also under ZeRO-3.
    found = trainable(adapted)
    whole = {f"base_model.model.{module}.modules_to_save.default.weight" for module in plan.whole}
    strangers = {name for name in found if ".lora_" not in name} ^ (whole | set(direct))
    count = sum(full_shape(parameter).numel() for parameter in found.values())
    if strangers or count != plan.parameters:
        raise CheckFailed(
            f"{count:,} parameters would train, but the plan has {plan.parameters:,}; {len(strangers)} modules differ"
            + (f", first {min(strangers)}" if strangers else ""),
            hint="please report this with your peft version",
        )
    return adapted


def trainable(model: Any) -> dict[str, Tensor]:
    """Returns every trainable tensor by its name in the model. A tied head counts once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def full_shape(parameter: Tensor) -> torch.Size:
    """Returns the shape of the whole parameter, also where ZeRO-3 keeps only a flat part of it on this rank."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def save_adapter(model: PeftModel, directory: Path, masters: Mapping[str, Tensor]) -> int:
    """Writes adapter_config.json and adapter_model.safetensors, then reopens the file and checks every trained tensor.

    `masters` are the fp32 values of all trainable tensors, by parameter name; these values are saved. Returns the
    number of saved tensors. Raises CheckFailed when a tensor is missing in the file or differs in any bit.
    """
    # Replace every trainable entry of the state dict by its master. The match is by object, because a tied head has two
    # names for one parameter.
    master_of = {id(parameter): masters[name] for name, parameter in trainable(model).items()}
    aliases = model.named_parameters(remove_duplicate=False)  # a tied head is the embedding under a second name
    state = dict(model.state_dict()) | {n: master_of[id(p)] for n, p in aliases if id(p) in master_of}
    saved = get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)
    # PEFT leaves out the tensors of the base that train in place: add them.
    saved |= {name: masters[name] for name in masters if _is_direct(name)}
    saved = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in saved.items()}
    save_file(saved, directory / ADAPTER_FILE, metadata={"format": "pt"})
    model.peft_config["default"].save_pretrained(str(directory))
    reopened = load_file(directory / ADAPTER_FILE)
    # PEFT saves without the adapter's name ("default") and without the wrapper's part of the path.
    for name, tensor in masters.items():
        key = name.replace(".modules_to_save.default", "").replace(".default", "")
        if key not in reopened or not torch.equal(reopened[key], tensor.detach().cpu()):
            raise CheckFailed(
                f"{directory}: the saved file does not hold the trained tensor {name} as it was trained",
                hint="the run's checkpoint still has it; please report this with your peft version",
            )
    return len(reopened)


def _is_direct(name: str) -> bool:
    """Returns whether a trained tensor is one of the base's own. PEFT loads it by this name, but does not save it."""
    return ".lora_" not in name and ".modules_to_save." not in name


def open_adapter(model: PreTrainedModel, directory: Path) -> PeftModel:
    """Attaches a saved adapter to its base, for inference. Raises ModelError when a stored tensor was not loaded.

    It also raises ModelError when a tensor of the adapter is missing in the file.
    """
    adapted: PeftModel = PeftModel.from_pretrained(model, str(directory), local_files_only=True)
    stored = load_file(directory / ADAPTER_FILE)
    placed = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    # `get_peft_model_state_dict` does not list fitted sinks and biases: add those that the file has.
    own = dict(adapted.named_parameters())
    placed |= {name: own[name] for name in stored if is_fitted(name) and name in own}
    lost = sorted(stored.keys() ^ placed.keys())
    if lost:
        raise ModelError(f"{directory}: {len(lost)} trained tensors are missing or unknown, first {lost[0]}")
    for name, tensor in stored.items():
        if not torch.equal(placed[name].cpu(), tensor.to(placed[name].dtype)):
            raise ModelError(f"{directory}: the model did not load the trained tensor {name}")
    return adapted


def merge_adapter(adapted: PeftModel) -> PreTrainedModel:
    """Merges the adapter into an fp32 base. The result is an ordinary model, tied where the base is tied.

    Raises ModelError for a model in another dtype.
    """
    wide = {parameter.dtype for parameter in adapted.parameters()}
    if wide != {torch.float32}:
        raise ModelError(f"merging needs fp32 weights, but the model has {', '.join(map(str, wide))}")
    merged: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
    return merged
