"""Writes an exported directory: unchanged weights, config, tokenizer and card. It appears complete or not at all.

config.json is written last. Weights are hard-linked where the file system allows it, else copied. The output contains
no local paths: they are removed, and every text is searched for them before the directory appears. No torch.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctxext.config import manifest as manifests
from ctxext.config.output import check_free, staged_output
from ctxext.errors import CheckFailed, InputError
from ctxext.export.export_card import first_model, history, write_card
from ctxext.export.matrix import TARGETS, Verdict, verdict
from ctxext.model.companions import companions, read_object, require_tokenizer
from ctxext.model.config_fields import Fields
from ctxext.model.model_config import ModelConfig
from ctxext.model.rope_fields import ORIGINAL, written_for_both
from ctxext.model.source import ModelSource, read_config, resolve, tensors_of
from ctxext.model.weights import INDEX

SEARCHED = 2**20  # most bytes of a copied file that is searched for local paths; larger files are vocabularies
NAMES = ("_name_or_path", "name_or_path")  # fields in which transformers stores the path that a file was read from


@dataclass(frozen=True)
class ExportPlan:
    """A planned export: the model, the verdict of the target, and the output directory."""

    source: ModelSource
    verdict: Verdict
    out: Path
    force: bool


@dataclass(frozen=True)
class Exported:
    """The result of an export: its directory and files, and the commands to run next."""

    out: str
    verdict: Verdict
    files: tuple[str, ...]
    linked: int
    commands: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return {"out": self.out, **self.verdict.as_dict(), "files": self.files, "linked": self.linked} | {
            "commands": self.commands,
            "commands_run": False,
        }

    def rows(self) -> list[tuple[str, str]]:
        """Returns the result as (name, value) rows for the screen."""
        done = [("written to", self.out), ("files", f"{len(self.files)}, {self.linked} of them hard-linked")]
        return [*self.verdict.rows(), *done, *(("next (not run)", line) for line in self.commands)]


def plan_export(model: str, target: str, out: Path | None = None, force: bool = False) -> ExportPlan:
    """Finds a model and checks it for a target, without writing anything.

    Raises InputError for an unknown target, for an adapter that is not merged, and for an output that exists.
    """
    if target not in TARGETS:
        raise InputError(f"--target {target!r}: allowed are {', '.join(TARGETS)}")
    if (Path(model) / "adapter_config.json").is_file():
        raise InputError(
            f"{model} is an adapter, which no target supports", hint=f"merge it first: ctxext merge {model}"
        )
    source = resolve(model)
    require_tokenizer(source.directory)
    out = out or manifests.default_out(f"export-{target}", source.name)
    check_free(out, force, keep=[source.path])
    judged = verdict(target, source.config, first_model(source.directory), read_config(source.directory))
    return ExportPlan(source, judged, out, force)


def export(plan: ExportPlan) -> Exported:
    """Writes the directory.

    Raises CheckFailed where the target does not honour the model, or where a text contains a local path.
    """
    plan.verdict.refuse()
    source, directory = plan.source, plan.source.directory
    weights = sorted({info.file for info in tensors_of(source).values()})
    tokenizer, problem = _tokenizer_files(plan)
    # Files with new content: the card, and settings without local paths. All other files are copied.
    texts = {
        "README.md": write_card(
            source, plan.verdict, _commands(plan, ".") if plan.verdict.target != "hf" else (), tokenizer_problem=problem
        ),
        "config.json": _plainly(read_object(directory / "config.json") | _rope(source.config)),
        **tokenizer,
    }
    if plan.verdict.target == "ollama":
        texts["Modelfile"] = f"FROM ./{_plain(source.name)}.gguf\nPARAMETER num_ctx {source.usable_length}\n"
    copied = {name: directory / name for name in {INDEX, *companions(directory)} - texts.keys()}
    # Search before anything is written, so that a leak leaves no output.
    small = {name: path for name, path in copied.items() if path.is_file() and path.stat().st_size <= SEARCHED}
    _search(texts | {name: path.read_text("utf-8", "replace") for name, path in small.items()}, source)
    with staged_output(plan.out, plan.force) as staging:
        linked = sum(_place(directory / name, staging / name) for name in weights)
        for name, path in copied.items():
            if path.is_file():
                (staging / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(path, staging / name)
        manifests.write(staging, _manifest(plan, weights))
        # config.json last: a directory with it is a complete model.
        for name in sorted(texts, key=lambda name: name == "config.json"):
            (staging / name).write_text(texts[name], "utf-8")
        files = tuple(sorted(path.relative_to(staging).as_posix() for path in staging.rglob("*") if path.is_file()))
    return Exported(str(plan.out), plan.verdict, files, linked, _commands(plan, str(plan.out)))


def _tokenizer_files(plan: ExportPlan) -> tuple[dict[str, str], str | None]:
    """Returns the tokenizer files that are changed, and the remaining problem of AutoTokenizer (None for no problem).

    The problem is that AutoTokenizer and tokenizer.json give different ids. Then it raises CheckFailed for every target
    except hf: those programs open the tokenizer with AutoTokenizer, and only Python code can open it another way.
    """
    from ctxext.model.tokenizer import SETTINGS, settle, version

    directory = plan.source.directory
    settled = settle(directory, read_object(directory / "config.json"))
    if settled.problem is not None and plan.verdict.target != "hf":
        raise CheckFailed(
            f"{plan.verdict.target} opens the tokenizer with AutoTokenizer, which ({version()}) gives other ids than "
            f"tokenizer.json: {settled.problem}",
            hint="ctxext convert it to a class without its own tokenizer class, or use --target hf",
        )
    # The settings file is always rewritten, because it may contain a local path.
    files = {name: data.decode() for name, data in settled.files.items()}
    if SETTINGS in files:
        files[SETTINGS] = _plainly(json.loads(files[SETTINGS]))
    elif (directory / SETTINGS).is_file():
        files[SETTINGS] = _plainly(read_object(directory / SETTINGS))
    return files, settled.problem


def _place(source: Path, out: Path) -> bool:
    """Hard-links (returns True) or copies a weight file; follows symbolic links, such as those of the hub's cache."""
    real = source.resolve()
    try:
        os.link(real, out)
        return True
    except OSError:  # another file system, or one without links
        shutil.copyfile(real, out)
        return False


def _rope(config: ModelConfig) -> Fields:
    """Returns the RoPE fields for both transformers 4 and 5; the model's own file may have those of one version."""
    both = written_for_both(config.fields)
    return {name: both[name] for name in ("rope_parameters", "rope_theta", "rope_scaling", ORIGINAL) if name in both}


def _plainly(settings: Mapping[str, Any]) -> str:
    """Returns the text of a JSON file without the path from which transformers read it."""
    kept = {name: value for name, value in settings.items() if name not in NAMES}
    return json.dumps(kept, indent=2, ensure_ascii=False) + "\n"


def _manifest(plan: ExportPlan, weights: Sequence[str]) -> manifests.Manifest:
    source = plan.source
    hashes = {name: value for name, value in manifests.weight_hashes(source.directory).items() if name in weights}
    lengths = {"original_length": source.original_length, "usable_length": source.usable_length}
    return manifests.new(
        "export",
        command=["ctxext", "export", source.name, "--target", plan.verdict.target],
        spec={"target": plan.verdict.target},
        parents={"model": {"path": source.name, "weights": hashes}},
        facts={"name": source.name, **lengths, "layout": plan.verdict.layout, "weights": hashes},
    )


def _search(texts: Mapping[str, str], source: ModelSource) -> None:
    """Raises CheckFailed when a text contains the user's home, the working directory or a directory of the history."""
    places = {str(Path.home()), str(Path.cwd())}
    places |= {str(step.path) for step in history(source.directory) if step.path is not None}
    for name, text in texts.items():
        for place in places - {"/"}:
            # The lookahead avoids a match on the first part of a longer name, such as /home/al in /home/alice.
            if re.search(rf"{re.escape(place)}(?![\w.-])", text):
                raise CheckFailed(
                    f"{name} would contain {place}, a path of this machine", hint="remove it from the source"
                )


def _commands(plan: ExportPlan, here: str) -> tuple[str, ...]:
    """Returns the commands to run next; ctxext does not run them."""
    judged, source, name = plan.verdict, plan.source, _plain(plan.source.name)
    if judged.target == "hf":
        return (f"hf upload YOUR-NAME/{name} {here}",)
    if judged.target == "vllm":
        backend = " --model-impl transformers" if judged.model_type == "mellum" else ""
        return (f"vllm serve {here} --max-model-len {source.usable_length}{backend}",)
    stored = str(source.config.dtype)
    kind = {"float16": "f16", "bfloat16": "bf16"}.get(stored, "f32")
    gguf = f"python llama.cpp/convert_hf_to_gguf.py {here} --outfile {here}/{name}.gguf --outtype {kind}"
    if judged.target == "gguf":
        return gguf, f"llama-cli -m {here}/{name}.gguf -c {source.usable_length}"
    return gguf, f"ollama create {name} -f {here}/Modelfile"


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"
