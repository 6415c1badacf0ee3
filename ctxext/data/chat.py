"""Rows of instruction data as documents: what a model is to read, and which spans of it are answers to be scored.

Three formats of a row beside plain text:

    messages      `messages`, a list of {role, content}, rendered by the tokenizer's chat template
    prompt        `prompt` and `completion`, joined as they are: no template, no space between them
    prompt_chat   `prompt` and `completion` as a user's and an assistant's message, rendered by the template

An answer is what an assistant writes and the marker that ends its turn, so that the model learns to stop. Where it
begins and ends is found by rendering the conversation up to there, never by looking for the text, which may stand
elsewhere as well; a template whose rendering of a beginning is no beginning of the whole is refused. Left out on
purpose: tools, images, and weights of messages; a row that has them is refused.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from ctxext.data.documents import Document, Rows, checked_text
from ctxext.errors import DataError, InputError

ASSISTANT = "assistant"
EXAMPLE = 'write {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'


def chat_rows(format: str, tokenizer: Any) -> Rows:
    """What reads the rows of one of the three formats. InputError where it needs a chat template and there is none."""
    if format == "prompt":
        return Rows(("prompt", "completion"), _joined)
    if not tokenizer.chat_template:
        raise InputError(
            f"data.format={format} needs a chat template, and the model's tokenizer has none",
            hint="start from the instruct model, or put its chat_template.jinja beside the tokenizer; "
            "data.format=prompt joins prompt and completion without one",
        )

    def conversation(row: dict[str, Any], place: str) -> Document:
        return _conversation(tokenizer, _messages(row, place), place)

    def exchange(row: dict[str, Any], place: str) -> Document:
        prompt, completion = _pair(row, place)
        messages = [{"role": "user", "content": prompt}, {"role": ASSISTANT, "content": completion}]
        return _conversation(tokenizer, messages, place)

    if format == "prompt_chat":
        return Rows(("prompt", "completion"), exchange)
    return Rows(("messages",), conversation, may=("tools",))


def template_hash(tokenizer: Any) -> str:
    """sha256 of what decides how a conversation is rendered: the template, and the special tokens it may name."""
    state = [tokenizer.chat_template, {name: str(token) for name, token in tokenizer.special_tokens_map.items()}]
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _joined(row: dict[str, Any], place: str) -> Document:
    prompt, completion = _pair(row, place)
    return Document(prompt + completion, place, ((len(prompt), len(prompt) + len(completion)),))


def _pair(row: dict[str, Any], place: str) -> tuple[str, str]:
    prompt, completion = (checked_text(row[field], place, field) for field in ("prompt", "completion"))
    if not completion:
        raise DataError(f"{place}: field 'completion' is empty: nothing would be learned", hint="leave the row out")
    return prompt, completion


def _messages(row: dict[str, Any], place: str) -> list[dict[str, str]]:
    """The row's messages, if each is {role, content} and an assistant speaks, though not first."""
    if row.get("tools"):
        raise DataError(f"{place}: field 'tools': tools are not supported", hint="leave rows with tools out")
    given = row["messages"]
    if not isinstance(given, list) or not given:
        found = "an empty list" if given == [] else type(given).__name__
        raise DataError(f"{place}: field 'messages' holds {found}, not a list of messages", hint=EXAMPLE)
    messages = [_message(message, f"{place}: message {number}") for number, message in enumerate(given, start=1)]
    roles = [message["role"] for message in messages]
    if ASSISTANT not in roles:
        raise DataError(
            f"{place}: no message has the role {ASSISTANT!r}; the roles there are {', '.join(dict.fromkeys(roles))}",
            hint="answers are what is learned: leave the row out, or rename the role",
        )
    if roles[0] == ASSISTANT:
        raise DataError(
            f"{place}: the first message has the role {ASSISTANT!r}", hint="begin with a message of system or user"
        )
    return messages


def _message(message: Any, place: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise DataError(f"{place} is {type(message).__name__}; allowed: an object with role and content", hint=EXAMPLE)
    fields = [name for name, value in message.items() if value is not None]  # Parquet has null for what is absent
    if sorted(fields) != ["content", "role"]:
        raise DataError(
            f"{place} has the fields {', '.join(fields) or 'none'}; allowed: role and content, and no others",
            hint=EXAMPLE,
        )
    return {name: checked_text(message[name], place, name) for name in ("role", "content")}


def _conversation(tokenizer: Any, messages: list[dict[str, str]], place: str) -> Document:
    """The conversation as the template renders it, with the spans of its answers."""

    def rendered(count: int, **options: bool) -> str:
        try:
            text: str = tokenizer.apply_chat_template(messages[:count], tokenize=False, **options)
        except Exception as error:  # a template is a program: it may raise anything
            beginning = "" if count == len(messages) else f" (its first {count} messages)"
            raise DataError(
                f"{place}: the chat template does not render this conversation{beginning}: {error}",
                hint="bring the roles and their order into the form that the template asks for",
            ) from error
        return text

    whole = rendered(len(messages))
    answers = []
    for number, message in enumerate(messages):
        if message["role"] != ASSISTANT:
            continue
        before, after = rendered(number, add_generation_prompt=True), rendered(number + 1)
        for part, what in ((before, f"before message {number + 1}"), (after, f"up to message {number + 1}")):
            if not whole.startswith(part):
                raise DataError(
                    f"{place}: what the chat template renders {what} is no beginning of the whole conversation, so "
                    "where the answer lies is unknown",
                    hint="give a template that renders a message the same whatever follows it, or rows of one answer",
                )
        if len(after) > len(before):
            answers.append((len(before), len(after)))
    if not answers:
        raise DataError(
            f"{place}: the chat template leaves every answer out",
            hint="give a template that renders what assistants say",
        )
    return Document(whole, place, tuple(answers))
