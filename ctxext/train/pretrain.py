"""Trains a small model from scratch: a tokenizer, random weights, then the finetuning loop with all weights trainable.

This exists for the embedded model `tiny`, which one command must be able to reproduce. It is not a framework for
pretraining. The stages are ordinary runs, each on the result of the one before, with a fresh optimizer.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from ctxext.config import manifest as manifests
from ctxext.config.loader import Tokens, spec
from ctxext.config.locks import locked
from ctxext.config.output import check_free, claim, disk_faults, staged_output
from ctxext.errors import EnvironmentFault, InputError
from ctxext.model.card import model_card
from ctxext.model.source import from_directory
from ctxext.train.finetune_spec import FinetuneSpec, Positive
from ctxext.train.run_directory import resume_hint, start_run
from ctxext.train.run_plan import RunPlan, plan_run

EOS = "<|end|>"
# Files that belong to the run and not to the model.
RUN_FILES = ("spec.yaml", "data.json", "metrics.jsonl", "validation.jsonl", manifests.FILE_NAME, "README.md")
RESTART_HINT = "free disk space, then give the command again with --force: pretraining starts from the beginning"
TOKENIZER_CHARACTERS = 6_000_000  # of the embedded corpus; the merges are learned from them


@spec
class ShapeSpec:
    """A Llama with tied embeddings. Widths in scalars, `length` in tokens. Each digit is a token of its own."""

    vocab_size: Positive
    hidden_size: Positive
    intermediate_size: Positive
    num_hidden_layers: Positive
    num_attention_heads: Positive
    num_key_value_heads: Positive
    head_dim: Positive
    length: Tokens
    rope_theta: Annotated[float, Field(gt=1)] = 10_000.0
    initializer_range: Annotated[float, Field(gt=0)] = 0.02


@spec
class PretrainSpec:
    """A model and the runs that train it. Every stage has `tuning: full`."""

    shape: ShapeSpec
    stages: tuple[FinetuneSpec, ...]
    seed: Annotated[int, Field(ge=0)] = 0

    def __post_init__(self) -> None:
        if not self.stages or any(stage.tuning != "full" for stage in self.stages):
            raise ValueError("stages: at least one is needed, and each needs tuning: full")


def pretrain(recipe: PretrainSpec, out: Path, *, force: bool, train: Callable[[RunPlan, Path], Any]) -> Path:
    """Writes the untrained model, runs every stage with `train`, and puts the last result at `out`.

    The directories of the stages stay in `<out>.stages` with their metrics. Raises InputError when a stage was
    interrupted.
    """
    check_free(out, force)
    stages = out.with_name(f"{out.name}.stages")
    if not force:
        check_free(stages)
    if stages.exists():
        # Do not remove the stages of a pretraining that still runs.
        with locked(stages, "pretraining"):
            shutil.rmtree(stages)
    claim(stages)
    with locked(stages, "pretraining"), disk_faults(out, hint=RESTART_HINT):
        current = _train_stages(recipe, stages, out.name, train)
    # Copy only the model's files; those of the last run do not belong to the result.
    with staged_output(out, force) as staging:
        for path in current.iterdir():
            if path.is_file() and path.name not in RUN_FILES:
                shutil.copyfile(path, staging / path.name)
        describe(recipe, stages, staging, out.name)
    return out


def _train_stages(recipe: PretrainSpec, stages: Path, name: str, train: Callable[[RunPlan, Path], Any]) -> Path:
    """Writes the untrained model and trains every stage on the one before. Returns the directory of the last stage."""
    current = stages / "0-untrained"
    try:
        current.mkdir()
        write_untrained(recipe, current)
    except BaseException:
        # Nothing is trained yet. Remove the stages, so that the same command can be repeated.
        shutil.rmtree(stages, ignore_errors=True)
        raise
    for number, stage in enumerate(recipe.stages, start=1):
        run = stages / f"{number}-ctx{stage.ctx}"
        plan = plan_run(from_directory(current, name=name), stage)
        start_run(plan, run)
        try:
            finished = train(plan, run).finished
        except EnvironmentFault as error:
            # The usual hint is to resume the run, but a stage alone cannot be resumed.
            error.hint = RESTART_HINT if error.hint == resume_hint(run) else error.hint
            raise
        if not finished:
            raise InputError(
                f"interrupted in stage {number}: pretraining cannot resume", hint=f"start again; {run} is unfinished"
            )
        current = run
    return current


def describe(recipe: PretrainSpec, stages: Path, directory: Path, name: str) -> None:
    """Writes the model card and the manifest: the recipe, each stage's facts, and the fingerprint of the corpus."""
    from ctxext.data import corpus

    # Only finished stages have a manifest; the untrained model has none.
    runs = sorted(path for path in stages.iterdir() if (path / manifests.FILE_NAME).exists())
    facts = [manifest.facts for manifest in map(manifests.read, runs) if manifest is not None]
    length = recipe.shape.length
    rows = [
        (f"stage {number}: {stage.ctx} tokens", f"{fact['tokens']:,} tokens, loss {fact['final_loss']:.3f}")
        for number, (stage, fact) in enumerate(zip(recipe.stages, facts, strict=True), start=1)
    ]
    text = ["A small Llama trained by ctxext on this machine's Python standard library and synthetic text, for tests."]
    (directory / "README.md").write_text(model_card(name, text, rows), "utf-8")
    manifest = manifests.new(
        "model",
        spec=json.loads(json.dumps(asdict(recipe))),
        parents={},
        facts={"original_length": length, "usable_length": length, "stages": facts, "corpus": corpus.fingerprint()},
    )
    manifests.write(directory, manifest)


def write_untrained(recipe: PretrainSpec, directory: Path) -> None:
    """Writes a checkpoint with random weights, and a tokenizer trained on the embedded corpus."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = train_tokenizer(recipe.shape.vocab_size, recipe.seed)
    tokenizer.model_max_length = recipe.shape.length
    tokenizer.save_pretrained(directory)
    shape = recipe.shape
    config = LlamaConfig(
        **{name: value for name, value in asdict(shape).items() if name not in ("length", "rope_theta")},
        max_position_embeddings=shape.length,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    # The seed is set directly before the random initialisation.
    torch.manual_seed(recipe.seed)
    LlamaForCausalLM(config).save_pretrained(directory)


def train_tokenizer(vocab_size: int, seed: int) -> Any:
    """Returns a byte-level BPE tokenizer trained on the embedded corpus.

    Every digit is a token of its own, so that the model can copy numbers digit by digit.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from ctxext.data import corpus

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False
    )
    documents = corpus.corpus_documents("train", seed=seed, synthetic_fraction=0.3, max_chars=TOKENIZER_CHARACTERS)
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS)
