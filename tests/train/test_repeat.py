"""`--repeat`: the same run again from its directory alone, to the bit; refused where model or data moved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

from ctxext.cli import finetune as command
from ctxext.config.loader import build
from ctxext.errors import InputError, ModelError
from ctxext.model.source import resolve
from ctxext.model.tokenizer import load_tokenizer
from ctxext.train.finetune import run_finetune
from ctxext.train.finetune_spec import FinetuneSpec
from ctxext.train.launch import LAUNCH
from ctxext.train.loop import Events
from ctxext.train.parallel import Host, Launch, plan_launch, read_zero
from ctxext.train.prepare import prepare_data
from ctxext.train.run_directory import plan_repeated, start_run
from ctxext.train.run_plan import plan_run


@pytest.fixture
def first(write_model, tmp_path) -> Path:
    """A run's directory with its model and data beside it; nothing was trained."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Line {i} of a text that is cut into sequences. {i * i}\n" for i in range(200)))
    model = write_model(tmp_path / "model", "llama")
    fields = {"ctx": 64, "steps": 3, "global_batch_size": 2, "data": {"source": str(text)}, "seed": 5}
    start_run(plan_run(resolve(str(model)), build(FinetuneSpec, fields, source="test")), tmp_path / "first")
    return tmp_path / "first"


def finetune(*arguments: object):
    """The command, in this process."""
    app = typer.Typer()
    app.command()(command.finetune)
    return CliRunner().invoke(app, [*map(str, arguments)])


def lines(run: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def test_a_repeated_run_is_the_first_to_the_bit_and_a_changed_one_is_not(first, tmp_path):
    run_finetune(plan_repeated(first)[0], first)
    again, other = tmp_path / "again", tmp_path / "other"
    done = finetune("--repeat", first, "--out", again, "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["finished"], done.output
    for name in ("loss", "gradient_norm", "tokens"):
        assert [line[name] for line in lines(again)] == [line[name] for line in lines(first)]
    assert [line["loss"] for line in lines(again, "validation.jsonl")] == [
        line["loss"] for line in lines(first, "validation.jsonl")
    ]
    assert (again / "spec.yaml").read_text() == (first / "spec.yaml").read_text()
    assert finetune("--repeat", first, "--out", other, "--set", "seed=6", "--steps", 2).exit_code == 0
    assert len(lines(other)) == 2 and lines(other)[0]["loss"] != lines(first)[0]["loss"]


def test_what_moved_is_named_and_accepted_when_told(first, write_model, tmp_path):
    (tmp_path / "text.txt").write_text("other text " * 2000)
    with pytest.raises(InputError, match=r"the data, .*text.txt \(changed\)"):
        plan_repeated(first)
    longer = tmp_path / "longer.txt"
    longer.write_text("longer text " * 2000)
    assert plan_repeated(first, {"data.source": str(longer)})[1] == []  # that is another run, as asked for
    write_model(tmp_path / "model", "llama", seed=1)
    with pytest.raises(InputError, match=r"model.safetensors \(changed\), the data, ") as caught:
        plan_repeated(first)
    assert "--force" in caught.value.hint
    plan, moved = plan_repeated(first, accept=True)
    assert plan.spec.seed == 5 and len(moved) == 2
    said = finetune("--repeat", first, "--plan", "--force")
    assert said.exit_code == 0 and said.stderr.count("warning: changed since") == 2
    (tmp_path / "model").rename(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match="no longer exists"):
        plan_repeated(first, accept=True)


def test_what_makes_no_sense_is_refused(first, tmp_path):
    for arguments, told in (
        (["--repeat", tmp_path], "not a run"),
        (["--repeat", first, "--resume"], "give one of them"),
        ([tmp_path / "model", "--repeat", first], "without MODEL"),
        (["--repeat", first, "--out", first, "--force"], "which --force does not replace"),
    ):
        error = finetune(*arguments).exception
        assert isinstance(error, InputError) and told in f"{error.message} {error.hint}", arguments


def test_it_starts_as_the_first_was_started(first):
    launch = Launch(read_zero("3"), (Host("localhost", 2),), resume=True)
    (first / LAUNCH).write_text(launch.dump())
    where = {
        arguments: json.loads(finetune("--repeat", first, "--plan", "--json", *arguments).stdout)["launch"]
        for arguments in ((), ("--nproc", "1"), ("--zero", "2", "--nproc", "2"))
    }
    told = [(launch["processes"], launch["zero_stage"], launch["nodes"]) for launch in where.values()]
    assert told == [(2, 3, 1), (1, None, 1), (2, 2, 1)]
    plan = plan_repeated(first)[0]
    assert plan_launch(plan, None, None, None, repeats=launch) == Launch(launch.zero, launch.hosts)


def test_the_memory_of_a_plan_is_that_of_one_process(first):
    whole, part = (
        json.loads(finetune("--repeat", first, "--plan", "--json", *arguments).stdout)["memory"]
        for arguments in ((), ("--zero", "2", "--nproc", "2"))
    )
    assert part["trainable"] == whole["trainable"] // 2 and part["total"] < whole["total"]


def test_a_run_from_before_a_setting_continues_as_it_began(first):
    """Older versions had no sink tokens, no BOS in documents, frozen sinks: no defaults for their runs."""
    path = first / "spec.yaml"
    fields = yaml.safe_load(path.read_text())
    assert fields["spec"]["attention"].pop("sinks") == "auto" and fields["spec"]["data"].pop("bos") is True
    assert fields["spec"]["lora"].pop("sinks") == "full"
    path.write_text(yaml.safe_dump(fields))
    spec = plan_repeated(first)[0].spec
    assert (spec.attention.sinks, spec.data.bos, spec.lora.sinks) == (0, False, "frozen")


@pytest.mark.parametrize("bos", [True, False])
def test_documents_begin_with_bos_where_the_tokenizer_adds_one(first, write_model, tmp_path, bos):
    """As `tokenizer(text)` gives it, at the start of every document; the model's own tokenizer is read, no field."""
    model = tmp_path / "model"
    state = json.loads((model / "tokenizer.json").read_text())
    special, text = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    named = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
    state["post_processor"] = {"type": "TemplateProcessing", "single": [special, text], "pair": [special, text, text],
                               "special_tokens": named}  # fmt: skip
    (model / "tokenizer.json").write_text(json.dumps(state))
    fields = {"ctx": 64, "steps": 1, "data": {"source": str(tmp_path / "text.txt"), "bos": bos}}
    plan = plan_run(resolve(str(model)), build(FinetuneSpec, fields, source="test"))
    assert load_tokenizer(plan.source.path)("a")["input_ids"][0] == 1
    sequences, _ = prepare_data(plan, Events())
    assert [int(sequences.store.read(start, start + 1)[0]) == 1 for start in sequences.store.bounds] == [bos]
