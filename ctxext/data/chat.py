"""Reads rows of instruction data as documents: the text, and the spans of answers that training scores.

Three formats of a row besides plain text:

    messages      `messages`, a list of {role, content}, rendered by the tokenizer's chat template
    prompt        `prompt` and `completion`, joined as they are: no template, no space between them
    prompt_chat   `prompt` and `completion` as a user's and an assistant's message, rendered by the template

An answer is the text of an assistant plus the marker that ends its turn, so that the model learns to stop. To find
the part of the conversation with an answer, the code renders the conversation up to that point. It never searches
for the text, which may also occur elsewhere. If the rendering of a first part is not a prefix of the whole
rendering, the row is rejected. Within its part, the answer ends with the first control token after the assistant's
text. What a template writes after that token (the newline of ChatML) is not scored, and a row whose last message is
an answer ends there. If a template writes no control token after an answer, all that it writes there belongs to the
answer.

The rendering must contain the text of every message, except for white space. A message that contains a control token
of the tokenizer in its text is rejected: the token would end or begin a turn.

Deliberately not supported: tools, images, and weights of messages; a row that has them is rejected.
`{% generation %}` marks of a template are not read.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from ctxext.data.documents import Document, Rows, checked_text
from ctxext.errors import DataError, InputError

ASSISTANT = "assistant"
VERSION = 2  # version of how rows are read: a new number invalidates cached tokens
EXAMPLE = 'write {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'


def chat_rows(format: str, tokenizer: Any) -> Rows:
    """Returns the reader for rows of one of the three formats.

    Raises InputError if the format needs a chat template and the tokenizer has none.
    """
    if format == "prompt":
        return Rows(("prompt", "completion"), _joined)
    if not tokenizer.chat_template:
        raise InputError(
            f"data.format={format} needs a chat template, and the model's tokenizer has none",
            hint="start from the instruct model, or put its chat_template.jinja beside the tokenizer; "
            "data.format=prompt joins prompt and completion without one",
        )

    # Compile the pattern once, since each row needs it.
    controls = _controls(tokenizer)

    def conversation(row: dict[str, Any], place: str) -> Document:
        return _conversation(tokenizer, controls, _messages(row, place), place)

    def exchange(row: dict[str, Any], place: str) -> Document:
        prompt, completion = _pair(row, place)
        messages = [{"role": "user", "content": prompt}, {"role": ASSISTANT, "content": completion}]
        return _conversation(tokenizer, controls, messages, place)

    if format == "prompt_chat":
        return Rows(("prompt", "completion"), exchange)
    return Rows(("messages",), conversation, may=("tools",))


def template_hash(tokenizer: Any) -> str:
    """Returns the sha256 of what decides a row's text and answers: the template, its special tokens, and VERSION."""
    state = [
        VERSION,
        tokenizer.chat_template,
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
    ]
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _joined(row: dict[str, Any], place: str) -> Document:
    prompt, completion = _pair(row, place)
    return Document(prompt + completion, place, ((len(prompt), len(prompt) + len(completion)),))


def _pair(row: dict[str, Any], place: str) -> tuple[str, str]:
    prompt, completion = (checked_text(row[field], place, field) for field in ("prompt", "completion"))
    if not completion:
        raise DataError(f"{place}: field 'completion' is empty, so there is nothing to learn", hint="leave the row out")
    return prompt, completion


def _messages(row: dict[str, Any], place: str) -> list[dict[str, str]]:
    """Returns the row's messages after checks: each is {role, content}, and an assistant speaks, but not first."""
    if row.get("tools"):
        raise DataError(f"{place}: field 'tools': tools are not supported", hint="leave rows with tools out")
    given = row["messages"]
    if not isinstance(given, list) or not given:
        found = "an empty list" if given == [] else type(given).__name__
        raise DataError(f"{place}: field 'messages' holds {found}, not a list of messages", hint=EXAMPLE)
    # Check each message first, then the roles of the conversation.
    messages = [_message(message, f"{place}: message {number}") for number, message in enumerate(given, start=1)]
    roles = [message["role"] for message in messages]
    if ASSISTANT not in roles:
        raise DataError(
            f"{place}: no message has the role {ASSISTANT!r}; the roles there are {', '.join(dict.fromkeys(roles))}",
            hint="training learns the answers: leave the row out, or rename the role",
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


def _conversation(
    tokenizer: Any, controls: re.Pattern[str] | None, messages: list[dict[str, str]], place: str
) -> Document:
    """Renders the conversation by the template and finds the spans of its answers."""
    _refuse_controls(controls, messages, place)

    def rendered(count: int, **options: bool) -> str:
        try:
            text: str = tokenizer.apply_chat_template(messages[:count], tokenize=False, **options)
        except Exception as error:  # a template is a program and may raise anything
            beginning = "" if count == len(messages) else f" (its first {count} messages)"
            raise DataError(
                f"{place}: the chat template does not render this conversation{beginning}: {error}",
                hint="change the roles and their order to what the template requires",
            ) from error
        return text

    whole = rendered(len(messages))
    answers, dropped, rendered_any = [], list[int](), False
    for number, message in enumerate(messages):
        if message["role"] != ASSISTANT:
            continue
        # The answer's part lies between the rendering before it (with the header of its turn) and the rendering with
        # it. Both must be prefixes of the whole, or the offsets would be wrong.
        before, after = rendered(number, add_generation_prompt=True), rendered(number + 1)
        for part, what in ((before, f"before message {number + 1}"), (after, f"up to message {number + 1}")):
            if not whole.startswith(part):
                raise DataError(
                    f"{place}: what the chat template renders {what} is not the beginning of the whole conversation, "
                    "so the place of the answer is unknown",
                    hint="give a template that renders a message the same whatever follows it, or rows of one answer",
                )
        # None: the template has dropped the answer. 0: there is nothing to score. Otherwise: characters to score.
        part = after[len(before) :]
        length, rendered_any = _answer_length(controls, part, message["content"]), rendered_any or bool(part)
        if length is None:
            dropped.append(number)
        elif length:
            answers.append((len(before), len(before) + length))
    if not rendered_any:
        raise DataError(
            f"{place}: the chat template leaves every answer out",
            hint="give a template that renders the messages of the assistant",
        )
    _require_texts(whole, messages, dropped, place)
    # Cut the text after a final answer, so that the document ends with the end-of-turn token.
    text = whole[: answers[-1][1]] if messages[-1]["role"] == ASSISTANT else whole
    return Document(text, place, tuple(answers), rendered=True)


def _controls(tokenizer: Any) -> re.Pattern[str] | None:
    """Returns a pattern that finds the tokenizer's control tokens in a text, longer ones first; None if it has none.

    Added tokens that are not special, such as <think>, are text that messages may contain.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    words = {str(token) for token in added if token.special} | {str(token) for token in tokenizer.all_special_tokens}
    return re.compile("|".join(map(re.escape, sorted(words - {""}, key=len, reverse=True)))) if words - {""} else None


def _refuse_controls(controls: re.Pattern[str] | None, messages: list[dict[str, str]], place: str) -> None:
    for number, message in enumerate(messages, start=1):
        found = controls.search(message["content"]) if controls else None
        if found:
            raise DataError(
                f"{place}: message {number} ({message['role']}) has {found[0]!r} in its text, which is a control token "
                "of this tokenizer and would not be read as text",
                hint="write those characters in another way (a space inside), or leave the row out",
            )


def _answer_length(controls: re.Pattern[str] | None, part: str, content: str) -> int | None:
    """Returns how many characters of a rendered answer are scored.

    The scored part reaches to the end of the first control token after `content`. White space is ignored in the
    comparison. Returns None if `content` is not found.
    """
    # The pieces between control tokens, each as (begin, (end of the piece, end of the control token after it)).
    ends = [(found.start(), found.end()) for found in controls.finditer(part)] if controls else []
    begins = [0, *(end for _, end in ends)]
    pieces = list(zip(begins, [*ends, (len(part), len(part))], strict=True))
    # A template may write the role or a channel before the text, so take the last piece that contains the text. An
    # empty answer takes the first piece.
    wanted = "".join(content.split())
    for begin, (stop, end) in reversed(pieces) if wanted else pieces:
        if wanted in "".join(part[begin:stop].split()):
            return end
    return None


def _require_texts(whole: str, messages: list[dict[str, str]], dropped: list[int], place: str) -> None:
    """Raises DataError if a message's text is missing from the rendered conversation; `dropped` are missing answers.

    A text of several messages must occur as often as there are such messages. Order is not checked: some templates
    move the system message.
    """
    squeezed = "".join(whole.split())
    seen: dict[str, int] = {}
    for number, message in enumerate(messages):
        text = "".join(message["content"].split())
        seen[text] = seen.get(text, 0) + 1
        if number in dropped or (text and squeezed.count(text) < seen[text]):
            name = f"message {number + 1} ({message['role']})"
            raise DataError(
                f"{place}: the chat template leaves out or changes the text of {name}",
                hint="give a template that renders the text of every message, or leave that message out",
            )
