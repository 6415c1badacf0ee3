"""Imports go down only, no torch where a refusal must be quick, nothing over budget: read from the source."""

import ast
import graphlib
import runpy
import textwrap
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "ctxext"
FILES = sorted(PACKAGE.rglob("*.py"))
code_lines = runpy.run_path(str(PACKAGE.parent / "tools" / "size.py"))["code_lines"]

FLOORS = {
    "errors": 0,
    "units": 0,
    "progress": 0,
    "extras": 0,
    "ops": 1,
    "machine": 1,
    "config": 2,
    "requests": 3,
    "model": 3,
    "data": 4,
    "train": 5,
    "evals": 6,
    "retrofit": 7,
    "probes": 7,
    "eval_and_merge": 7,
    "finetuning": 7,
    "multiplier_search": 7,
    "report": 7,
    "study": 7,
    "api": 7,
    "generation": 7,
    "planning": 7,
    "export": 7,
    "doctor": 7,
    "cli": 8,
}
OUTSIDE_THE_FLOORS = {"", "__main__"}  # ctxext/__init__.py, which imports when it is asked for a name, and the way in

HEAVY = {"torch", "transformers", "peft", "accelerate", "deepspeed", "datasets", "bitsandbytes", "pyarrow", "numpy"}
LIGHT_FLOORS = ("errors", "units", "progress", "extras", "machine", "config", "cli")
LIGHT_FILES = {
    "ops/cost.py",
    "ops/low_rank.py",
    "model/source.py",
    "model/gguf.py",
    "model/gguf_config.py",
    "model/gguf_header.py",
    "model/layout.py",
    "model/families.py",
    "model/model_config.py",
    "model/hybrids.py",
    "model/frequencies.py",
    "model/positions.py",
    "model/adapter_plan.py",
    "train/finetune_spec.py",
    "train/run_plan.py",
    "train/schedule.py",
    "train/recompute.py",
    "train/memory_options.py",
    "train/multiplier.py",
    "train/teacher.py",
    "train/parallel.py",
    "train/ranks.py",
    "train/shared_run.py",
    "train/launch.py",
    "train/worker.py",
    "probes/probe_spec.py",
    "probes/probe_finding.py",
    "api.py",
    "requests.py",
    "finetuning.py",
    "multiplier_search.py",
    "retrofit/conversion.py",
    "generation.py",
    "model/config_fields.py",
    "planning/answer.py",
    "planning/calibrate.py",
    "planning/cards.py",
    "planning/search.py",
    "planning/time.py",
    "train/measured.py",
    "export/matrix.py",
    "export/spellings.py",
    "export/export_card.py",
    "export/write.py",
    "doctor/finding.py",
    "doctor/environment.py",
    "doctor/model.py",
    "study/steps.py",
    "study/flow.py",
    "study/pipeline.py",
    "study/pipeline_presets.py",
    "study/trust.py",
    "study/state.py",
    "study/results.py",
    "study/run_pipeline.py",
}
DRAWERS = {"utils", "util", "common", "base", "registry", "helpers", "helper", "misc"}
# Lines of code: comments, docstrings and blank lines are not counted, so that nobody saves on them.
FILE_LINES, OPS_FILE_LINES, FUNCTION_LINES, LOOP_LINES = 350, 200, 60, 90


def name(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def module(path: Path) -> tuple[str, ...]:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def is_module(parts: tuple[str, ...]) -> bool:
    path = PACKAGE.parent.joinpath(*parts)
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def imported(node: ast.stmt, at: Path) -> list[tuple[str, ...]]:
    """The modules one import statement names, in full; `from ctxext import units` names ctxext.units."""
    if isinstance(node, ast.Import):
        return [tuple(alias.name.split(".")) for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    source = tuple((node.module or "").split(".")) if node.module else ()
    if node.level:
        package = module(at) if at.name == "__init__.py" else module(at)[:-1]
        source = package[: len(package) - node.level + 1] + source
    return [(*source, alias.name) if is_module((*source, alias.name)) else source for alias in node.names]


def imports(path: Path, tree: ast.AST) -> list[tuple[int, tuple[str, ...]]]:
    """Line and module of every import below `tree`, those inside functions included."""
    return [(node.lineno, target) for node in ast.walk(tree) for target in imported(node, path)]


def at_import_time(path: Path) -> list[tuple[int, tuple[str, ...]]]:
    """As `imports`, less functions and `if TYPE_CHECKING`."""
    found: list[tuple[int, tuple[str, ...]]] = []
    waiting: list[ast.AST] = list(parse(path).body)
    while waiting:
        node = waiting.pop()
        found += [(node.lineno, target) for target in imported(node, path)]
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if not typing_only and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting += ast.iter_child_nodes(node)
    return found


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def room(parts: tuple[str, ...]) -> str:
    return parts[1] if len(parts) > 1 else ""


def each_file(*, but: set[str] = frozenset()):
    return pytest.mark.parametrize("path", [path for path in FILES if name(path) not in but], ids=name)


def test_there_is_something_to_check():
    assert {"errors.py", "units.py", "config/loader.py"} <= {name(path) for path in FILES}


@each_file()
def test_every_file_has_its_floor(path):
    own = room(module(path))
    assert own in FLOORS or own in OUTSIDE_THE_FLOORS, f"{name(path)} stands on no floor of the list above"


@each_file(but={"__main__.py", "__init__.py"})
def test_imports_go_down(path):
    own = room(module(path))
    floor = FLOORS.get(own, -1)
    up = []
    for line, target in imports(path, parse(path)):
        if target[0] != "ctxext":
            continue
        other = room(target)
        if FLOORS.get(other, -1) > floor:
            up.append(f"{name(path)}:{line} imports {'.'.join(target)}")
    assert not up, f"floor {floor} ({own}) may not import these: {up}"


def runtime_imports(path: Path) -> set[tuple[str, ...]]:
    """The modules of the package that a file imports, inside functions too, without those for type checking alone."""
    tree = parse(path)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    return {target for _, target in imports(path, tree) if target[0] == "ctxext" and len(target) > 1}


def test_no_imports_form_a_circle():
    """Not inside a room either, and not by an import inside a function."""
    graph = {module(path): runtime_imports(path) - {module(path)} for path in FILES if len(module(path)) > 1}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError with the circle


LIGHT = [path for path in FILES if room(module(path)) in LIGHT_FLOORS or name(path) in LIGHT_FILES]


@pytest.mark.parametrize("path", LIGHT, ids=name)
def test_light_files_import_no_torch(path):
    """Neither themselves nor through a file of ours that they import, when they are imported."""
    seen, waiting, heavy = {path}, [(path, name(path))], []
    while waiting:
        current, chain = waiting.pop()
        for line, target in at_import_time(current):
            if target[0] in HEAVY:
                heavy.append(f"{chain}:{line} imports {target[0]}")
            if target[0] != "ctxext":
                continue
            for depth in range(1, len(target) + 1):
                for file in (
                    PACKAGE.parent.joinpath(*target[:depth]).with_suffix(".py"),
                    PACKAGE.parent.joinpath(*target[:depth]) / "__init__.py",
                ):
                    if file.is_file() and file not in seen:
                        seen.add(file)
                        waiting.append((file, f"{chain} -> {name(file)}"))
    assert not heavy, f"torch and its kin belong inside functions here: {heavy}"


@each_file()
def test_no_file_is_a_drawer(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    assert not DRAWERS & set(parts), f"{name(path)}: a name that says nothing of what is inside"


@each_file()
def test_a_file_keeps_its_budget(path):
    lines = code_lines(path.read_text(encoding="utf-8"), parse(path))
    budget = OPS_FILE_LINES if room(module(path)) == "ops" else FILE_LINES
    assert lines < budget, f"{name(path)} has {lines} lines of code; allowed: fewer than {budget}"


@each_file()
def test_a_function_keeps_its_budget(path):
    budget = LOOP_LINES if name(path) == "train/loop.py" else FUNCTION_LINES
    functions = (node for node in ast.walk(parse(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    lines = path.read_text(encoding="utf-8").splitlines()
    texts = {f.name: textwrap.dedent("\n".join(lines[f.lineno - 1 : f.end_lineno])) for f in functions}
    lengths = [(function, code_lines(text, ast.parse(text))) for function, text in texts.items()]
    long = [f"{function}: {lines}" for function, lines in lengths if lines >= budget]
    assert not long, f"{name(path)}: {long}; allowed: fewer than {budget} lines"


COMMANDS = [path for path in FILES if room(module(path)) == "cli" and "@takes(" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", COMMANDS, ids=name)
def test_a_command_calls_the_api_and_nothing_else(path):
    """It reads options into a request, calls a function of api.py and prints what comes back."""
    allowed, tree = {"api", "cli", "requests", "errors", "units"}, parse(path)
    for_types = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node)]
    left_out = {inner for node in for_types for inner in ast.walk(node)}
    targets = [target for node in ast.walk(tree) if node not in left_out for target in imported(node, path)]
    others = {room(target) for target in targets if target[0] == "ctxext"} - allowed
    assert not others, f"{name(path)} imports {others}"


def test_the_walk_sees_what_it_must_see():
    """The checks above, on a file made up here: they would be worthless if they passed everything."""
    path = PACKAGE / "config" / "made_up.py"
    tree = ast.parse(
        "import torch.nn\n"
        "from ctxext import units\n"
        "from . import loader\n"
        "from ..errors import InputError\n"
        "def f():\n    from ctxext.config.manifest import read\n"
    )
    assert imports(path, tree) == [
        (1, ("torch", "nn")),
        (2, ("ctxext", "units")),
        (3, ("ctxext", "config", "loader")),
        (4, ("ctxext", "errors")),
        (6, ("ctxext", "config", "manifest")),
    ]
