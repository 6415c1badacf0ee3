"""`ctxext convert --full-layers auto` and `retrieval` as they are typed, in this process."""

import json

import pytest
from typer.testing import CliRunner

from ctxext.cli.app import app
from ctxext.config import manifest
from ctxext.errors import InputError
from ctxext.model.source import resolve

PROSE = "A lighthouse keeper counted the ships and wrote each name beside the hour. " * 60


@pytest.fixture
def convert(model_dir, tmp_path):
    directory = model_dir("llama", max_position_embeddings=256)
    (tmp_path / "prose.txt").write_text(PROSE)

    def run(*options, code=0):
        arguments = [
            "convert",
            str(directory),
            "--hybrid",
            "SN",
            "--sliding-window",
            "16",
            "--out",
            str(tmp_path / "o"),
        ]
        done = CliRunner().invoke(app, [*arguments, *map(str, options)])
        if done.exception and not isinstance(done.exception, SystemExit):
            raise done.exception
        assert done.exit_code == code, done.output
        return done

    return run


def test_it_measures_chooses_converts_and_keeps_what_it_found(convert, tmp_path):
    auto = ["--full-layers", "auto", "--budget", "1", "--calibration", tmp_path / "prose.txt"]
    done = convert(*auto, "--calibration-tokens", 512, "--explain")
    out = tmp_path / "o"
    kept = json.loads((out / "retrofit.json").read_text())
    full = kept["chosen"]["full"]
    assert len(full) == 1 and len(kept["layers"]) == 4 and len(kept["measured"]) == 16
    assert [i for i, kind in enumerate(resolve(str(out)).kinds) if kind.letter == "N"] == full
    facts = manifest.read(out).facts["planner"]
    assert facts["full_layers"] == full and facts["calibration"].endswith("prose.txt")
    assert (out / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert "chosen" in done.stdout and "best head" in done.stdout and "max logit difference 0" in done.stdout
    assert "16 layouts measured" in done.stderr

    data = json.loads(convert(*auto, "--calibration-tokens", 512, "--json", "--force").stdout)
    assert data["planner"]["chosen"] == kept["chosen"] and data["layout"] == kept["kinds"]


def test_no_full_layer_is_for_those_who_know(convert, tmp_path):
    auto = ["--full-layers", "auto", "--budget", "0", "--calibration", tmp_path / "prose.txt"]
    auto += ["--calibration-tokens", 512, "--no-gate"]
    with pytest.raises(InputError, match="the model could retrieve nothing further back than the window"):
        convert(*auto)
    assert not (tmp_path / "o").exists()
    done = convert(*auto, "--i-know")
    assert "the model can retrieve nothing further back than the window" in done.stderr
    assert {kind.letter for kind in resolve(str(tmp_path / "o")).kinds} == {"S"}


def test_retrieval_keeps_the_layer_with_the_strongest_retrieval_heads(tmp_path):
    """`tiny` retrieves in layer 1 (LOG.md). Fixed patterns with as many full layers are measured beside the choice."""
    out = tmp_path / "o"
    given = ["convert", "tiny", "--hybrid", "swa128", "--full-layers", "retrieval", "--budget", "1", "--out", str(out)]
    done = CliRunner().invoke(app, [*given, "--calibration-tokens", "512", "--explain"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    kept = json.loads((out / "retrofit.json").read_text())
    assert kept["chosen"]["full"] == [1] and kept["request"]["method"] == "retrieval"
    assert [i for i, kind in enumerate(resolve(str(out)).kinds) if kind.letter == "F"] == [1]
    assert manifest.read(out).facts["planner"]["full_layers"] == [1]
    # Beside the choice: one full layer at the first and at the last place of evenly spread ones, and SSSF.
    assert {tuple(choice["full"]) for choice in kept["measured"]} == {(0,), (1,), (3,)}
    answers = {tuple(choice["full"]): choice["damage"]["answer"] for choice in kept["measured"]}
    assert min(answers, key=answers.get) == (1,)
    assert "the layers whose heads attend most to the passkeys" in done.stderr


def test_retrieval_is_refused_for_a_model_that_does_not_retrieve(convert, tmp_path):
    given = ["--full-layers", "retrieval", "--budget", "1", "--calibration", tmp_path / "prose.txt"]
    with pytest.raises(InputError, match="does not retrieve passkeys: its loss at the answers is") as caught:
        convert(*given, "--calibration-tokens", 512)
    assert "--full-layers auto" in caught.value.hint and not (tmp_path / "o").exists()
    with pytest.raises(InputError, match="a budget of 0 full layers"):
        convert(*given[:2], "--budget", 0, "--i-know")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "2"], "--budget needs --full-layers auto"),
        (["--full-layers", "1,3", "--calibration-tokens", "8k"], "--calibration-tokens needs --full-layers auto"),
        (["--explain"], "--explain needs --full-layers auto"),
        (["--i-know"], "--i-know needs --full-layers auto"),
        (["--full-layers", "auto", "--hybrid", "SNF"], "--full-layers needs a layout with S"),
        (["--full-layers", "auto", "--sliding-window", "256"], "covers all of the 256 that this model supports"),
    ],
)
def test_what_makes_no_sense_is_refused_with_nothing_written(convert, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        convert(*options)
    assert not (tmp_path / "o").exists()
