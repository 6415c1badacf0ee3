"""A command's arguments are declared once: options, functions and steps take the same, and refuse the same."""

import inspect
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from ctxext import api, requests
from ctxext.cli.options import takes
from ctxext.errors import CtxextError, InputError, SpecError
from ctxext.requests import (
    ConvertRequest,
    EvalRequest,
    FinetuneRequest,
    MergeRequest,
    PlanRequest,
    ProbeRequest,
    accepts,
    eval_fields,
    options,
    probe_fields,
    read_request,
)

REQUESTS = [cls for name, cls in vars(requests).items() if name.endswith("Request")]


@accepts(EvalRequest)
def evaluation(request: EvalRequest, *, force: bool = False) -> tuple[EvalRequest, bool]:
    """A function as those of api.py."""
    return request, force


def read(request: type, *words: object) -> object:
    """The request that a command gets for these words of a command line."""
    got = []
    app = typer.Typer()

    @app.command()
    @takes(request)
    def command(request: request, force: bool = False) -> None:
        got.append(request)

    done = CliRunner().invoke(app, [*map(str, words)])
    assert done.exit_code == 0, (done.output, done.exception)
    return got[0]


def test_there_are_requests():
    assert len(REQUESTS) == 11


@pytest.mark.parametrize("cls", REQUESTS)
def test_every_field_has_help_and_the_command_line_takes_it(cls):
    @takes(cls)
    def command(request: cls, out: Path | None = None) -> None: ...

    offered = inspect.signature(command).parameters
    assert list(offered) == [*options(cls), "out"]
    assert all(option.help for _, option in options(cls).values())


def test_a_function_takes_a_request_or_its_fields():
    request = EvalRequest(models=("tiny", "other"), lengths=("1k", 2048), settings={"passkey.cases": 4})
    by_name = evaluation([Path("tiny"), "other"], lengths=["1k", 2048], settings={"passkey.cases": 4}, force=True)
    assert by_name == (request, True)
    assert evaluation(request) == (request, False)
    assert evaluation(("tiny", "other"), "passkey")[0].suite == "passkey"  # by position too
    names = [*options(EvalRequest), "force"]
    assert list(inspect.signature(evaluation).parameters) == names


def test_wrong_names_and_wrong_types_are_refused():
    with pytest.raises(TypeError, match=r"evaluation\(\) got an unexpected keyword argument 'limt'"):
        evaluation("tiny", limt=3)
    with pytest.raises(TypeError, match="positional argument"):
        evaluation(EvalRequest(models="tiny"), "passkey")
    with pytest.raises(SpecError, match="seed: got 'x'; allowed: a whole number") as refused:
        evaluation("tiny", seed="x", extrapolate=1)
    assert refused.value.message.startswith("evaluation: 2 faults")
    with pytest.raises(TypeError, match="missing a required argument: 'hybrid'"):
        api.convert("tiny")


def test_the_command_line_gives_the_same_request():
    assert read(ConvertRequest, "tiny", "--hybrid", "SN", "--class", "granite_swa", "--no-gate", "--i-know") == (
        ConvertRequest(model="tiny", hybrid="SN", model_class="granite_swa", gate=False, i_know=True)
    )
    assert read(FinetuneRequest) == FinetuneRequest()
    assert read(FinetuneRequest, "tiny", "--set", "a.b=[1, x]", "--set", "c=null", "--nproc", 2) == (
        FinetuneRequest(model="tiny", settings={"a.b": [1, "x"], "c": None}, nproc=2)
    )
    assert read(EvalRequest, "a", "b", "--lengths", "1k,2k", "--nope-log-scale", 500) == (
        EvalRequest(models=("a", "b"), lengths="1k,2k", nope_log_scale=500.0)
    )
    assert read(EvalRequest).models is None
    assert read(ProbeRequest, "tiny").names == "all"
    assert read(ProbeRequest, "tiny", "positions", "--ablate", 2).names == ("positions",)
    assert read(MergeRequest, "--alpha-multiplier", "0.8") == MergeRequest(alpha_multiplier="0.8")


def test_what_a_request_leaves_out_stays_as_a_preset_has_it():
    assert eval_fields(EvalRequest(models="tiny", suite="smoke", against="other")) == {}
    assert eval_fields(EvalRequest(models="tiny", lengths="1k, 2k", limit="4k", seed=0)) == {
        "lengths": ["1k", "2k"], "limit": 4096, "seed": 0,
    }  # fmt: skip
    assert eval_fields(EvalRequest(models="tiny", lengths=512, extrapolate=True)) == {
        "lengths": ["512"], "extrapolate": True,
    }  # fmt: skip
    # Settings come last.
    assert eval_fields(EvalRequest(models="tiny", seed=1, settings={"seed": 2}))["seed"] == 2
    assert probe_fields(ProbeRequest(model="tiny", preset="smoke", samples=3)) == {"samples": 3}


def test_values_are_taken_as_python_programs_have_them():
    given = {
        "model": Path("a/b"),
        "hybrid": Path("own.yaml"),
        "full_layers": range(1, 4),
        "sliding_window": np.int64(8),
    }
    request = read_request(ConvertRequest, given, source="convert")
    assert (request.model, request.hybrid, request.full_layers) == ("a/b", "own.yaml", (1, 2, 3))
    assert type(request.sliding_window) is int
    assert evaluation(Path(name) for name in "ab")[0].models == ("a", "b")
    assert evaluation("m\udcff")[0].models == "m\udcff"  # a file name that is not UTF-8
    assert evaluation("tiny", settings=None)[0].settings == {}
    assert evaluation("tiny", settings=MappingProxyType({"seed": 1}))[0].settings == {"seed": 1}
    with pytest.raises(SpecError, match="settings: got 3; allowed: a mapping"):
        evaluation("tiny", settings=3)


def test_what_is_empty_is_not_the_newest(tmp_path, monkeypatch):
    """`merge "$RUN"` with an empty variable must not merge another run."""
    monkeypatch.chdir(tmp_path)
    for call in (lambda: api.merge(""), lambda: api.evaluate([]), lambda: api.evaluate("")):
        with pytest.raises(CtxextError) as refused:
            call()
        assert "newest" not in refused.value.message and "no output" not in refused.value.message
    with pytest.raises(InputError, match="no output"):
        api.merge()


def test_a_context_may_be_a_number():
    answer = api.plan("tiny", 2048, gpu="h100")
    assert answer.as_dict()["ctx"] == 2048 and answer.commands()
    assert api.plan(PlanRequest(model="tiny", ctx=2048, gpu="h100")).as_dict() == answer.as_dict()


def test_a_repeated_run_has_its_own_model(tmp_path):
    with pytest.raises(InputError, match="--repeat uses the model and spec of the run"):
        api.plan_finetune("tiny", repeat=tmp_path)
    with pytest.raises(InputError, match="not allowed with --nproc"):
        api.find_multiplier("tiny", ctx=64, nproc=2)
