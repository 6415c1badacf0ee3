"""The commands as users type them: exit codes, streams, refusals, nothing half-written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ctxext.cli import console

COMMANDS = {
    "convert": "--hybrid --out --full-layers --sliding-window --dtype --gate --no-gate --allow-pickle --force --json "
    "--budget --length --calibration --calibration-tokens --explain --i-know --class --sinks",
    "finetune": "--ctx --preset --data --out --steps --original-length --set --zero --nproc --hostfile --plan --resume "
    "--repeat --force --json --find-multiplier",
    "eval": "--suite --lengths --against --data --text-field --protocol --evaluator --limit --seed --dtype "
    "--extrapolate --set --out --force --json --nope-log-scale",
    "merge": "--out --dtype --force --json --alpha-multiplier --nope-scale --length --restore --data",
    "verify": "--ctx --attention --out --force --json",
    "probe": "--compare --preset --length --samples --ablate --data --seed --dtype --extrapolate --set --out --force "
    "--json",
    "pretrain": "--preset --out --force --json",
    "report": "--out --title --force --json",
    "plan": "--ctx --hybrid --gpu --memory --gpus --preset --set --calibrate --json",
    "generate": "--prompt --file --question --max-new-tokens --temperature --seed --chat --no-chat --dtype --device "
    "--json",
    "chat": "--max-new-tokens --temperature --seed --chat --no-chat --dtype --device --json",
    "export": "--target --out --check-only --force --json",
    "doctor": "--json",
    "run": "--set --from --dry-run --untrusted --out --force --json",
    "presets list": "--json",
    "presets show": "--json",
    "presets validate": "--json",
}


def ctxext(*arguments: object, cwd: Path, code: int = 0) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", "from ctxext.cli import main; main()", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == code, f"{arguments} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done


def test_the_commands_and_their_options_are_these():
    import typer

    from ctxext.cli.app import app

    group = typer.main.get_command(app)
    commands = {}
    for name, command in group.commands.items():
        below = getattr(command, "commands", None)
        commands |= {f"{name} {sub}": of for sub, of in below.items()} if below else {name: command}
    found = {
        name: {o for p in command.params for o in (*p.opts, *p.secondary_opts) if o.startswith("-")}
        for name, command in commands.items()
    }
    assert found == {name: set(options.split()) for name, options in COMMANDS.items()}


@pytest.mark.parametrize("arguments", [["--help"], *[[*name.split(), "--help"] for name in COMMANDS]], ids=" ".join)
def test_help_imports_no_torch(arguments, tmp_path):
    code = (
        "import sys, atexit; from ctxext.cli import main\n"
        "atexit.register(lambda: sys.stderr.write('TORCH' if 'torch' in sys.modules else 'light'))\n"
        f"sys.argv = ['ctxext', *{arguments!r}]; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "light", done.stderr
    assert "Examples" in done.stdout or arguments == ["--help"]


def refusals(model: Path, weights: Path) -> list[tuple[list[str], str]]:
    return [
        (["convert", "lama2-7b", "--hybrid", "swa128-nope"], "llama2-7b"),
        (["convert", str(model), "--hybrid", "swa128-nop"], "swa128-nope"),
        (["merge", "nope"], "there is no directory 'nope' here, and no model preset is named 'nope'"),
        (["convert", str(model), "--hybrid", "SN"], "--sliding-window"),
        (["convert", str(model.parent), "--hybrid", "full"], "no config.json"),
        (["convert", "./nowhere", "--hybrid", "full"], "no such directory"),
        (["convert", str(model), "--hybrid", "full", "--dtype", "fp8"], "float32, bfloat16, float16"),
        (["convert", str(model), "--hybrid", "full", "--out", str(model)], "--force"),
        (["finetune", str(model), "--ctx", "0"], "ctx"),
        (["finetune", str(model), "--ctx", "3.5q"], "3.5q"),
        (["finetune", str(model)], "--ctx"),
        (["finetune", "--ctx", "1k"], "give a directory"),
        (["finetune", str(model), "--ctx", "1k", "--preset", "lora-alfa"], "lora-alpha"),
        (["finetune", str(model), "--ctx", "1k", "--set", "lora.rnk=8", "--set", "stepps=3"], "stepps"),
        (["finetune", str(model), "--ctx", "1k", "--set", "lora.rank"], "key=value"),
        (["finetune", "--resume"], "no unfinished run"),
        (["eval", str(model), "--suite", "mmlu"], "perplexity, longppl, passkey"),
        (["eval", str(model), "--lengths", "1k"], "usable length of"),
        (["eval", str(model), "--against", str(model)], "the only model"),
        (["eval", str(model), "--set", "passkey.cases=2"], "passkey, niah, ruler has cases"),
        (["eval", str(model), "--suite", "passkey", "--data", "no.txt", "--lengths", "64"], "no such file"),
        (["eval", str(model), "--lengths", "1"], "at least 2"),
        (["merge", str(model)], "has no adapter to merge"),
        (["merge"], "no output"),
        (["convert", "missing/", "--hybrid", "full"], "no such directory"),
        (["convert", str(model), "--hybrid", "full", "--out", str(model), "--force"], "which --force does not replace"),
        (["convert", str(model), "--hybrid", "full", "--sliding-window", "8"], "no sliding layers"),
        (["finetune", str(model), "--ctx", "1k", "--set", "data.synthetic_kinds=[]"], "synthetic_kinds"),
        (["eval", str(model), "--lengths", ""], "tokens"),
        (["verify", str(model), "--ctx", "3"], "at least 16"),
        (["report", "./nowhere"], "no such directory"),
        (["report", str(model)], "not an output of ctxext"),
        (["verify", str(model), "--attention", "foo"], "training, inference"),
    ]


def test_refusals_are_clear_import_no_torch_and_leave_nothing(model_dir, tmp_path):
    code = (
        "import sys; from ctxext.cli import main\n"
        "try: main()\n"
        "except SystemExit as stop: print(stop.code, 'torch' in sys.modules)"
    )
    for arguments, words in refusals(model_dir("llama"), tmp_path):
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert words in done.stderr and "Traceback" not in done.stderr, (arguments, done.stderr)
        assert done.stdout == "2 False\n" and done.stderr.startswith("error: "), (arguments, done.stdout, done.stderr)
    assert list(tmp_path.iterdir()) == []


def test_the_module_is_the_command(tmp_path):
    command = [sys.executable, "-m", "ctxext"]
    done = subprocess.run([*command, "--version"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
    done = subprocess.run([*command, "report", "./nowhere"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: "), done.stderr


def test_all_faults_of_a_spec_come_at_once(model_dir, tmp_path):
    (tmp_path / "mine.yaml").write_text("stepps: 3\nlora: {rnk: 8, alpha: big}\n")
    done = ctxext("finetune", model_dir("llama"), "--ctx", "1k", "--preset", "mine.yaml", cwd=tmp_path, code=2)
    assert all(words in done.stderr for words in ("stepps", "lora.rnk", "lora.alpha")), done.stderr


@pytest.mark.skipif(not hasattr(os, "statvfs"), reason="needs a full device")
def test_a_full_disk_is_the_environments_fault(model_dir, tmp_path):
    code = (
        "import sys, errno, shutil; from ctxext.cli import main; import ctxext.model.shards as shards\n"
        "def full(*a): raise OSError(errno.ENOSPC, 'No space left on device')\n"
        "shards.shutil.copyfile = full\nmain()"
    )
    arguments = ["convert", str(model_dir("llama")), "--hybrid", "full", "--out", "out"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 3 and "full" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_offline_hub_model_names_the_way_out(tmp_path):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    command = [sys.executable, "-c", "from ctxext.cli import main; main()", "convert", "llama2-7b", "--hybrid", "full"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 3 and "local directory" in done.stderr, done.stderr


def test_plan_needs_no_weights_and_prints_every_derived_number(tmp_path):
    done = ctxext("finetune", "llama2-7b", "--ctx", "100k", "--plan", cwd=tmp_path)
    for words in ("102,400 tokens", "factor 25", "groups of 25,600", "effective scale 90.51", "5 sequences, 512,000"):
        assert words in done.stdout, (words, done.stdout)
    long = ctxext("finetune", "llama3.1-8b", "--ctx", "100k", "--plan", "--json", cwd=tmp_path)
    plan = json.loads(long.stdout)
    assert plan["positions"]["rope_parameters"]["rope_type"] == "llama3"
    assert "unchanged" in plan["positions"]["summary"] and plan["group_size"] == 25_600


def test_the_four_commands_as_typed_in_a_directory_of_ones_own(model_dir, tmp_path):
    (tmp_path / "text.txt").write_text("In a hole in the ground there lived a number: 12345. " * 400)
    done = ctxext("convert", model_dir("llama"), "--hybrid", "swa128-nope", "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["gate"]["identity_max_diff"] == 0.0
    done = ctxext("finetune", "--ctx", "256", "--preset", "smoke", "--data", "text.txt", cwd=tmp_path)
    assert "no MODEL given" in done.stderr and "linear, factor 2" in done.stderr
    assert "all checked on disk" in done.stdout
    done = ctxext("eval", "--suite", "perplexity", "--lengths", "64,256", "--data", "text.txt", cwd=tmp_path)
    assert "-swa128-nope-256" in done.stdout and "hf-stride" in done.stderr
    done = ctxext("merge", cwd=tmp_path)
    assert "must be 0" in done.stdout
    kinds = [json.loads(path.read_text())["kind"] for path in sorted((tmp_path / "runs").glob("*/ctxext.json"))]
    assert kinds == ["conversion", "finetune", "eval", "merge"]
    done = ctxext("eval", "--suite", "passkey", "--lengths", "192", "--limit", "1", "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["models"][0]["model"].endswith("-merged")


def test_a_log_is_told_now_and_then_how_far_it_is(capsys, monkeypatch):
    """stderr is no terminal here: no bar is drawn, and hours of silence look like a hang."""
    with console.progress("loading") as told:
        told("reading", 1, 10)
        assert capsys.readouterr().err == ""
        monkeypatch.setattr(console, "SILENCE", -1.0)
        told("reading", 2_000, 10_000)
        assert capsys.readouterr().err == "reading: 2,000 of 10,000\n"
        monkeypatch.setattr(console, "quiet", True)
        told("reading", 3_000, 10_000)
    assert capsys.readouterr().err.strip() == ""  # older versions of rich end a bar that was never drawn with a line
