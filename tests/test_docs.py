"""The documentation is run: every `ctxext` and `make` line of docs/ and README.md is parsed by the real command line,
planned where a plan exists, and executed on the embedded model with the names and sizes of the tables below."""

from __future__ import annotations

import glob
import io
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import typer

from ctxext.cli.app import app
from ctxext.config import presets
from ctxext.errors import CheckFailed, CtxextError
from ctxext.study.pipeline import read_pipeline

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BY_NAME = {page.relative_to(ROOT).as_posix(): page for page in PAGES}
QUICK = "docs/getting-started.md"  # runs by default, the others with what is marked slow

# What is executed in place of what is written. Lengths too: `tiny` supports 512 tokens.
STANDS_FOR = dict.fromkeys(presets.names("models"), "tiny") | {
    "MODEL": "./my-model",
    "./merged": "./my-merged",
    "./converted": "./my-hybrid",
    "--budget 8": "--budget 2",
    "--budget 25%": "--budget 50%",
    "--full-layers 3,7,11": "--full-layers 1,3",
    "--calibrate": "--gpu h100",
    "steps: 20, global_batch_size: 4, micro_batch_size: 4": "steps: 2, global_batch_size: 1, micro_batch_size: 1",
    "--set limit=8k": "--set limit=2k --set suite=perplexity --set full_layers=odd",
    "convert my-model --hybrid swa128-nope --full-layers auto": "convert my-model --hybrid swa128-nope",
}
LENGTHS = {"4k": "384", "8k": "512", "16k": "640", "32k": "768", "64k": "896", "100k": "1k", "128k": "1k"}
# Options that make a command small; the last of two holds.
SMALL = {
    "finetune": "--steps 3 --set global_batch_size=1 --set micro_batch_size=1 --set optimizer.warmup_steps=0 "
    "--set validation.sequences=1",
    "eval": "--limit 2k --extrapolate",
    "probe": "--preset smoke",
    "generate": "--max-new-tokens 4",
    "chat": "--max-new-tokens 4",
}
# What is not executed, but parsed and, where it can be, planned.
NOT_HERE = {
    r"ctxext pretrain": "half an hour",
    r"ctxext run": "hours at their own sizes (tests/study/test_run.py runs every pipeline, and getting-started one)",
    r"finetune .*--(zero|nproc|hostfile)": "starts processes (tests/train/test_zero.py does)",
    r"finetune .*--resume": "needs a run that was interrupted (tests/train/test_faults.py has them)",
    r"probe .* all .*--length": "minutes (docs/commands/probe.md has the same at a smaller length)",
    r"\.gguf": "needs the file (tests/model/test_gguf.py writes some)",
    r"--suite (ruler|short|longbench)|--suite retrieval|,ruler": "RULER needs more than 512 tokens, the others data",
    r"--preset paper": "days",
    r"--alpha-multiplier auto|--nope-scale auto": "minutes of search (examples/retrofit.sh)",
}
MAY_SAY_NO = ("doctor", "export", "plan", "verify")  # exit code 1 is an answer: of this machine, this layout


@dataclass(frozen=True)
class Line:
    """A command as it stands in a page; `text` is one call, what is piped into it left out."""

    where: str
    text: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text, comments=True)


def blocks(page: Path, *languages: str) -> Iterator[tuple[int, str]]:
    """First line and text of the fenced blocks whose language is one of these."""
    for match in re.finditer(r"^ *```(\w*)\n(.*?)^ *```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL):
        if match[1] in languages:
            yield page.read_text("utf-8")[: match.start()].count("\n") + 2, match[2]


def shell(page: Path) -> list[Line]:
    """Every line of a page's shell blocks, those that a backslash joins as one."""
    found = []
    for first, text in blocks(page, "", "sh", "bash"):
        number = first
        for line in re.sub(r"\\\n\s*", lambda cut: " " + "\x00" * cut[0].count("\n"), text).splitlines():
            found.append(Line(f"{page.relative_to(ROOT)}:{number}", line.replace("\x00", "").strip()))
            number += 1 + line.count("\x00")
    return found


def commands(page: Path) -> list[Line]:
    """The calls of `ctxext` and `make` among them. What starts ctxext several times is left out."""
    starter = re.compile(r"(torchrun|accelerate launch|deepspeed|srun) .*?(?=ctxext )")
    parts = [Line(line.where, starter.sub("", part.strip())) for line in shell(page) for part in line.text.split(" | ")]
    return [line for line in parts if re.match(r"(ctxext|make) ", line.text)]


def leaf(words: list[str]):
    """The command that words name, its full name and the words after it."""
    command, names = typer.main.get_command(app), []
    rest = [word for word in words[1:] if word not in ("--quiet", "--debug")]
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        assert rest[0] in command.commands, f"there is no command {' '.join([*names, rest[0]])}"
        command, names, rest = command.commands[rest[0]], [*names, rest[0]], rest[1:]
    return command, " ".join(names), rest


def check(line: Line) -> None:
    """The command is there, it takes these words, and the presets they name exist."""
    if line.words[0] == "make":
        targets = set(re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
        assert targets.issuperset(line.words[1:]), f"the Makefile has {', '.join(sorted(targets))}"
        return
    command, name, rest = leaf(line.words)
    if "[--" in line.text:  # a synopsis
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        assert set(re.findall(r"--[\w-]+", line.text)) <= known
        return
    if rest in (["--version"], ["--install-completion"], ["-h"], ["--help"]):
        return
    given = command.make_context(f"ctxext {name}", rest).params
    kinds = {"preset": name, "hybrid": "hybrid", "pipeline": "pipelines"}
    named = [(kind, value) for option, kind in kinds.items() for value in (given.get(option) or "").split(",")]
    for kind, value in named:
        if kind in presets.KINDS and not re.fullmatch(r"[SNF]*|none|.*\.yaml", value):
            presets.find(kind, value)


def run(line: Line) -> None:
    """One call in this process. A refusal fails the test; a check that did not hold is an answer of some commands."""
    words = [part for word in line.words[1:] for part in in_place(word)]
    try:
        code = typer.main.get_command(app).main(words, prog_name="ctxext", standalone_mode=False)
    except CheckFailed:
        if leaf(line.words)[1] not in MAY_SAY_NO:
            raise
        code = 0
    except CtxextError as error:
        raise AssertionError(f"{line.where}: {' '.join(words)}\n{error.message}\nhint: {error.hint}") from error
    assert not code, f"{line.where}: {' '.join(words)} ended with {code}"


def in_place(word: str) -> list[str]:
    """A word, or what it stands for under the working directory: runs/...-convert-... is the newest of these."""
    # An absolute path of a page lies in the working directory too: a test leaves nothing on the machine.
    word = re.sub(r"^/(?!dev/)", "./", word)
    made = re.sub(r"20260101T[\d.]+Z-(\w+)-\w+", r"...-\1-...", word)
    made = "runs/...-finetune-..." if made == "runs/..." else made
    if not (made.startswith("runs/") and re.search(r"\.\.\.|\*", made)):
        return [word]
    found = sorted(glob.glob(made.replace("...", "*")))
    assert found, f"nothing was made that {word} could stand for"
    return found if "*" in made else found[-1:]


def small(line: Line) -> Line:
    """The line with the tables' names, lengths and options."""
    text = line.text
    for written, used in STANDS_FOR.items():
        text = re.sub(rf"(?<![\w./-]){re.escape(written)}(?![\w.-])", used, text)
    words = [shorter(word) for word in shlex.split(text, comments=True)]
    name = leaf(words)[1]
    more = SMALL.get(name, "")
    if name == "eval" and "--suite" in text:
        more = "--extrapolate" + (" --set passkey.cases=1" if "passkey" in text else "")
        more += " --limit 2k" if "perplexity" in text else "" if "smoke" in text else " --limit 4"
    return Line(line.where, shlex.join(words) + " " + more)


def shorter(word: str) -> str:
    if not re.fullmatch(r"[\dk,]+", word) and "=" not in word:
        return word
    return re.sub(r"(?<![\w.])\d+k\b", lambda length: LENGTHS.get(length[0], length[0]), word)


def plannable(line: Line) -> Line | None:
    """The line that plans it, names and lengths as written: for these no weights are needed."""
    name, text = leaf(line.words)[1], line.text.partition(" #")[0]
    if name == "plan" and "--calibrate" not in text:
        return line
    if name == "finetune" and not re.search("--resume|--find-multiplier", text):
        return Line(line.where, f"{text} --plan")
    if name != "run":
        return None
    if begin := re.search(r" --from ([\w-]+)", text):  # what comes before it was not run here
        assert begin[1] in read_pipeline(line.words[2]).steps, f"{line.where}: no step {begin[1]}"
        text = text.replace(begin[0], "").replace(" --force", "")
    return Line(line.where, f"{text} --dry-run")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from a second, and on a machine with other work they lose much."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """What the pages take for given: a model, text, hosts, and one output of every kind under runs/."""
    place = tmp_path_factory.mktemp("docs") / "place"
    (place / "books").mkdir(parents=True)
    shutil.copytree(ROOT / "presets" / "models" / "tiny", place / "my-model")
    for number, page in enumerate(PAGES):
        shutil.copy(page, place / "books" / f"{number}.md")
    for name in ("book.txt", "notes.txt"):
        shutil.copy(ROOT / "LOG.md", place / name)
    (place / "hosts").write_text("node1 slots=8\nnode2 slots=8\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for text in (
            "ctxext convert tiny --hybrid swa128-nope",
            "ctxext finetune --preset heal --data books/ --set faults.keep_at_end=true " + SMALL["finetune"],
            "ctxext merge --out my-merged",
            "ctxext eval --limit 1k",
        ):
            run(Line("the workplace", text))
        shutil.copytree(*glob.glob("runs/*-convert-*"), "my-hybrid")
    return place


@pytest.fixture
def place(workplace, tmp_path, monkeypatch) -> Path:
    shutil.copytree(workplace, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"import os\nimport sys\n")))
    return tmp_path / "place"


@pytest.mark.parametrize("name", BY_NAME)
def test_every_command_of_a_page_is_one_that_there_is(name):
    for line in commands(BY_NAME[name]):
        try:
            check(line)
        except Exception as error:  # of typer or of ours
            reason = getattr(error, "message", None) or str(error)
            raise AssertionError(f"{line.where}: {line.text}\n{reason}") from error


@pytest.mark.parametrize("name", BY_NAME)
def test_what_can_be_planned_is_planned_as_it_is_written(name, workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # plans for eight cards are not refused where there are fewer
    for line in commands(BY_NAME[name]):
        planned = plannable(line) if line.words[0] == "ctxext" and "[--" not in line.text else None
        if planned is not None:
            run(Line(planned.where, re.sub(r"\bMODEL\b", "./my-model", planned.text)))
            assert capsys.readouterr().out


def test_getting_started_runs_as_it_is_typed(tmp_path, monkeypatch, capsys):
    """Every line of the page, in its order, in one directory; with a real model of others' where one is at hand."""
    monkeypatch.chdir(tmp_path)
    for name in ("presets", "docs", "README.md", "LOG.md"):
        (tmp_path / name).symlink_to(ROOT / name)
    for line in shell(BY_NAME[QUICK]):
        if line.text.startswith("ctxext "):
            run(small(line))
        elif not re.match(r"git clone|cd |make |source |$", line.text):
            subprocess.run(["bash", "-ec", line.text], check=True, capture_output=True)
        stories = ROOT.parent / "shared" / "data" / "stories260K"
        if line.text.endswith(" my-model") and stories.is_dir():
            shutil.rmtree("my-model")
            shutil.copytree(stories, "my-model")
    assert "perplexity" in Path("long/results.md").read_text() and Path("long/page/report.html").is_file()
    assert Path("for-others/config.json").is_file() and Path("for-others/README.md").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in BY_NAME if name != QUICK])
def test_a_page_runs_on_the_embedded_model(name, place):
    for line in commands(BY_NAME[name]):
        if line.words[0] == "ctxext" and not any(re.search(text, line.text) for text in [*NOT_HERE, r"\[--"]):
            run(small(line))


@pytest.mark.parametrize("name", BY_NAME)
def test_links_lead_somewhere(name):
    text = re.sub(r"^```.*?^```", "", BY_NAME[name].read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", text)):
        if not re.match(r"https?:|mailto:|#", link):
            path = (BY_NAME[name].parent / link.partition("#")[0]).resolve()
            assert path.exists() and path.is_relative_to(ROOT), f"{name}: {link}"


def test_files_that_shell_lines_name_are_there():
    for page in PAGES:
        for line in shell(page):
            for path in re.findall(r"(?:^|\s)((?:examples|benchmarks|tools)/[\w./]+\.(?:sh|py))", line.text):
                assert (ROOT / path).is_file(), f"{line.where}: {path}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) < 200


def test_the_pages_of_commands_are_what_the_command_line_says():
    made = runpy.run_path(str(ROOT / "tools" / "commands.py"))["pages"]()
    found = {path.name: path.read_text("utf-8") for path in (ROOT / "docs" / "commands").glob("*.md")}
    assert found.keys() == made.keys(), "run `make docs`"
    for name, text in made.items():
        assert found[name] == text, f"docs/commands/{name} is old: run `make docs`"


def test_messages_that_are_explained_are_messages_of_the_package():
    """In troubleshooting.md a heading quotes a message; `...` stands for what differs from one time to the next."""
    strings = list(source_strings())
    quoted = re.findall(r"^### `(.+)`$", (ROOT / "docs" / "troubleshooting.md").read_text("utf-8"), re.MULTILINE)
    assert len(quoted) > 40
    for message in quoted:
        fixed = re.compile(".*".join(map(re.escape, message.split("..."))), re.DOTALL)
        assert any(fixed.search(string) for string in strings), f"no message of the package is {message!r}"


def source_strings() -> Iterator[str]:
    """Every text in the package's code, the pieces of f-strings and of texts that stand side by side joined."""
    import ast

    for path in (ROOT / "ctxext").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
            elif isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)


def test_the_memory_that_tables_state_is_what_plans_say(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # plans for eight cards are not refused where there are fewer
    made = runpy.run_path(str(ROOT / "tools" / "commands.py"))
    page = made["TRAINING"].read_text("utf-8")
    assert len(made["ROW"].findall(page)) > 12
    assert made["with_memory"](page) == page, "run `make docs`"


@pytest.mark.parametrize("name", ["docs/python.md", pytest.param("README.md", marks=pytest.mark.slow)])
def test_python_blocks_run_one_after_the_other(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "docs", "books", ignore=shutil.ignore_patterns("*.png"))
    names: dict[str, object] = {}
    for number, text in blocks(BY_NAME[name], "python"):
        text = text.replace('"global_batch_size": 1}', '"global_batch_size": 1, "validation.sequences": 1}')
        exec(compile(text, f"{name}:{number}", "exec"), names)
    assert capsys.readouterr().out.strip()


def test_the_floors_that_the_page_names_are_those_of_the_test():
    rows = re.findall(r"^\| (\d) \| (.*?) \|", BY_NAME["docs/architecture.md"].read_text("utf-8"), re.MULTILINE)
    stated = {name: int(floor) for floor, names in rows for name in re.findall(r"`(\w+)`", names)}
    assert stated == runpy.run_path(str(ROOT / "tests" / "test_floors.py"))["FLOORS"]
