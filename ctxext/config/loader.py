"""Reads YAML into frozen specs: strict, typed, and with all faults in one error.

PyYAML reads `2e-5` as text, `010` as 8, `1:30` as 90 and `yes` as true (YAML 1.1). Here only `true` and `false` are
booleans, `null`, `~` and nothing are null, integers are decimal, `2e-5` is a float, and the rest is text. Rejected:
anchors, aliases, tags, keys that occur twice or are not text, numbers such as `010`, `0x1f`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, is_dataclass
from math import isfinite
from pathlib import Path, PurePath
from typing import Annotated, Any, ClassVar, TypeVar, dataclass_transform

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from yaml.constructor import ConstructorError
from yaml.nodes import MappingNode, Node, ScalarNode

from ctxext.config.faults import describe
from ctxext.errors import InputError, SpecError
from ctxext.units import parse_tokens

LARGEST = 64 * 1024  # bytes of a file, characters of a value: PyYAML reads 100 KB/s, a preset has one or two KB

S = TypeVar("S")

_STRICT = ConfigDict(extra="forbid", strict=True)


@dataclass_transform(frozen_default=True, kw_only_default=True)
def spec(cls: type[S]) -> type[S]:
    """Makes a class a frozen, keyword-only pydantic dataclass.

    No type is coerced, except that an int may be given for a float. An unknown key is a fault. A contradiction
    between fields is a ValueError raised in `__post_init__`.
    """
    made: Any = pydantic_dataclass(cls, frozen=True, kw_only=True, config=_STRICT)
    return made


def _tokens(value: Any) -> int:
    try:
        return parse_tokens(value)
    except InputError as error:
        raise ValueError(error.message) from None


Tokens = Annotated[int, BeforeValidator(_tokens), Field(gt=0)]
"""A positive number of tokens, written 8192 or "8k"."""


def read_yaml(path: Path | str) -> dict[str, Any]:
    """Returns the mapping in a YAML file of UTF-8 text, at most 64 KiB; an empty file is an empty mapping.

    Raises:
        InputError: there is no such file, or it cannot be read.
        SpecError: the content breaks the rules at the top of this file; has line and column.
    """
    path = Path(path)
    try:
        # Check the size first, since PyYAML is slow enough for a large file to look like a hang.
        if path.stat().st_size > LARGEST:
            raise SpecError(str(path), [f"{path.stat().st_size:,} bytes; allowed: at most {LARGEST:,}"])
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SpecError(str(path), [f"byte {error.start:,} is not UTF-8; allowed: UTF-8 text"]) from error
    data = _parse(text, str(path))
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise SpecError(str(path), [f"the file holds {_kind(data)}; allowed: a mapping (key: value)"])
    return data


def parse_value(text: str, source: str = "--set") -> Any:
    """Parses one YAML value, as after the `=` of `--set`: `8`, `2e-5`, `true`, `100k` (text), `[q_proj, v_proj]`.

    Raises:
        SpecError: the text is not one YAML value under the rules at the top of this file.
    """
    return _parse(text, source)


def assignments(given: Sequence[str], example: str = "passkey.cases=4") -> dict[str, Any]:
    """Returns the values of `--set key=value` options; a repeated key keeps its last value. InputError without `=`."""
    found = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"--set {text!r}: allowed is key=value, such as {example}")
        found[key.strip()] = parse_value(value, source=f"--set {key}")
    return found


def set_value(data: dict[str, Any], path: str, value: Any) -> None:
    """Sets `data["a"]["b"]` for the path "a.b", in place.

    Missing mappings are created. A value that is not a mapping is replaced by one: setting `rope_scaling.type` over
    `rope_scaling: auto` starts a new mapping.

    Raises:
        InputError: the path is empty or has an empty part.
    """
    keys = path.split(".")
    if not all(keys):
        raise InputError(f"{path!r} is not a key; allowed: names joined by dots, such as attention.group_size")
    for key in keys[:-1]:
        inner = data.get(key)
        if not isinstance(inner, dict):
            inner = data[key] = {}
        data = inner
    data[keys[-1]] = value


def build(cls: type[S], data: dict[str, Any], *, source: str) -> S:
    """Returns the spec of class `cls` that `data` describes; `source` names the file or option in errors.

    Raises:
        SpecError: with all faults, each with its dotted path, the given value and the allowed values.
    """
    try:
        # Validate as JSON: there strict mode still accepts a list for a tuple and a mapping for a nested spec.
        return TypeAdapter(cls).validate_json(json.dumps(data, default=_plain, allow_nan=False))
    except ValidationError as error:
        faults = describe(cls, data, error)
    except (TypeError, ValueError) as error:
        faults = [f"not plain data: {error}"]
    raise SpecError(source, faults)


def dump_yaml(value: Any) -> str:
    """Returns a spec, or plain data, as YAML that `read_yaml` and `build` turn into an equal one."""
    return _dumped(value, width=110)


def flow(value: Any) -> str:
    """Returns a spec, or plain data, as YAML on one line, as `--set` reads it.

    Examples: `{steps: 20}`, `[q_proj, v_proj]`, `text`, `null`.
    """
    return _dumped(value, width=LARGEST, default_flow_style=True).removesuffix("\n").removesuffix("\n...")


def _dumped(value: Any, **how: Any) -> str:
    plain = json.loads(json.dumps(value, default=_plain, allow_nan=False))
    return yaml.dump(plain, Dumper=_StrictDumper, sort_keys=False, allow_unicode=True, **how)


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, PurePath):
        return str(value)
    raise TypeError(f"{type(value).__name__} {value!r} cannot be written as YAML")


def _parse(text: str, source: str) -> Any:
    if len(text) > LARGEST:
        raise SpecError(source, [f"{len(text):,} characters; allowed: at most {LARGEST:,}"])
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        # PyYAML's own text spans several lines; report the position and the problem on one line.
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = error.problem or error.context or "not YAML"
        if "'\\t'" in problem:
            problem = "a tab; allowed: spaces"
        fault = f"{where}{problem}"
    except yaml.YAMLError as error:
        fault = f"not YAML: {' '.join(str(error).split())}"
    except RecursionError:
        fault = "nested too deeply"
    raise SpecError(source, [fault])


def _kind(value: Any) -> str:
    return "a list" if isinstance(value, list) else f"only {value!r}"


class _StrictLoader(yaml.SafeLoader):
    """A SafeLoader with its own rules for plain scalars. It rejects anchors, aliases, tags and repeated keys."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {}

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        # Anchors and tags are visible only on events, before a node is built from them.
        event = self.peek_event()
        if getattr(event, "anchor", None) is not None:
            raise _refusal(event, "anchors and aliases (& and *) are not allowed")
        if getattr(event, "tag", None) is not None:
            raise _refusal(event, f"tags ({event.tag}) are not allowed")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Any, Any]:
        # SafeLoader would silently keep the last of several equal keys.
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise _refusal(key_node, f"the key {key!r} is not text; quote it")
            if key in seen:
                raise _refusal(key_node, f"the key {key!r} is here twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


class _StrictDumper(yaml.SafeDumper):
    """A SafeDumper that quotes what `_StrictLoader` would not read back as text."""

    yaml_implicit_resolvers = _StrictLoader.yaml_implicit_resolvers

    def ignore_aliases(self, data: Any) -> bool:
        # `_StrictLoader` rejects aliases, so a value that occurs twice is written twice.
        return True


def _refusal(at: Any, problem: str) -> ConstructorError:
    return ConstructorError(None, None, problem, at.start_mark)


def _odd_number(loader: _StrictLoader, node: ScalarNode) -> Any:
    raise _refusal(node, f"{node.value} is not a finite decimal number; write one, or quote it as text")


def _int(loader: _StrictLoader, node: ScalarNode) -> int:
    if len(node.value) > 40:
        raise _refusal(node, "an integer with more than 40 digits")
    return int(node.value)


def _float(loader: _StrictLoader, node: ScalarNode) -> float:
    value = float(node.value)
    return value if isfinite(value) else _odd_number(loader, node)


_SCALARS: tuple[tuple[str, str, str, Callable[[Any, ScalarNode], Any]], ...] = (
    # name, pattern, first characters, constructor
    ("bool", r"true|false", "tf", lambda loader, node: node.value == "true"),
    ("null", r"null|~|", "n~", lambda loader, node: None),
    ("int", r"[-+]?(?:0|[1-9][0-9]*|[1-9][0-9]{0,2}(?:_[0-9]{3})+)", "-+0123456789", _int),
    (
        "float",
        r"[-+]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?)",
        "-+.0123456789",
        _float,
    ),
    ("odd", r"[-+]?0(?:[0-9_]+|[xXoObB][0-9a-fA-F_]+)(?:\.[0-9]*)?|[-+]?\.(?:inf|nan)", "-+.0123456789", _odd_number),
)

# A resolver is found by the first character of a scalar. Only null may be empty, which has the key "".
for _name, _pattern, _first, _constructor in _SCALARS:
    _tag = f"tag:yaml.org,2002:{_name}"
    _StrictLoader.add_constructor(_tag, _constructor)
    for _character in ["", *_first] if _name == "null" else _first:
        _resolvers = _StrictLoader.yaml_implicit_resolvers.setdefault(_character, [])
        _resolvers.append((_tag, re.compile(rf"(?:{_pattern})\Z")))
