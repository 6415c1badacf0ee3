"""A pipeline as text: its cells, and every fault at once."""

import pytest
import yaml

from ctxext import api
from ctxext.config import presets
from ctxext.errors import InputError, SpecError
from ctxext.study import steps
from ctxext.study.pipeline import read_pipeline
from ctxext.study.pipeline_presets import READ, validated
from ctxext.study.run_pipeline import CALLBACKS, RUNS


@pytest.fixture
def read(tmp_path):
    def reading(data, **changes):
        path = tmp_path / "p.yaml"
        path.write_text(data if isinstance(data, str) else yaml.safe_dump(data, sort_keys=False))
        return read_pipeline(str(path), changes)

    return reading


SWEEP = {
    "values": {"model": "tiny", "text": None},
    "over": {"hybrid": ["SN", "SSSN"], "rank": [8, 16]},
    "steps": {
        "convert": {"command": "convert", "model": "${model}", "hybrid": "${hybrid}", "sliding_window": 32},
        "heal": {"command": "finetune", "model": "${convert}", "preset": "heal", "settings": {"lora.rank": "${rank}"}},
        "before": {"command": "eval", "models": "${model}", "data": "${text}"},
        "page": {"command": "report", "runs": ["${before}", "${heal[*]}"]},
    },
}


def test_a_step_runs_for_the_axes_that_it_or_a_step_it_names_depends_on(read):
    jobs = {job.id: job for job in read(SWEEP).jobs}
    assert list(jobs) == [
        "convert.SN", "convert.SSSN", "heal.SN.8", "heal.SN.16", "heal.SSSN.8", "heal.SSSN.16", "before", "page",
    ]  # fmt: skip
    assert jobs["heal.SSSN.8"].uses == {"convert": "convert.SSSN"}
    assert jobs["heal.SSSN.8"].arguments["settings"] == {"lora.rank": 8}
    assert jobs["page"].collects == {"heal": ("heal.SN.8", "heal.SN.16", "heal.SSSN.8", "heal.SSSN.16")}
    assert jobs["page"].cell == {} and jobs["before"].arguments["data"] is None


def test_set_changes_a_value_an_axis_or_any_part(read):
    changes = {"model": "llama2-7b", "over.rank": [4], "steps.convert.sliding_window": 64}
    jobs = read(SWEEP, **changes).jobs
    assert len(jobs) == 6 and jobs[0].arguments["model"] == "llama2-7b" and jobs[0].arguments["sliding_window"] == 64
    with pytest.raises(SpecError, match="modell: no value has this name; allowed: model, text"):
        read(SWEEP, modell="x")


def test_set_of_a_field_within_settings_leaves_the_presets_other_fields(read):
    """`training.lora.rank` is the dotted key lora.rank of settings, not a new mapping lora."""
    pipeline = {"values": {"training": {"lora.alpha": 8.0}}, "steps": {
        "a": {"command": "finetune", "model": "tiny", "ctx": "2k", "preset": "longlora", "settings": "${training}"},
    }}  # fmt: skip
    job = read(pipeline, **{"training.lora.rank": 16}).jobs[0]
    assert job.arguments["settings"] == {"lora.alpha": 8.0, "lora.rank": 16}
    spec = steps.resolved("finetune", steps.read("finetune", job.arguments, source="a"))
    assert (spec.lora.rank, spec.lora.alpha, spec.attention.train) == (16, 8.0, "s2")


def test_numbers_of_steps_may_stand_where_numbers_are_wanted(read):
    step = {"command": "finetune", "model": "tiny", "ctx": "${fits.ctx}", "steps": "${fits.fitting}"}
    pipeline = {"steps": {"fits": {"command": "plan", "model": "tiny", "ctx": "2k", "gpu": "h100"}, "train": step}}
    assert read(pipeline).jobs[1].uses == {"fits": "fits"}
    with pytest.raises(SpecError, match=r"steps.train.stepps"):
        read({"steps": pipeline["steps"] | {"train": step | {"stepps": 1}}})


def test_values_that_differ_by_a_sign_are_different(read):
    page = {"command": "report", "runs": "runs/x", "title": "at ${seed}"}
    assert [job.id for job in read({"over": {"seed": [1, -1]}, "steps": {"e": page}}).jobs] == ["e.1", "e.-1"]


def test_every_fault_is_told_at_once_with_its_path(read):
    with pytest.raises(SpecError) as caught:
        read({
            "values": {"model": "tiny", "idle": 1},
            "over": {"rank": [8, 8]},
            "steps": {
                "a": {"command": "convert", "model": "${model}", "hybrid": "swa128-nop"},
                "b": {"command": "train"},
                "c": {"command": "finetune", "model": "${d}", "ctx": "2k", "settings": {"lora.rank": "${rank}"}},
                "d": {"command": "merge", "run": "${nobody}"},
            },
        })  # fmt: skip
    faults = "\n".join(caught.value.faults)
    for expected in (
        "values.idle: no step uses it",
        "over.rank: a value is given twice",
        "steps.b.command: got 'train'",
        "steps.c: ${d}: this step does not come before",
        "steps.d: ${nobody}: no value, axis or step has this name",
    ):
        assert expected in faults, faults


def test_presets_and_fields_of_steps_are_read_too(read):
    with pytest.raises(SpecError) as caught:
        read({"steps": {
            "a": {"command": "convert", "model": "tiny", "hybrid": "swa128-nop"},
            "b": {"command": "finetune", "model": "${a}", "ctx": "2k", "preset": "longlorra"},
            "c": {"command": "finetune", "model": "${a}", "ctx": "2k", "settings": {"lora.rank": "many"}},
            "d": {"command": "eval", "models": "${a}", "suite": "perplexity", "lengths": ["2 apples"]},
            "e": {"command": "probe", "model": "${a}", "names": ["nose"]},
            "f": {"command": "merge", "run": "${a}", "dtyp": "float32"},
        }})  # fmt: skip
    faults = "\n".join(caught.value.faults)
    for step, expected in {
        "a": "swa128-nop",
        "b": "longlorra",
        "c": "lora.rank",
        "d": "2 apples",
        "e": "nose",
        "f": "dtyp",
    }.items():
        assert any(line.startswith(f"steps.{step}") and expected in line for line in caught.value.faults), faults


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("steps: {}", "steps: none"),
        ("steps: {a: {command: merge, run: x}, 'a b': {command: merge, run: x}}", "steps.a b"),
        ("values: {a: 1}\nsteps: {a: {command: merge, run: '${a}'}}", "the name is taken"),
        ("over: {n: []}\nsteps: {a: {command: merge, run: '${n}'}}", "over.n: empty"),
        ("values: {a: '${b}'}\nsteps: {s: {command: merge, run: '${a}'}}", "a value may not hold a reference"),
        ("steps: {a: {command: merge, run: '${a'}}", "is not a reference"),
        (f"over: {{n: {list(range(1001))}}}\nsteps: {{a: {{command: merge, run: '${{n}}'}}}}", "1,001 cells"),
        ("over: {n: ['${a}']}\nsteps: {s: {command: merge, run: '${n}'}}", "a value may not hold a reference"),
        ("steps: {state: {command: merge, run: x}}", "state is the name of a file in the output of every pipeline"),
        ("steps: {a: {command: [merge], run: x}}", "steps.a.command: got \\['merge'\\]"),
        ("values: 5\nsteps: {a: {command: merge, run: x}}", "values"),
        ("values: {m: tiny}\nsteps: {a: {command: merge, run: '${m.name}'}}", "'name' is unknown; allowed: none"),
        ("steps: {a: &x {command: merge, run: b}, c: *x}", "anchors"),
    ],
)
def test_bad_pipelines_are_refused(read, text, said):
    with pytest.raises(SpecError, match=said):
        read(text)


def test_a_step_takes_the_arguments_of_the_function_it_calls():
    import inspect

    others = {"out", "force", "resume", "repeat", "allow_pickle", "on_plan"}
    for command, cls in steps.REQUESTS.items():
        arguments = set(inspect.signature(RUNS[command]).parameters) - others
        assert set(cls.__dataclass_fields__) == arguments - set(CALLBACKS[command]), command
        assert set(CALLBACKS[command]) == arguments & {"say", "progress", "on_step"}


def test_every_function_of_the_package_is_found_by_name():
    import ctxext

    for name in ctxext.__all__[1:]:
        assert getattr(ctxext, name) is getattr(api, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        ctxext.nothing  # noqa: B018


def test_from_python_paths_and_lists_are_taken_as_they_come(model_dir, tmp_path):
    (tmp_path / "own.yaml").write_text("layer_pattern: SN\nsliding_window: 8\n")
    made = api.convert(model_dir(), tmp_path / "own.yaml", full_layers=[1, 2], out=tmp_path / "a", gate=False)
    assert made.layout == "SNNS, window 8"
    with pytest.raises(InputError, match="calibration needs --full-layers auto"):
        api.convert(model_dir(), "SN", sliding_window=8, calibration=tmp_path, out=tmp_path / "b")


def test_every_preset_that_ships_is_in_order():
    found = validated()
    assert set(READ) == set(presets.KINDS) and len(found) > 30
    assert {name: faults for name, faults in found if faults} == {}


def test_a_preset_with_a_fault_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for kind, text in (("finetune", "stepss: 3"), ("hybrid", "pattern: SX"), ("pipelines", "steps: {}")):
        place = tmp_path / "presets" / kind
        place.mkdir(parents=True)
        (place / "mine.yaml").write_text(text)
    faulty = {name for name, faults in validated() if faults}
    assert faulty == {"finetune/mine", "hybrid/mine", "pipelines/mine"}
    with pytest.raises(InputError, match="mine is a preset of hybrid and finetune and pipelines"):
        validated("mine")
    assert len(validated("finetune/heal")) == len(validated("heal")) == 1
    (tmp_path / "own.yaml").write_text("stepss: 3")
    with pytest.raises(InputError, match="own.yaml: its kind of preset is not known") as refused:
        validated("own.yaml")
    assert refused.value.hint.startswith("KIND/own.yaml; kinds are models, ")
    assert "stepss" in validated("finetune/own.yaml")[0][1][0] and validated(f"finetune/{tmp_path / 'own.yaml'}")[0][1]


@pytest.mark.parametrize("kind", presets.KINDS)
def test_a_preset_begins_with_why(kind):
    silent = {name for name in presets.names(kind) if not presets.comment(kind, name)}
    assert silent <= {"llama2-7b", "llama2-13b", "llama3-8b"}, silent  # which have nothing odd
