"""ctxext chat"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from ctxext.cli import console
from ctxext.cli.generate import AsJson, stream
from ctxext.cli.options import takes
from ctxext.errors import DataError
from ctxext.requests import ChatRequest

if TYPE_CHECKING:
    from ctxext.generation import Conversation

EXAMPLES = """Examples:\n
  ctxext chat ./my-model\n
  ctxext chat ./my-model --temperature 0.7 --seed 1\n
  printf 'import os\\nimport sys\\n' | ctxext chat tiny --max-new-tokens 20"""


@takes(ChatRequest)
def chat(request: ChatRequest, as_json: AsJson = False) -> None:
    """Chat with a model, one line per turn. The KV cache keeps the conversation; /reset clears it, /exit quits."""
    from ctxext import api

    console.quiet_libraries()
    with console.progress("loading") as progress:
        talk = api.chat(request, progress=progress)
    how = "with its chat template" if talk.templated else "no chat template: the model continues your text"
    name = talk.plan.source.name
    console.say(f"{name}, {how}; /reset clears the conversation, /exit quits")
    turns = []
    try:
        for line in _lines(talk):
            answer = stream(partial(talk.ask, line, warn=console.say), "reading", silent=as_json)
            turns.append({"asked": line} | {key: value for key, value in answer.as_dict().items() if key != "model"})
            if not as_json:
                console.say("; ".join(value for name, value in answer.rows() if name != "peak memory"))
    finally:
        # Print the answers given so far, also after an error or Ctrl-C.
        if as_json:
            console.emit({"model": name, "turns": turns})


def _lines(talk: Conversation) -> Iterator[str]:
    """Yields each line of stdin as a message, and executes the commands /reset and /exit."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        # Read bytes, so that a line that is not UTF-8 gives an error message in place of a traceback.
        raw = sys.stdin.buffer.readline()
        try:
            line = raw.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise DataError(f"stdin: byte {error.start} of the line is not UTF-8", hint="type UTF-8 text") from None
        if "\0" in line:
            raise DataError("stdin: the line has NUL bytes, so it is not text", hint="type UTF-8 text")
        if not raw or line == "/exit":
            return
        if line == "/reset":
            talk.reset()
            console.say("conversation cleared")
        elif re.fullmatch(r"/[a-z]+", line):
            console.say(f"unknown command {line}; allowed: /reset and /exit")
        elif line:
            yield line
