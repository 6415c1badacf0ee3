"""ctxext generate"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated

import typer

from ctxext.cli import console

if TYPE_CHECKING:
    from ctxext.generation import Conversation, GeneratedAnswer

EXAMPLES = """Examples:\n
  ctxext generate tiny --prompt "def main():"\n
  ctxext generate ./my-model --file book.txt --question "Who is the narrator?" --max-new-tokens 100\n
  cat notes.txt | ctxext generate ./my-model --file - --temperature 0.7 --seed 1 --json"""

# The options that `generate` and `chat` share.
Model = Annotated[str, typer.Argument(help="A local directory, a finetune run, a preset or a hub id")]
MaxNewTokens = Annotated[int, typer.Option(help="Most tokens to generate")]
Temperature = Annotated[float, typer.Option(help="0: greedy; above 0: sampling")]
Seed = Annotated[int, typer.Option(help="Seed for sampling")]
Template = Annotated[
    bool | None, typer.Option("--chat/--no-chat", help="Use the chat template [default: if there is one]")
]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16 [default: bfloat16 on a GPU, else float32]")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N [default: a GPU if there is one]")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the text, its time and its memory as JSON, at the end")]


def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Option(help="Text to continue")] = None,
    file: Annotated[str | None, typer.Option(help="A text file to continue, of any length; - is stdin")] = None,
    question: Annotated[str | None, typer.Option(help="Question to add after the file, after an empty line")] = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    chat: Template = None,
    dtype: Dtype = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Continue a prompt or a long file: the text streams to stdout, its cost is reported on stderr."""
    from ctxext import generation

    text = generation.read_prompt(prompt, file, question)
    plan = generation.plan_generation(
        model, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, chat=chat, dtype=dtype, device=device
    )
    console.quiet_libraries()
    with console.progress("loading"):
        talk = generation.Conversation(plan)
    answer = stream(talk, text, silent=as_json)
    if as_json:
        console.emit({"model": plan.source.name, **answer.as_dict()})
    else:
        console.pairs(answer.rows(), to_stderr=True)


def stream(talk: Conversation, text: str, *, silent: bool) -> GeneratedAnswer:
    """Returns the answer, and prints it while it is generated unless `silent`.

    A progress bar on stderr is shown while the model reads the text.
    """
    with ExitStack() as bar:
        progress = bar.enter_context(console.progress("reading"))

        def write(piece: str) -> None:
            # The first piece ends the reading: remove the bar before text appears.
            bar.close()
            if not silent:
                sys.stdout.write(piece)
                sys.stdout.flush()

        answer = talk.ask(text, write=write, progress=progress, warn=console.say)
    if not silent:
        print(flush=True)
    return answer
