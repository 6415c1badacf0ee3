"""Is it better to narrow windows and fade RoPE out little by little than to convert at once? stories260K, SN, W = 32.

    python benchmarks/progressive.py                 # about an hour on one CPU thread; goes on where it stopped

The same steps, data, trainables, learning rates and loss for every arm; over the first share of the steps the window of
the sliding layers shrinks from 512 to 32 tokens (geometrically), and the rotation of the NoPE layers' queries and keys
from its whole angle to none (linearly, so that positions come closer and closer until all are one). At the end every
arm is the conversion, which is asserted. Nothing of this is in the package: see the result in LOG.md.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from arms import Row, Rows, cell, converted, machine, own_samples, row_loss, table
from retrofit import HELD_OUT, SAMPLED, SMALL, STORIES, TEMPERATURE
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from ctxext.cli import console
from ctxext.config import presets
from ctxext.config.loader import build, set_value
from ctxext.model import attention
from ctxext.model.adapters import attach, trainable
from ctxext.model.load import LoadedModel, build_model, load_tokenizer
from ctxext.model.relayout import relayout
from ctxext.model.source import resolve
from ctxext.train.distill import TeacherModel
from ctxext.train.engine import LocalEngine
from ctxext.train.finetune_spec import FinetuneSpec
from ctxext.train.loop import Events, forward_backward
from ctxext.train.optimizer import rate_factor
from ctxext.train.prepare import prepare_data
from ctxext.train.run_plan import RunPlan, plan_run

NAME, T, W, BATCH = "annealed", 512, 32, 16
LAYOUT = ("layer_types", "no_rope_layers", "use_sliding_window", "sliding_window")
SHARES = (0.0, 0.25, 0.5)  # of the steps; 0: at once


@dataclass
class Stage:
    """How far the layout has come: the sliding layers' window in tokens, what is left of the NoPE layers' rotation."""

    window: int = W
    rotation: float = 0.0

    def move(self, step: int, steps: int, share: float) -> None:
        done = min(1.0, step / (share * steps)) if share else 1.0
        self.window, self.rotation = round(T * (W / T) ** done), 1.0 - done


def turned(x: Tensor, angle: float, base: float) -> Tensor:
    """x [B,H,T,D], rotated by RoPE already, rotated further by `angle` times that."""
    D = x.shape[-1]
    frequencies = base ** -(torch.arange(0, D, 2).float() / D)  # (D / 2)
    angles = angle * torch.outer(torch.arange(x.shape[2]).float(), frequencies).repeat(1, 2)  # (T, D)
    half = torch.cat((-x[..., D // 2 :], x[..., : D // 2]), -1)
    return x * angles.cos() + half * angles.sin()


def register(stage: Stage) -> None:
    """An attention of all-full, all-RoPE layers that computes the SN layout at `stage`."""

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **given: Any) -> Any:
        if module.layer_idx % 2 == 0:
            given["sliding_window"] = stage.window
        else:
            base = module.config.rope_parameters["rope_theta"]
            query, key = (turned(x, stage.rotation - 1.0, base) for x in (query, key))
        return attention.attend(module, query, key, value, mask, **given)

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, attention.left_padding)


def student_of(plan: RunPlan, layout: dict[str, Any] | None = None) -> Any:
    """The model that a run would train, in the layout of another config if that is given."""
    torch.manual_seed(plan.spec.seed)
    model = build_model(plan.source.directory, plan.config.with_fields(**(layout or {})), torch.float32)
    return attach(model, plan.trainables, plan.spec.lora.rank, plan.source.name)


def arm(full: str, sn: str, share: float, teacher: bool, seed: int, steps: int, held_out: Tensor) -> Row:
    fields = dict(presets.find("finetune", "heal").data)
    changes = {
        "ctx": T, "steps": steps, "seed": seed, "global_batch_size": BATCH, "micro_batch_size": BATCH,
        "memory": {"checkpoint": False}, "validation.every_steps": None, "data.source": "self",
        "data.samples": {"tokens": SAMPLED, "temperature": TEMPERATURE, "batch": 256},
        "distill": {"objectives": [{"kl": 1.0}]} if teacher else None, **SMALL,
    }  # fmt: skip
    for path, value in changes.items():
        set_value(fields, path, value)
    plan = plan_run(resolve(sn), build(FinetuneSpec, fields, source="heal"))
    stage = Stage()
    register(stage)
    everywhere = resolve(full).config
    model = student_of(plan, {name: everywhere.get(name) for name in LAYOUT})
    taught = TeacherModel(relayout(model, plan.teacher.config), plan.teacher.length) if plan.teacher else None
    model.get_base_model().config._attn_implementation = NAME
    engine, (sequences, _) = LocalEngine(model, plan.spec.optimizer, taught), prepare_data(plan, Events())
    for step in range(steps):
        stage.move(step, steps, share)
        batch = [sequences.sequence(i) for i in range(step * BATCH, (step + 1) * BATCH)]
        forward_backward(engine, batch, plan, step)
        engine.step(rate_factor(step, steps, plan.spec.optimizer))
    result = student_of(plan)
    mine, found = trainable(result), trainable(model)
    with torch.no_grad():
        for name, parameter in mine.items():
            parameter.copy_(found[name])
        stage.move(1, 1, 0.0)
        apart = (result(input_ids=held_out[:2, :-1]).logits - model(input_ids=held_out[:2, :-1]).logits).abs().max()
    assert apart < 1e-3, f"the last stage is not the conversion: {apart}"
    loaded = LoadedModel(result.eval(), load_tokenizer(plan.source.directory), plan.source, torch.device("cpu"))
    return {"loss": row_loss(loaded, held_out)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark-progressive"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    console.quiet_libraries()
    full = converted(str(STORIES), options.work / "full", "F", None)
    sn = converted(str(STORIES), options.work / "sn", "SN", W)
    held_out = own_samples(str(STORIES), HELD_OUT, T, 77, TEMPERATURE)
    rows = Rows(options.out / "progressive-cpu.jsonl")
    for seed in range(options.seeds):
        for teacher in (True, False):
            for share in SHARES:
                name = f"{'KL to itself' if teacher else 'text'}, {f'over {share:.0%}' if share else 'at once'}"
                measure = partial(arm, full, sn, share, teacher, seed, options.steps, held_out)
                rows.once("progressive", name, seed, measure)
    made = [[name, cell(found, "loss")] for name, found in rows.of("progressive").items()]
    lines = [f"stories260K, SN, W = {W}, {options.steps} steps of {BATCH} x {T} tokens. {machine()}.", ""]
    text = "\n".join(lines + table(["the layout is reached", "loss on held-out own samples, nats"], made)) + "\n"
    (options.out / "progressive-cpu.md").write_text(text, "utf-8")
    print(text)


if __name__ == "__main__":
    main()
