"""Generates text with a model: streams the answer and reports speed and memory. One conversation is one KV cache.

Tokens that the model has read stay in the cache, so a turn computes only its own tokens. With a chat template, this
module renders the conversation with a marker in place of each answer, and uses the text after the last marker. So the
tokens that the model wrote are never tokenised again. A new turn is tokenised as the continuation of the earlier ids,
never as a separate text. Some templates render an old turn differently once a new turn follows (for example, they drop
its reasoning). The cache then keeps the turn as first rendered, because a cache cannot be rewritten.

torch is imported only when a model is loaded. Not done: beams, top-p, system prompts.
"""

from __future__ import annotations

import math
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ctxext.data.prompts import TAIL, continued_ids, prompt_ids
from ctxext.errors import DataError, EnvironmentFault, InputError, ModelError
from ctxext.machine.gpu import default_device
from ctxext.machine.memory import is_out_of_memory
from ctxext.model.companions import require_tokenizer
from ctxext.model.convert import DTYPES
from ctxext.model.ids import check_ids
from ctxext.model.source import ModelSource, resolve
from ctxext.progress import Progress, ignore
from ctxext.units import format_bytes, format_tokens

COLDEST = 1e-4  # a lower temperature is the same as greedy, but its logits overflow
DEVICE = re.compile(r"cpu|cuda(:[0-9]{1,3})?")
MARKER = "\u241eanswer\u241e"  # the place of an answer in a rendered template
SUSPECT = "\ufffd"  # a decoder's output for bytes that are not, or not yet, a complete character
KINDS = {"S": "sliding", "s": "sliding (no RoPE)", "N": "full (no RoPE)", "F": "full"}  # letters of model/layout.py
NO_CHAT_HINT = "give --no-chat to continue the text without a template"


@dataclass(frozen=True)
class GenerationPlan:
    """The model and the settings of a generation.

    temperature   0 is greedy
    chat          None: use the tokenizer's chat template where it has one
    dtype         None: float32 on a CPU, bfloat16 on a GPU
    device        None: a GPU where there is one, else the CPU
    """

    source: ModelSource
    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0
    chat: bool | None = None
    dtype: str | None = None
    device: str | None = None


def read_prompt(prompt: str | None, file: str | None, question: str | None) -> str:
    """Returns the text to continue: `prompt`, or a file (`-` is stdin) and, after an empty line, `question`.

    Raises InputError for both or neither of prompt and file, for a question without a file, for a file that cannot be
    read and for empty text. Raises DataError for text that is not UTF-8 and for NUL bytes.
    """
    if (prompt is None) == (file is None):
        raise InputError("give either --prompt TEXT or --file FILE (- is stdin)", hint="with a file, --question TEXT")
    if question is not None and file is None:
        raise InputError("--question needs --file", hint="put the question into --prompt")
    # Python turns bytes of an argument that are not UTF-8 into surrogates.
    for option, given in (("--prompt", prompt), ("--question", question)):
        if given is not None and any("\ud800" <= character <= "\udfff" for character in given):
            raise DataError(f"{option} is not UTF-8", hint="give UTF-8 text")
    text = prompt if file is None else _read(file)
    if not text or text.isspace():
        raise InputError(f"{'--prompt' if file is None else file} has no text to continue")
    return text if question is None else f"{text.rstrip()}\n\n{question}"


def _read(name: str) -> str:
    try:
        text = (sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        if isinstance(error, UnicodeDecodeError):
            raise DataError(f"{name}: byte {error.start:,} is not UTF-8", hint="give a file of UTF-8 text") from None
        raise InputError(f"{name} cannot be read ({error})", hint="give a text file, or - for stdin") from None
    if "\0" in text:
        raise DataError(f"{name} has NUL bytes, so it is not text", hint="give a file of UTF-8 text")
    return text.replace("\r\n", "\n")


def plan_generation(model: str, **given: Any) -> GenerationPlan:
    """Returns the plan for a model; `given` are its other fields.

    Raises InputError for values that are not allowed, as far as the arguments and the model's files show it.
    """
    plan = GenerationPlan(resolve(model), **given)
    device_known = plan.device is None or DEVICE.fullmatch(plan.device)
    checks = (
        (plan.max_new_tokens >= 1, f"--max-new-tokens {plan.max_new_tokens}: allowed is 1 or more"),
        (
            plan.temperature == 0 or COLDEST <= plan.temperature < math.inf,
            f"--temperature {plan.temperature}: allowed are 0 (greedy) and numbers from {COLDEST} up",
        ),
        (0 <= plan.seed < 2**63, f"--seed {plan.seed}: allowed are 0 to {2**63 - 1}"),
        (plan.dtype in (None, *DTYPES), f"--dtype {plan.dtype!r}: allowed are {', '.join(DTYPES)}"),
        (device_known, f"--device {plan.device!r}: allowed are cpu, cuda and cuda:N"),
    )
    for sound, problem in checks:
        if not sound:
            raise InputError(problem)
    require_tokenizer(plan.source.directory)
    return plan


@dataclass(frozen=True)
class Held:
    """The cache of all layers of one kind: their number, the tokens in each, and the bytes of all."""

    kind: str
    layers: int
    tokens: int
    bytes: int


@dataclass(frozen=True)
class GeneratedAnswer:
    """One answer, with its tokens, times and memory.

    model          the name of the model
    read           new tokens that the model read for this answer
    kept           earlier tokens, taken from the cache
    written        tokens of the answer
    stopped        whether a stop token ended the answer
    read_speed     tokens a second
    write_speed    tokens a second, 0 where no forward was timed; the first written token needs no forward of its own
    peak_bytes     peak memory: the process's resident set on a CPU, torch's allocator on a GPU
    cache          the KV cache after the answer, by kind of layer
    """

    model: str
    text: str
    read: int
    kept: int
    written: int
    stopped: bool
    read_seconds: float
    read_speed: float
    write_seconds: float
    write_speed: float
    peak_bytes: int
    cache: tuple[Held, ...]

    def as_dict(self) -> dict[str, Any]:
        """Returns the answer as a dict, for JSON."""
        return asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        """Returns (name, value) rows for the screen."""
        before = f" after {format_tokens(self.kept)} in the cache" if self.kept else ""
        read = f"{format_tokens(self.read)} tokens{before}, {self.read_seconds:,.2f} s, {self.read_speed:,.1f} tokens/s"
        write = f"{format_tokens(self.written)} tokens, {self.write_seconds:,.2f} s, {self.write_speed:,.1f} tokens/s"
        cache = [
            f"{held.layers} x {KINDS[held.kind]}, {format_bytes(held.bytes)}: {format_tokens(held.tokens)} tokens"
            + (", the most it keeps" if held.kind in "Ss" and held.tokens < self.read + self.kept else "")
            for held in self.cache
        ]
        rows = [("read", read), ("written", write), ("peak memory", format_bytes(self.peak_bytes))]
        return rows + [("KV cache", line) for line in cache]


class TextStream:
    """Turns ids into text one by one; a character of several tokens is returned with its last token.

    The ids of the last returned piece stay in front of the new ids when these are decoded, so that a word keeps the
    space before it.
    """

    def __init__(self, decode: Callable[[list[int]], str], before: list[int] | None = None):
        """`before` are the ids that precede the text.

        Some decoders drop the first space of their input. With `before`, this is not the first space of the text.
        """
        self.decode = decode
        self.ids: list[int] = list(before or ())
        self.given, self.shown = len(self.ids), len(self.decode(self.ids))  # ids and characters already returned

    def add(self, token: int) -> str:
        """Returns the text that is complete with this token; empty inside a character."""
        self.ids.append(token)
        text = self.decode(self.ids)
        if text.endswith(SUSPECT) or len(text) <= self.shown:
            return ""
        # Keep the ids of this piece as the context of the next one, and drop the older ids.
        piece, self.ids = text[self.shown :], self.ids[self.given :]
        self.given, self.shown = len(self.ids), len(self.decode(self.ids))
        return piece

    def rest(self) -> str:
        """Returns the remaining text at the end: bytes that are not a complete character."""
        return self.decode(self.ids)[self.shown :]


@contextmanager
def _in_memory(plan: GenerationPlan) -> Iterator[None]:
    """Turns an out-of-memory error into an EnvironmentFault with a hint.

    The cache of a whole answer is reserved before its first token, so the error names the requested tokens.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise EnvironmentFault(
            f"out of memory: {plan.source.name} with a cache for the text and {plan.max_new_tokens:,} new tokens",
            hint="give a lower --max-new-tokens, less text, --dtype bfloat16, or a model with windows",
        ) from error


class Conversation:
    """A model in memory, and all `ids` that it has read and written; ids in the cache are not computed again."""

    def __init__(self, plan: GenerationPlan):
        from ctxext.model.decode import greedy, sampled, stop_ids

        with _in_memory(plan):
            self.plan, self.loaded = plan, _load(plan)
        self.tokenizer: Any = self.loaded.tokenizer
        if plan.chat and not self.tokenizer.chat_template:
            raise InputError(f"--chat: the tokenizer of {plan.source.name} has no chat template", hint=NO_CHAT_HINT)
        self.templated = bool(self.tokenizer.chat_template) if plan.chat is None else plan.chat
        self.choose = sampled(plan.temperature, plan.seed) if plan.temperature else greedy
        self.stop = stop_ids(self.loaded.model, self.tokenizer)
        self.reset()

    def reset(self) -> None:
        """Clears the conversation and its cache; the random number generator is not reset."""
        self.cache = self._new_cache()
        self.ids, self.user_texts, self.warned, self.slow = list[int](), list[str](), False, False

    def _new_cache(self) -> Any:
        from ctxext.model.decode import reserved_cache
        from ctxext.model.load import causal_lm

        return reserved_cache(causal_lm(self.loaded.model).get_decoder().config, 0)

    def _keep(self, length: int) -> int:
        """Returns how many tokens of the cache a text of `length` tokens can use: all, or none.

        It is none where RoPE has other frequencies at that length; the method then empties the cache.
        """
        from ctxext.model.frequencies import same_frequencies_from
        from ctxext.model.load import causal_lm

        kept = int(self.cache.get_seq_length())
        if kept < same_frequencies_from(causal_lm(self.loaded.model).get_decoder().config, length):
            self.cache, kept = self._new_cache(), 0
        return kept

    @contextmanager
    def _whole_turn(self) -> Iterator[None]:
        """Drops the cache where the turn fails or is interrupted: it may hold tokens that are not in `ids`.

        Layers with a window have lost earlier tokens by then, so the cache cannot be cut back to its state before.
        """
        try:
            yield
        except BaseException:
            self.cache = self._new_cache()
            raise

    def ask(
        self,
        text: str,
        *,
        write: Callable[[str], None] = lambda piece: None,
        progress: Progress = ignore,
        warn: Callable[[str], None] = lambda line: None,
    ) -> GeneratedAnswer:
        """Adds a turn and answers it.

        write      called with each piece of the answer
        progress   called with "reading", the tokens read and their total
        warn       called with each warning

        Without a chat template the turn is appended unchanged, on its own line. Raises ModelError where the template
        cannot render the turn, and where the tokenizer does not belong to this model. Raises EnvironmentFault where
        memory runs out. After an error or an interruption the conversation is as before the turn; the next turn then
        reads it again, because its cache is dropped.
        """
        from ctxext.model.decode import generate

        new = self._ids_of(text)
        kept = self._keep(len(self.ids) + len(new))
        unread = self.ids[kept:] + new  # the last token of an answer is not in the cache yet
        self._check(unread, kept, warn)
        # A plain text continues the prompt and keeps its first space. An answer in a conversation is a separate text.
        stream = TextStream(self.decode, [] if self.templated else (self.ids + new)[-TAIL:])
        # `clock` gets three times: start, end of reading, end of writing.
        clock, pieces = [time.perf_counter()], list[str]()

        def prefilled(done: int, total: int) -> None:
            progress("reading", done, total)
            if done == total:
                _finish(self.loaded.device)
                clock.append(time.perf_counter())

        def say(row: int, token: int) -> None:
            if piece := stream.add(token):
                pieces.append(piece)
                write(piece)

        progress("reading", 0, len(unread))
        how: dict[str, Any] = {"stop": self.stop, "choose": self.choose, "cache": self.cache, "seen": [self.ids[:kept]]}
        with self._whole_turn(), _in_memory(self.plan):
            most = self.plan.max_new_tokens
            [answer] = generate(self.loaded.model, [unread], most, prefilled=prefilled, on_token=say, **how)
            clock.append(time.perf_counter())
            # At the end, return the bytes of an incomplete character too; only then add the turn to the conversation.
            pieces.append(stream.rest())
            write(pieces[-1])
            self.ids, self.user_texts = [*self.ids, *new, *answer], [*self.user_texts, text]
        # The write speed counts the tokens that a forward computed after the reading: the growth of the cache.
        reading, writing = clock[1] - clock[0], clock[2] - clock[1]
        return GeneratedAnswer(
            model=self.plan.source.name,
            text="".join(pieces),
            read=len(unread),
            kept=kept,
            written=len(answer),
            stopped=len(answer) < self.plan.max_new_tokens,
            read_seconds=reading,
            read_speed=len(unread) / reading,
            write_seconds=writing,
            write_speed=(self.cache.get_seq_length() - kept - len(unread)) / writing,
            peak_bytes=_peak_bytes(self.loaded.device),
            cache=self.held(),
        )

    def decode(self, ids: list[int]) -> str:
        """Returns ids as text, without special tokens and without cleanup of spaces."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def held(self) -> tuple[Held, ...]:
        """Returns the contents of the cache, by kind of layer."""
        layers: dict[str, list[Any]] = {}
        for kind, layer in zip(self.loaded.kinds, self.cache.layers, strict=True):
            layers.setdefault(kind.letter, []).append(layer)
        return tuple(
            Held(letter, len(same), same[0].keys.shape[2], sum(x.keys.nbytes + x.values.nbytes for x in same))
            for letter, same in layers.items()
        )

    def _ids_of(self, text: str) -> list[int]:
        """Returns the tokens of a new turn: from the end of the last answer to the start of the next.

        They equal the tokens at this place when the whole conversation is tokenised at once (data/prompts.py). The
        exception is a token that would cross the boundary to the earlier ids.
        """
        if self.templated:
            text = self._rendered(text)
            if not self.ids:
                return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        elif not self.ids:
            return prompt_ids(self.tokenizer, text)
        else:
            text = f"\n{text}\n"
        return continued_ids(self.tokenizer, self.ids, text)

    def _rendered(self, text: str) -> str:
        # Render the whole conversation, with a marker for each answer, and return the text after the last marker.
        messages = []
        for user_text in self.user_texts:
            messages += [{"role": "user", "content": user_text}, {"role": "assistant", "content": MARKER}]
        messages.append({"role": "user", "content": text})
        name = self.plan.source.name
        try:
            whole: str = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program and may raise any exception
            raise ModelError(f"{name}: its chat template does not render this ({error})", hint=NO_CHAT_HINT) from error
        if whole.count(MARKER) != len(self.user_texts):
            raise ModelError(
                f"{name}: its chat template leaves out earlier answers, and the cache has them", hint=NO_CHAT_HINT
            )
        return whole.rpartition(MARKER)[2]

    def _check(self, unread: list[int], kept: int, warn: Callable[[str], None]) -> None:
        """Raises ModelError for ids outside the model's vocabulary.

        Warns, once each, where the text exceeds the length that the model supports, and where dynamic RoPE makes it
        slow.
        """
        source, end = self.plan.source, kept + len(unread)
        check_ids(unread, source.config.shape.vocab_size, source.name)
        longest, limit = end + self.plan.max_new_tokens, source.config.max_position_embeddings
        if source.config.rope.get("rope_type") == "dynamic" and longest > limit and not self.slow:
            self.slow = True
            warn(
                f"warning: RoPE is dynamic: beyond {format_tokens(limit)} tokens each new token reads the "
                "whole text again, without a cache"
            )
        if longest > source.usable_length and not self.warned:
            self.warned, first = True, source.original_length
            warn(
                f"warning: {format_tokens(end)} tokens and up to {format_tokens(self.plan.max_new_tokens)} new ones "
                f"exceed the usable length of {source.name}, {format_tokens(source.usable_length)}"
                + (f" (first trained at {format_tokens(first)})" if first not in (None, source.usable_length) else "")
                + ": the text beyond is unreliable"
            )


def _load(plan: GenerationPlan) -> Any:
    import torch

    from ctxext.model.load import load_model

    device = plan.device or default_device()
    if device != "cpu" and int(device.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise EnvironmentFault(f"--device {device}: torch finds {torch.cuda.device_count()} GPUs", hint="--device cpu")
    return load_model(plan.source, dtype=plan.dtype or ("float32" if device == "cpu" else "bfloat16"), device=device)


def _finish(device: Any) -> None:
    """Waits until a GPU has finished its work, so that the clock measures it."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def _peak_bytes(device: Any) -> int:
    """Returns the peak memory: the process's resident set on a CPU, that of torch's allocator on a GPU."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
