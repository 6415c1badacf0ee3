"""A command's arguments are declared once: options, functions and steps take the same, and refuse the same."""

import inspect
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from ctxext import api, requests
from ctxext.cli.options import takes
from ctxext.errors import SpecError
from ctxext.requests import (
    ConvertRequest,
    EvalRequest,
    FinetuneRequest,
    MergeRequest,
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
    assert len(REQUESTS) == 9


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
    assert read(EvalRequest).models == ()
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


def test_paths_become_text():
    request = read_request(ConvertRequest, {"model": Path("a/b"), "hybrid": Path("own.yaml")}, source="convert")
    assert (request.model, request.hybrid) == ("a/b", "own.yaml")
