"""Values that flow by name."""

import pytest

from ctxext.study.flow import filled, malformed, references

KNOWN = {"model": "tiny", "ctx": 2048, "lengths": [512, "1k"], "none": None,
         "heal": {"out": "runs/heal", "held_out": [2.5, 2.25], "facts": {"best": 0.5}}}  # fmt: skip


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("${model}", "tiny"),
        ("${ctx}", 2048),  # a whole reference keeps its type
        ("${lengths}", [512, "1k"]),
        ("${none}", None),
        ("at ${ctx} of ${model}", "at 2048 of tiny"),
        ("${heal}", "runs/heal"),  # a step is its output
        ("${heal.held_out.1}", 2.25),
        ("${heal.facts.best}", 0.5),
        ("${later}", "${later}"),
        ("${later.facts} and ${model}", "${later.facts} and tiny"),
        ({"a": ["${model}", {"b": "${ctx}"}], "c": 3}, {"a": ["tiny", {"b": 2048}], "c": 3}),
        (["${every[*]}", "${model}"], ["x", "y", "tiny"]),
        ("${every[*]}", ["x", "y"]),
        (["${lengths}"], [[512, "1k"]]),  # a list stays one item; only [*] spreads
        ("a $ and a {brace}", "a $ and a {brace}"),
    ],
)
def test_a_reference_becomes_what_it_names(given, expected):
    assert filled(given, KNOWN, {"every": ["x", "y"]}) == expected


def test_a_path_that_a_report_does_not_have_is_told_with_what_it_has():
    with pytest.raises(LookupError, match=r"heal.facts.worst.*'worst' is unknown; allowed: best"):
        filled("${heal.facts.worst}", KNOWN)
    with pytest.raises(LookupError, match="'2' is unknown"):
        filled("${heal.held_out.2}", KNOWN)


def test_every_reference_is_found_however_deep():
    found = list(references({"a": ["${x}", {"b": "${y.z[*]} ${x}"}], "n": 1}))
    assert [(reference.name, reference.path, reference.every) for reference in found] == [
        ("x", (), False), ("y", ("z",), True), ("x", (), False),
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["${", "${a", "${a b}", "${}", "${a[1]}", "${a.}"])
def test_what_looks_like_a_reference_and_is_none_is_found(text):
    assert list(malformed({"a": [text]})) == [text]
    assert not list(malformed("${a} $b {c}"))
