"""ctxext generate"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Any

from ctxext.cli import console
from ctxext.cli.options import json_option, takes
from ctxext.requests import GenerateRequest

if TYPE_CHECKING:
    from ctxext.generation import GeneratedAnswer

EXAMPLES = """Examples:\n
  ctxext generate tiny --prompt "def main():"\n
  ctxext generate ./my-model --file book.txt --question "Who is the narrator?" --max-new-tokens 100\n
  cat notes.txt | ctxext generate ./my-model --file - --temperature 0.7 --seed 1 --json"""

AsJson = Annotated[bool, json_option("the text, its time and its memory, at the end,")]


@takes(GenerateRequest)
def generate(request: GenerateRequest, as_json: AsJson = False) -> None:
    """Continue a prompt or a long file: the text streams to stdout, its cost is reported on stderr."""
    from ctxext import api

    console.quiet_libraries()
    answer = stream(lambda **how: api.generate(request, say=console.say, **how), "loading", silent=as_json)
    if as_json:
        console.emit(answer.as_dict())
    else:
        console.pairs(answer.rows(), to_stderr=True)


def stream(ask: Callable[..., GeneratedAnswer], begins: str, *, silent: bool) -> GeneratedAnswer:
    """Returns the answer of `ask(write=..., progress=...)`, and prints it while it is generated unless `silent`.

    A progress bar on stderr, first with the text `begins`, is shown until the first piece of the answer.
    """
    with ExitStack() as bar:
        progress: Any = bar.enter_context(console.progress(begins))

        def write(piece: str) -> None:
            # The first piece ends the reading: remove the bar before text appears.
            bar.close()
            if not silent:
                sys.stdout.write(piece)
                sys.stdout.flush()

        answer = ask(write=write, progress=progress)
    if not silent:
        print(flush=True)
    return answer
