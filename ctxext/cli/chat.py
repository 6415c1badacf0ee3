"""ctxext chat"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ctxext.cli import console
from ctxext.cli.generate import AsJson, Device, Dtype, MaxNewTokens, Model, Seed, Temperature, Template, stream
from ctxext.errors import DataError

if TYPE_CHECKING:
    from ctxext.generation import Conversation

EXAMPLES = """Examples:\n
  ctxext chat ./my-model\n
  ctxext chat ./my-model --temperature 0.7 --seed 1\n
  printf 'import os\\nimport sys\\n' | ctxext chat tiny --max-new-tokens 20"""


def chat(
    model: Model,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    template: Template = None,
    dtype: Dtype = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Chat with a model, one line per turn. The KV cache keeps the conversation; /reset clears it, /exit quits."""
    from ctxext import generation

    plan = generation.plan_generation(
        model,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        chat=template,
        dtype=dtype,
        device=device,
    )
    console.quiet_libraries()
    with console.progress("loading"):
        talk = generation.Conversation(plan)
    how = "with its chat template" if talk.templated else "no chat template: the model continues your text"
    console.say(f"{plan.source.name}, {how}; /reset clears the conversation, /exit quits")
    turns = []
    try:
        for line in _lines(talk):
            answer = stream(talk, line, silent=as_json)
            turns.append({"asked": line, **answer.as_dict()})
            if not as_json:
                console.say("; ".join(value for name, value in answer.rows() if name != "peak memory"))
    finally:
        # Print the answers given so far, also after an error or Ctrl-C.
        if as_json:
            console.emit({"model": plan.source.name, "turns": turns})


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
