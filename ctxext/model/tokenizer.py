"""Loads a model's tokenizer so that `tokenizer.json` decides the token ids, whichever class transformers selects.

transformers selects a class by `model_type` and `tokenizer_class`. Several of its classes (LlamaTokenizer,
Qwen2Tokenizer and others) keep only the vocabulary of tokenizer.json and build the rest of the pipeline themselves.
If the file describes another pipeline, such a class gives other ids without any message. `load_tokenizer` compares
the two pipelines and uses the file where they differ. `settle` writes the tokenizer of an output so that stock
transformers gives the same ids.

The following holds by the source of transformers 5.17 and 5.23, and by runs with 4.57 and 5.23:
- TokenizersBackend (5.x; PreTrainedTokenizerFast is its name in 4.x and still an alias) loads tokenizer.json as it
  is.
- All three versions understand `tokenizer_class: PreTrainedTokenizerFast` in tokenizer_config.json. 4.57 does not
  know `TokenizersBackend`.
- For a few model types (qwen2 among them) 5.x ignores `tokenizer_class`, so that no file can select another class.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import transformers
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ctxext.errors import ModelError
from ctxext.model.companions import copy_companions, read_object, require_tokenizer
from ctxext.model.config_fields import Fields

FILE, SETTINGS, AS_FILE = "tokenizer.json", "tokenizer_config.json", "PreTrainedTokenizerFast"
NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")
PROBES = (
    "Once upon a time, there was a little girl. It's 3:15 o'clock, isn't it?",
    "  def f(x):\n\treturn  x[1:] + 0x1F  # comment\n\n\n    if (a != b): pass\r\n",
    " leading and trailing space ",
    "\nA line.\n\n  Another one.\n",
    "1234567890 3.14159 1,000,000 2026-11-30 v1.2.3 50%",
    "Größe, déjà vu, ﬁne, Å vs. A\u030a, naïve café — “quotes” …",
    "Привет, мир! Γειά σου Κόσμε. 你好，世界。 こんにちは 안녕하세요 สวัสดี नमस्ते שלום مرحبا",
    "🙂👩‍👩‍👧 🏳️‍🌈 \u2581 \u00a0\u200b\ufeff \t\x00\x7f",
    'camelCase snake_case SCREAMING_CASE http://a.b/c?d=e&f=1 <b>bold</b> {"k": [1, null]}',
)
CHAT_PROBE = (
    {"role": "user", "content": "  Hi, it's 10 o'clock.\n"},
    {"role": "assistant", "content": "Hello there."},
    {"role": "user", "content": "Tell me:\n  x = 42"},
)


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Returns the tokenizer of a model directory.

    If the directory has a tokenizer.json, plain text gives the ids of `tokenizers.Tokenizer.from_file` on that file.
    The function returns AutoTokenizer's tokenizer if its normalizer, pre-tokenizer, model and decoder equal those of
    the file and it has the file's added tokens. If they differ, or if AutoTokenizer fails, it loads the file as it
    is (PreTrainedTokenizerFast). In both cases the rest comes from tokenizer_config.json: special tokens, chat
    templates, model_max_length, and tokens that only added_tokens_decoder lists there (they get ids after those of
    the file). A special token that only transformers' class defines is kept if the file contains it.

    The post-processor of the file decides whether BOS and EOS are added. transformers 5 ignores add_bos_token and
    add_eos_token if there is a tokenizer.json, and so does this function. It also ignores add_prefix_space in
    tokenizer_config.json, because the file has its own setting.

    AutoTokenizer opens a directory that has only tokenizer.model, or vocab.json and merges.txt. Raises ModelError if
    there is no tokenizer or it does not open.
    """
    require_tokenizer(path)
    if (path / SETTINGS).is_file():
        read_object(path / SETTINGS)  # raises with the file's name if it is not a JSON object
    file, stock = path / FILE, None
    # A failure of AutoTokenizer is fatal only if there is no tokenizer.json to load instead.
    try:
        try:
            stock = stock_tokenizer(path)
        except Exception:  # tokenizers raises bare Exception for a file it cannot parse
            if not file.is_file():
                raise
        if stock is not None and (not file.is_file() or same_pipeline(stock, Tokenizer.from_file(str(file)))):
            return stock
        return _as_file(path, stock)
    except Exception as error:
        raise ModelError(f"{path}: the tokenizer cannot be opened ({error})") from error


def stock_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Returns AutoTokenizer's tokenizer of a directory, without remote code. Raises what transformers raises."""
    found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    return found


def _as_file(path: Path, stock: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    """Loads tokenizer.json as it is and keeps the special tokens of `stock`'s class that the file contains."""
    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
    known = tokenizer.get_vocab()
    for name in NAMED:
        token = getattr(stock, name, None)
        if getattr(tokenizer, name) is None and token in known:
            setattr(tokenizer, name, token)
    found: PreTrainedTokenizerBase = tokenizer
    return found


def same_pipeline(tokenizer: Any, file: Tokenizer) -> bool:
    """Checks that a tokenizer encodes and decodes by the steps of `file`. Ignores padding, BOS and EOS.

    Settings without effect on ids are ignored: trim_offsets, empty affixes, the options of a ByteLevel decoder.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        return False
    # Each added token of the file must be present under the same id; the tokenizer may have more.
    mine, theirs = backend.get_added_tokens_decoder(), file.get_added_tokens_decoder()
    if any(index not in mine or mine[index].content != token.content for index, token in theirs.items()):
        return False
    parts = ("normalizer", "pre_tokenizer", "decoder", "model")
    return all(_same_part(getattr(backend, part), getattr(file, part), part == "decoder") for part in parts)


def _same_part(mine: Any, theirs: Any, decodes: bool) -> bool:
    if mine is None or theirs is None:
        return mine is theirs
    states = [part.__getstate__() for part in (mine, theirs)]  # JSON; a vocabulary of 150,000 takes a tenth of a second
    return states[0] == states[1] or _plain(json.loads(states[0]), decodes) == _plain(json.loads(states[1]), decodes)


def _plain(part: Any, decodes: bool) -> Any:
    """Returns a pipeline part as JSON without the settings that have no effect."""
    if isinstance(part, list):
        return [_plain(one, decodes) for one in part]
    if not isinstance(part, dict):
        return part
    if decodes and part.get("type") == "ByteLevel":
        return {"type": "ByteLevel"}
    # A BPE affix that is empty or null does nothing; fuse_unk does nothing without an unknown token.
    idle = {"trim_offsets"} | {
        name for name in ("continuing_subword_prefix", "end_of_word_suffix") if not part.get(name)
    }
    if part.get("type") == "BPE" and part.get("unk_token") is None:
        idle.add("fuse_unk")
    return {
        name: value if name == "vocab" else _plain(value, decodes) for name, value in part.items() if name not in idle
    }


@dataclass(frozen=True)
class Settled:
    """How to write a model's tokenizer so that stock transformers gives the same ids as ctxext.

    files    contents that replace the source's files of these names; empty if a plain copy is enough
    problem  how AutoTokenizer still differs, as a sentence; None if it does not differ
    """

    files: dict[str, bytes] = field(default_factory=dict)
    problem: str | None = None


def settle(source: Path, fields: Fields) -> Settled:
    """Compares `load_tokenizer(source)` with AutoTokenizer on the same tokenizer files next to another config.json.

    The function tries three forms in this order: the files as they are; tokenizer_class set to
    PreTrainedTokenizerFast; in addition, tokenizer.json written from the tokenizer in memory. It returns the first
    form with the same ids (`difference`) and the same pipeline. If there is none, it returns the first form with the
    same ids. Raises ModelError if the source's tokenizer does not open.
    """
    mine: Any = load_tokenizer(source)
    backend = getattr(mine, "backend_tokenizer", None)
    forms: list[dict[str, bytes]] = [{}]
    if isinstance(backend, Tokenizer):
        named = {SETTINGS: _settings(source, mine)}
        forms += [named] if (source / FILE).is_file() else []
        forms.append(named | {FILE: backend.to_str().encode()})
    problem, alike = "", list[Settled]()
    # Write each form with `fields` as config.json into a temporary directory and open it there: transformers selects
    # the class by config.json as well.
    for files in forms:
        with TemporaryDirectory() as place:
            copy_companions(source, Path(place), files)
            (Path(place) / "config.json").write_text(json.dumps(fields), "utf-8")
            try:
                stock = stock_tokenizer(Path(place))
            except Exception as error:  # transformers raises many types for foreign files
                problem = problem or f"AutoTokenizer cannot open it ({error})"
                continue
        found = difference(mine, stock)
        # Equal ids on the probe texts are weaker evidence than an equal pipeline, so a form with both comes first.
        if found is None and (not isinstance(backend, Tokenizer) or same_pipeline(stock, backend)):
            return Settled(files)
        if found is None:
            alike.append(Settled(files))
        problem = found or problem
    return alike[0] if alike else Settled({}, problem)


def _settings(source: Path, tokenizer: Any) -> bytes:
    """Returns a tokenizer_config.json that selects the class that loads tokenizer.json as it is, and no remote code."""
    file = source / SETTINGS
    settings = read_object(file) if file.is_file() else {}
    settings.pop("auto_map", None)
    # Some classes define special tokens by default; this class defines none, so the file must name them.
    named = {
        name: getattr(tokenizer, name) for name in NAMED if settings.get(name) is None and getattr(tokenizer, name)
    }
    return (json.dumps(settings | named | {"tokenizer_class": AS_FILE}, indent=2, ensure_ascii=False) + "\n").encode()


def difference(mine: Any, other: Any) -> str | None:
    """Returns how two tokenizers differ on the probe texts, as a sentence, or None if they do not differ.

    The function compares the ids of each text, with and without the special tokens that a prompt gets, the text
    decoded from the ids, the ids of the special tokens, and the chat templates. If there is a chat template, the
    probe texts include a rendered conversation.
    """
    for text in probe_texts(mine):
        for special in (False, True):
            a, b = (_ids(tokenizer, text, special) for tokenizer in (mine, other))
            if a != b:
                return differs(other, text, b, a)
        # `a` holds the ids with special tokens, which both tokenizers share at this point.
        if (decoded := other.decode(a)) != mine.decode(a):
            return f"{type(other).__name__} decodes the ids of {text[:40]!r} to {decoded[:40]!r}"
    for name in NAMED:
        a, b = (getattr(tokenizer, f"{name}_id") for tokenizer in (mine, other))
        if a != b:
            return f"{type(other).__name__} has {name} {b}, but this tokenizer has {a}"
    if other.chat_template != mine.chat_template:
        return f"{type(other).__name__} has another chat template"
    return None


def differs(tokenizer: Any, text: str, ids: list[int], expected: list[int]) -> str:
    """Describes in one sentence the first place where the ids of a text differ from the expected ids."""
    at = next((i for i, (a, b) in enumerate(zip(ids, expected, strict=False)) if a != b), min(len(ids), len(expected)))
    return (
        f"{type(tokenizer).__name__} reads {_shown(text)} as {ids[at : at + 4]} from token {at} on, "
        f"not as {expected[at : at + 4]}"
    )


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")


def probe_texts(tokenizer: Any) -> Iterator[str]:
    """Yields the fixed texts, one text with the tokenizer's BOS and EOS, and a conversation if there is a template."""
    yield from PROBES
    first, last = (token or "" for token in (tokenizer.bos_token, tokenizer.eos_token))
    yield f"{first}Hi {last} there{last}\n{first} line{last}{last}x"
    if tokenizer.chat_template:
        # Some templates reject a conversation of several turns: try one user message then.
        for messages in (CHAT_PROBE, CHAT_PROBE[:1]):
            try:
                yield tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
                return
            except Exception:  # a template is a program and may reject a conversation
                continue


def _ids(tokenizer: Any, text: str, special: bool) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def by_hand(path: str) -> str:
    """Returns the line of Python that opens a tokenizer for which AutoTokenizer selects another class."""
    return f"{AS_FILE}.from_pretrained({path!r})"


def warning(problem: str, path: str) -> str:
    """Returns what is wrong with AutoTokenizer on a directory and what to use instead.

    `problem` comes from `settle`.
    """
    return f"AutoTokenizer of {version()} reads other ids: {problem}; use {by_hand(path)}"


def version() -> str:
    """Returns the name and version of the installed transformers, for messages."""
    return f"transformers {transformers.__version__}"
