"""Every finetune and pretrain preset loads and plans; every field of a spec is read by the code somewhere."""

import ast
import dataclasses
from pathlib import Path

import pytest

from ctxext.config import presets
from ctxext.config.loader import build
from ctxext.errors import InputError
from ctxext.model import adapter_plan, layout, positions
from ctxext.model.source import resolve
from ctxext.train import finetune_spec, pretrain
from ctxext.train.run_plan import plan_run

PACKAGE = Path(__file__).parent.parent / "ctxext"


@pytest.mark.parametrize("model", presets.names("models"))
@pytest.mark.parametrize("preset", presets.names("finetune"))
def test_a_finetune_preset_plans_for_every_model(preset, model):
    data = presets.find("finetune", preset).data | {"ctx": 102_400}
    if (
        data.get("attention", {}).get("train") == "s2" and model == "mistral-7b"
    ):  # every layer has its 4,096 window: S²-Attn would do nothing
        with pytest.raises(InputError, match="no layer is full"):
            plan_run(resolve(model, weights=False), build(finetune_spec.FinetuneSpec, data, source=preset))
        return
    source = resolve(model, weights=False)
    if preset in ("heal", "heal-then-extend") and data["ctx"] <= source.usable_length:
        with pytest.raises(InputError, match="was not converted"):
            plan_run(source, build(finetune_spec.FinetuneSpec, data, source=preset))
        return
    plan = plan_run(source, build(finetune_spec.FinetuneSpec, data, source=preset))
    assert plan.rows() and plan.as_dict()["trainable_parameters"] > 0


@pytest.mark.parametrize("preset", presets.names("pretrain"))
def test_a_pretrain_preset_loads(preset):
    recipe = build(pretrain.PretrainSpec, presets.find("pretrain", preset).data, source=preset)
    assert recipe.stages[-1].ctx == recipe.shape.length


def test_every_field_of_every_spec_is_read_somewhere():
    read = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                read.add(node.attr)
    specs = [
        value
        for module in (finetune_spec, adapter_plan, layout, positions, pretrain, presets)
        for value in vars(module).values()
        if dataclasses.is_dataclass(value) and isinstance(value, type) and hasattr(value, "__pydantic_config__")
    ]
    assert len(specs) > 12
    # ShapeSpec goes to LlamaConfig as a whole, PresetShape to a config.json, the RoPE factors by name
    whole = {"ShapeSpec", "PresetShape"}
    unread = [
        f"{cls.__name__}.{field.name}"
        for cls in specs
        if cls.__name__ not in whole
        for field in dataclasses.fields(cls)
        if field.name not in read and field.name not in ("short_factor", "long_factor", "factor")
    ]
    assert unread == []
