import dataclasses
import subprocess
import sys
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from ctxext.config.loader import Tokens, build, dump_yaml, flow, parse_value, read_yaml, set_value, spec
from ctxext.errors import InputError, SpecError


@spec
class Linear:
    type: Literal["linear"] = "linear"
    factor: Annotated[float, Field(gt=1)] | None = None


@spec
class Ntk:
    type: Literal["ntk"] = "ntk"
    theta: float


@spec
class Attention:
    train: Literal["s2", "dense"] | None = None
    group_size: Tokens | None = None


@spec
class Run:
    ctx: Tokens
    lr: float = 2e-5
    resume: bool = False
    rope_scaling: Literal["auto"] | Annotated[Linear | Ntk, Field(discriminator="type")] = "auto"
    attention: Attention = Attention()
    alpha: float | Literal["sqrt", "curvature"] = "sqrt"
    targets: tuple[str, ...] = ("q_proj",)
    stages: tuple[Attention, ...] = ()

    def __post_init__(self) -> None:
        if self.attention.group_size is not None and self.attention.group_size > self.ctx:
            raise ValueError("attention.group_size: more than ctx")


def faults(data: Any) -> list[str]:
    with pytest.raises(SpecError) as caught:
        build(Run, data, source="run.yaml")
    assert str(caught.value).startswith("run.yaml: ")
    return list(caught.value.faults)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-5", 2e-5),
        ("1e5", 1e5),
        ("-0.5", -0.5),
        (".5", 0.5),
        ("1.", 1.0),
        ("8", 8),
        ("+3", 3),
        ("-7", -7),
        ("0", 0),
        ("1_000", 1000),
        ("true", True),
        ("false", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("yes", "yes"),
        ("on", "on"),
        ("True", "True"),
        ("NULL", "NULL"),
        ("1:30", "1:30"),
        ("2026-01-01", "2026-01-01"),
        ("100k", "100k"),
        ("0.1.2", "0.1.2"),
        ("'010'", "010"),
        ("[q_proj, 2e-5, {a: no}]", ["q_proj", 2e-5, {"a": "no"}]),
    ],
)
def test_a_scalar_means_what_it_says(text, value):
    read = parse_value(text)
    assert read == value and type(read) is type(value), f"{text!r} was read as {read!r}"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("010", "not a finite decimal number"),
        ("-007", "not a finite decimal number"),
        ("00.5", "not a finite decimal number"),
        ("0x1f", "not a finite decimal number"),
        ("0o17", "not a finite decimal number"),
        (".inf", "not a finite decimal number"),
        (".nan", "not a finite decimal number"),
        ("1e999", "not a finite decimal number"),
        ("9" * 5000, "more than 40 digits"),
        ("{a: 1, a: 2}", "'a' is here twice"),
        ("{a: &x 1, b: *x}", "anchors and aliases"),
        ("*x", "anchors and aliases"),
        ("!!str 1", "tags"),
        ("!!python/object/apply:os.system [ls]", "tags"),
        ("! 1", "tags"),
        ("{1: 2}", "the key 1 is not text"),
        ("{true: 2}", "the key True is not text"),
        ("{[a]: 2}", "is not text"),
        ("a:\n\t- 1", "a tab; allowed: spaces"),
        ("a: [1", "line 1, column 6"),
        ("a\n---\nb", "another document"),
        ("\x00", "not YAML"),
        ("[" * 5000, "nested too deeply"),
    ],
)
def test_a_doubtful_value_is_refused(text, problem):
    with pytest.raises(SpecError, match=problem) as caught:
        parse_value(text, "--set lr")
    assert str(caught.value).startswith("--set lr: 1 fault")


def test_a_file_is_read(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("﻿# why\nctx: 8k\nattention: {train: s2}\n", encoding="utf-8")
    assert read_yaml(path) == {"ctx": "8k", "attention": {"train": "s2"}}
    path.write_text("# nothing\n")
    assert read_yaml(path) == {}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"a: \xff\n", "byte 3 is not UTF-8"),
        (b"[1, 2]\n", "holds a list; allowed: a mapping"),
        (b"8k\n", "holds only '8k'"),
        (b"a: 1\na: 2\n", "line 2, column 1: the key 'a' is here twice"),
        (b"#" * (64 * 1024 + 1), "65,537 bytes; allowed: at most 65,536"),
    ],
)
def test_a_broken_file_is_refused(tmp_path, content, problem):
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    with pytest.raises(SpecError, match=problem) as caught:
        read_yaml(path)
    assert str(path) in str(caught.value)


def test_a_file_that_cannot_be_read_is_no_spec_error(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(InputError, match="cannot read") as caught:
            read_yaml(path)
        assert not isinstance(caught.value, SpecError)


def test_a_spec_is_built():
    data = {
        "ctx": "8k",
        "lr": 1,
        "rope_scaling": {"type": "ntk", "theta": 1e6},
        "attention": {"group_size": "2k"},
        "targets": ["a", "b"],
        "stages": [{"train": "s2"}],
    }
    run = build(Run, data, source="")
    assert run == Run(
        ctx=8192,
        lr=1.0,
        rope_scaling=Ntk(theta=1e6),
        attention=Attention(group_size=2048),
        targets=("a", "b"),
        stages=(Attention(train="s2"),),
    )
    assert isinstance(run.lr, float) and isinstance(run.targets, tuple)
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.ctx = 1


def test_all_faults_are_told_at_once_with_their_paths():
    found = faults(
        {
            "ctxx": 1,
            "lr": "fast",
            "resume": "yes",
            "rope_scaling": {"type": "linear", "factr": 2},
            "attention": {"group": 1, "train": "s3"},
            "alpha": "sq",
            "targets": "q_proj",
            "stages": [{}, {"trian": 1}],
        }
    )
    assert sorted(found) == sorted(
        [
            "ctx: missing; it has no default",
            "ctxx: unknown key; did you mean ctx? allowed: "
            "ctx, lr, resume, rope_scaling, attention, alpha, targets, stages",
            "lr: got 'fast'; allowed: a number",
            "resume: got 'yes'; allowed: true or false",
            "rope_scaling.factr: unknown key; did you mean factor? allowed: type, factor",
            "attention.train: got 's3'; allowed: 's2' or 'dense'",
            "attention.group: unknown key; did you mean group_size? allowed: train, group_size",
            "alpha: got 'sq'; allowed: a number or 'sqrt' or 'curvature'",
            "targets: got 'q_proj'; allowed: a list",
            "stages.1.trian: unknown key; did you mean train? allowed: train, group_size",
        ]
    )


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        ({"ctx": "0"}, "ctx: got '0'; allowed: more than 0"),
        ({"ctx": "3.5q"}, "ctx: '3.5q' is no number of tokens; allowed: a whole number of tokens"),
        ({"ctx": True}, "ctx: True is no number of tokens"),
        ({"ctx": None}, "ctx: None is no number of tokens"),
        ({"ctx": 1, "lr": True}, "lr: got True; allowed: a number"),
        ({"ctx": 1, "lr": "2e-5"}, "lr: got '2e-5'; allowed: a number"),
        ({"ctx": 1, "resume": 1}, "resume: got 1; allowed: true or false"),
        ({"ctx": 1, "attention": 3}, "attention: got 3; allowed: a mapping"),
        ({"ctx": 1, "targets": [1]}, "targets.0: got 1; allowed: text"),
        ({"ctx": 1, "rope_scaling": "linier"}, "rope_scaling: got 'linier'; allowed: 'auto' or a mapping"),
        ({"ctx": 1, "rope_scaling": {"type": "yran"}}, "rope_scaling: got {'type': 'yran'}; allowed: 'auto' or"),
        ({"ctx": 1, "rope_scaling": {"factor": 2}}, "rope_scaling: got {'factor': 2}; allowed: 'auto' or"),
        ({"ctx": 1, "rope_scaling": {"type": "ntk"}}, "rope_scaling.theta: missing"),
        (
            {"ctx": 1, "rope_scaling": {"type": "linear", "factor": 1}},
            "rope_scaling.factor: got 1; allowed: more than 1",
        ),
        ({"ctx": 1024, "attention": {"group_size": "2k"}}, "attention.group_size: more than ctx"),
        ([1], "got [1]; allowed: a mapping"),
    ],
)
def test_one_fault_is_one_line(data, fault):
    found = faults(data)
    assert len(found) == 1 and found[0].startswith(fault), found


def test_set_reaches_into_mappings():
    data: dict[str, Any] = {"rope_scaling": "auto", "attention": {"train": "s2"}}
    set_value(data, "attention.group_size", parse_value("2k"))
    set_value(data, "rope_scaling.type", "linear")
    set_value(data, "a.b.c", 1)
    assert data == {
        "rope_scaling": {"type": "linear"},
        "attention": {"train": "s2", "group_size": "2k"},
        "a": {"b": {"c": 1}},
    }
    for path in ("", "a.", ".a", "a..b"):
        with pytest.raises(InputError, match="is not a key"):
            set_value({}, path, 1)


PLAIN_TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc", "Co", "Cn")), max_size=30)
AWKWARD = st.sampled_from(
    ["010", "yes", "true", "~", "", ".inf", "1:30", "a: b", "#x", "2e-5", "1_000", "&a", "!x", "- a"]
)


@given(
    targets=st.lists(PLAIN_TEXT | AWKWARD, max_size=4).map(tuple),
    lr=st.floats(allow_nan=False, allow_infinity=False),
    factor=st.none() | st.floats(min_value=1, exclude_min=True, allow_infinity=False),
    ctx=st.integers(min_value=1, max_value=10**9),
)
def test_what_is_dumped_is_read_back_equal(targets, lr, factor, ctx):
    run = Run(ctx=ctx, lr=lr, targets=targets, rope_scaling=Linear(factor=factor))
    text = dump_yaml(run)
    assert build(Run, parse_value(text), source="") == run, text


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ("books/", "books/"),
        ("16", "'16'"),
        ("a...", "a..."),
        (True, "true"),
        (None, "null"),
        (1e9, "1000000000.0"),
        (("q_proj", "v_proj"), "[q_proj, v_proj]"),
        (
            {"steps": 20, "data": {"source": "some words " * 30}},
            f"{{steps: 20, data: {{source: '{'some words ' * 30}'}}}}",
        ),
    ],
)
def test_a_value_on_one_line_is_what_set_reads(value, line):
    assert flow(value) == line
    assert parse_value(line) == (list(value) if isinstance(value, tuple) else value)


def test_the_same_object_twice_is_dumped_without_anchors():
    attention = Attention(train="s2")
    run = Run(ctx=1, stages=(attention, attention))
    assert build(Run, parse_value(dump_yaml(run)), source="") == run


def test_the_ground_floors_import_neither_torch_nor_its_kin():
    code = (
        "import ctxext.units, ctxext.config.presets, ctxext.config.manifest, ctxext.config.output, sys;"
        "print(sorted({'torch', 'transformers', 'numpy', 'peft'} & set(sys.modules)))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
