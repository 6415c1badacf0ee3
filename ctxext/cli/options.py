"""Turns a request class (requests.py) into the options of a command."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from types import NoneType
from typing import Annotated, Any, get_args, get_origin

import typer

from ctxext.cli import completion
from ctxext.config.loader import assignments
from ctxext.requests import Option, options, read_request


def out_option(named: str, what: str = "Output directory") -> Any:
    """Returns the option --out of a command; `named` is the end of the name of the default directory."""
    return typer.Option("--out", help=f"{what} [default: ./runs/<time>-{named}]")


def json_option(what: str) -> Any:
    """Returns the option --json of a command that prints `what`."""
    return typer.Option("--json", help=f"Print {what} as JSON")


Force = Annotated[bool, typer.Option("--force", help="Replace an existing output")]
AsJson = Annotated[bool, json_option("the report")]


def takes(request: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command the options of `request` in place of its parameter of that name.

    The command is called with the request that the options describe; its other parameters stay its own options.
    """

    def with_options(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True).parameters
        offered = options(request)

        @wraps(command)
        def run(**given: Any) -> None:
            rest = {name: value for name, value in given.items() if name in own}
            arguments = {name: _value(option, given[name]) for name, (_, option) in offered.items()}
            # An option that was not given keeps the default of the request.
            arguments = {name: value for name, value in arguments.items() if value is not None}
            command(request=read_request(request, arguments, source=command.__name__), **rest)

        parameters = [_parameter(request, name, *field) for name, field in offered.items()]
        parameters += [one.replace(kind=one.KEYWORD_ONLY) for name, one in own.items() if name != "request"]
        # Typer reads the signature, and inspect would follow __wrapped__ to the command's own.
        del run.__wrapped__
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {one.name: one.annotation for one in parameters}
        return run

    return with_options


def _value(option: Option, given: Any) -> Any:
    """The value for the request. `--set` becomes a mapping; an argument of several words that has none is left out."""
    if not isinstance(given, list):
        return given
    return tuple(given) or None if option.argument else assignments(given, example=option.example)


def _parameter(request: type, name: str, kind: Any, option: Option) -> inspect.Parameter:
    """The parameter of a command for a field, as Typer reads it."""
    default = getattr(request, name, inspect.Parameter.empty)
    # The default of a mapping is made for each request, so that the class has none.
    typed, default = _typed(kind, option, default)
    how: dict[str, Any] = {
        "help": option.help,
        "metavar": option.metavar or ("KEY=VALUE" if get_origin(kind) is dict else None),
        "min": option.least,
        "max": option.most,
    }
    if option.complete is not None:
        how["autocompletion"] = completion.COMPLETERS.get(option.complete) or completion.of(option.complete)
    if option.argument:
        info = typer.Argument(**how)
    else:
        info = typer.Option(*_names(name, kind, option, default), **how)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[typed, info])


def _names(name: str, kind: Any, option: Option, default: Any) -> list[str]:
    """The names of an option; none: Typer makes --name, and --no-name beside it for a flag."""
    if option.name is not None:
        return [option.name]
    if option.flags is not None:
        return [option.flags]
    if get_origin(kind) is dict:
        return ["--set"]
    return [f"--{name.replace('_', '-')}"] if kind is bool and default is False else []


def _typed(kind: Any, option: Option, default: Any) -> tuple[Any, Any]:
    """The type of a parameter and its default. A length, a path or a list is text here; the request reads it."""
    if get_origin(kind) is dict:
        return list[str] | None, None
    parts = set(get_args(kind)) - {NoneType} or {kind}
    optional = NoneType in get_args(kind) or default is None
    if option.argument and any(get_origin(part) is tuple for part in parts):
        required = default is inspect.Parameter.empty
        return (list[str], default) if required else (list[str] | None, None)
    typed = parts.pop() if len(parts) == 1 else str
    return (typed | None if optional else typed), default
