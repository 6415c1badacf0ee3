"""A model's tokenizer: `tokenizer.json` decides the ids of a text, whichever class transformers picks.

transformers picks a class by model_type and by `tokenizer_class`. Several of its classes (LlamaTokenizer,
Qwen2Tokenizer and others) keep the vocabulary of tokenizer.json and build the rest of the pipeline themselves. For a
model whose file says something else, such a class gives other ids and no message. `load_tokenizer` compares the two and
takes the file where they differ; `settle` makes an output that stock transformers reads to the same ids.

Read in transformers 5.17 and 5.23, and run with 4.57 and 5.23:
- TokenizersBackend (5.x; PreTrainedTokenizerFast is its name in 4.x and still an alias) loads tokenizer.json as it is.
- `tokenizer_class: PreTrainedTokenizerFast` in tokenizer_config.json is understood by all three; `TokenizersBackend` is
  unknown to 4.57.
- For a few model types (qwen2 among them) 5.x ignores `tokenizer_class`. No file can then name another class.
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
from ctxext.model.companions import copy_companions
from ctxext.model.families import Config
from ctxext.model.source import read_object, require_tokenizer

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
TALK = (
    {"role": "user", "content": "  Hi, it's 10 o'clock.\n"},
    {"role": "assistant", "content": "Hello there."},
    {"role": "user", "content": "Tell me:\n  x = 42"},
)


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory.

    Where the directory has a tokenizer.json, plain text becomes the ids of `tokenizers.Tokenizer.from_file` on it. The
    tokenizer of AutoTokenizer is returned where its normalizer, pre-tokenizer, model and decoder are those of the file
    and it has the file's added tokens. Where they differ, or where AutoTokenizer does not open it, the file is loaded
    as it is (PreTrainedTokenizerFast). The rest comes from tokenizer_config.json in both cases: special tokens, chat
    templates, model_max_length, and tokens that only added_tokens_decoder there has (they get ids after those of the
    file). A special token that only transformers' class names is kept where the file has it.

    BOS and EOS are added as the post-processor of the file says. transformers 5 ignores add_bos_token and
    add_eos_token beside a tokenizer.json, and so does this function. add_prefix_space in tokenizer_config.json is not
    applied either: the file has its own.

    A directory with tokenizer.model alone, or with vocab.json and merges.txt, is opened by AutoTokenizer as before.
    Raises ModelError when there is no tokenizer or it does not open.
    """
    require_tokenizer(path)
    if (path / SETTINGS).is_file():
        read_object(path / SETTINGS)  # names the file where it is no JSON object
    file, stock = path / FILE, None
    try:
        try:
            stock = stock_tokenizer(path)
        except Exception:  # tokenizers raises bare Exception for a file that is not its own
            if not file.is_file():
                raise
        if stock is not None and (not file.is_file() or same_pipeline(stock, Tokenizer.from_file(str(file)))):
            return stock
        return _as_file(path, stock)
    except Exception as error:
        raise ModelError(f"{path}: the tokenizer does not open ({error})") from error


def stock_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """What transformers' AutoTokenizer makes of a directory, without code of others. Raises what transformers does."""
    found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    return found


def _as_file(path: Path, stock: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    """tokenizer.json as it is. Special tokens that `stock` knows from its class are kept where the file has them."""
    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
    known = tokenizer.get_vocab()
    for name in NAMED:
        token = getattr(stock, name, None)
        if getattr(tokenizer, name) is None and token in known:
            setattr(tokenizer, name, token)
    found: PreTrainedTokenizerBase = tokenizer
    return found


def same_pipeline(tokenizer: Any, file: Tokenizer) -> bool:
    """Whether a tokenizer turns text into ids and back by the steps of `file`. Padding, BOS and EOS are not compared.

    What has no effect on ids is left out: trim_offsets, empty affixes, the options of a ByteLevel decoder.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        return False
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
    """A part of a pipeline without what has no effect."""
    if isinstance(part, list):
        return [_plain(one, decodes) for one in part]
    if not isinstance(part, dict):
        return part
    if decodes and part.get("type") == "ByteLevel":
        return {"type": "ByteLevel"}
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
    """How the tokenizer of a model is written, so that stock transformers reads the ids that ctxext reads.

    files    take the place of the source's files of these names; none where a copy is enough
    problem  how AutoTokenizer differs all the same, as a sentence; None where it does not
    """

    files: dict[str, bytes] = field(default_factory=dict)
    problem: str | None = None


def settle(source: Path, config: Config) -> Settled:
    """Compare `load_tokenizer(source)` with AutoTokenizer on the same tokenizer files beside another config.json.

    Three forms are tried: the files as they are; with tokenizer_class set to PreTrainedTokenizerFast; with
    tokenizer.json written from the tokenizer in memory as well. The first with the same ids (`difference`) and the same
    pipeline is returned; where there is none, the first with the same ids. Raises ModelError where the source's
    tokenizer does not open.
    """
    mine: Any = load_tokenizer(source)
    backend = getattr(mine, "backend_tokenizer", None)
    forms: list[dict[str, bytes]] = [{}]
    if isinstance(backend, Tokenizer):
        named = {SETTINGS: _settings(source, mine)}
        forms += [named] if (source / FILE).is_file() else []
        forms.append(named | {FILE: backend.to_str().encode()})
    problem, alike = "", list[Settled]()
    for files in forms:
        with TemporaryDirectory() as place:
            copy_companions(source, Path(place), files)
            (Path(place) / "config.json").write_text(json.dumps(config), "utf-8")
            try:
                stock = stock_tokenizer(Path(place))
            except Exception as error:  # whatever transformers raises for files of others
                problem = problem or f"AutoTokenizer does not open it ({error})"
                continue
        found = difference(mine, stock)
        if found is None and (not isinstance(backend, Tokenizer) or same_pipeline(stock, backend)):
            return Settled(files)
        if found is None:
            alike.append(Settled(files))
        problem = found or problem
    return alike[0] if alike else Settled({}, problem)


def _settings(source: Path, tokenizer: Any) -> bytes:
    """tokenizer_config.json that names the class which loads tokenizer.json as it is, and no code of others."""
    file = source / SETTINGS
    settings = read_object(file) if file.is_file() else {}
    settings.pop("auto_map", None)
    # Some classes have special tokens of their own; this class has none, so the file has to name them.
    named = {
        name: getattr(tokenizer, name) for name in NAMED if settings.get(name) is None and getattr(tokenizer, name)
    }
    return (json.dumps(settings | named | {"tokenizer_class": AS_FILE}, indent=2, ensure_ascii=False) + "\n").encode()


def difference(mine: Any, other: Any) -> str | None:
    """How two tokenizers differ on the fixed texts, as a sentence; None where they do not.

    Compared are the ids of texts, bare and as a prompt (with what is added to it), the text that the ids stand for, the
    special tokens' ids, the chat templates, and the ids of a rendered conversation where there is a template.
    """
    for text in probe_texts(mine):
        for special in (False, True):
            a, b = (_ids(tokenizer, text, special) for tokenizer in (mine, other))
            if a != b:
                return differs(other, text, b, a)
        if (said := other.decode(a)) != mine.decode(a):
            return f"{type(other).__name__} makes {said[:40]!r} of the ids of {text[:40]!r}"
    for name in NAMED:
        a, b = (getattr(tokenizer, f"{name}_id") for tokenizer in (mine, other))
        if a != b:
            return f"{type(other).__name__} has {name} {b}, here it is {a}"
    if other.chat_template != mine.chat_template:
        return f"{type(other).__name__} has another chat template"
    return None


def differs(tokenizer: Any, text: str, ids: list[int], expected: list[int]) -> str:
    """One sentence about the first place where the ids of a text are not those expected."""
    at = next((i for i, (a, b) in enumerate(zip(ids, expected, strict=False)) if a != b), min(len(ids), len(expected)))
    return (
        f"{type(tokenizer).__name__} reads {_shown(text)} as {ids[at : at + 4]} from token {at} on, "
        f"not as {expected[at : at + 4]}"
    )


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")


def probe_texts(tokenizer: Any) -> Iterator[str]:
    """The fixed texts, a text with the tokenizer's own control tokens, and a conversation where it has a template."""
    yield from PROBES
    first, last = (token or "" for token in (tokenizer.bos_token, tokenizer.eos_token))
    yield f"{first}Hi {last} there{last}\n{first} line{last}{last}x"
    if tokenizer.chat_template:
        for messages in (TALK, TALK[:1]):
            try:
                yield tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
                return
            except Exception:  # a template is a program: it may refuse a form of conversation
                continue


def _ids(tokenizer: Any, text: str, special: bool) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def by_hand(path: str) -> str:
    """The line of Python that opens the tokenizer of a directory where AutoTokenizer takes another class."""
    return f"{AS_FILE}.from_pretrained({path!r})"


def warning(problem: str, path: str) -> str:
    """What is wrong with AutoTokenizer on a directory, and what to use instead. `problem` is that of `settle`."""
    return f"AutoTokenizer of {version()} reads other ids: {problem}; use {by_hand(path)}"


def version() -> str:
    """What read it, for messages."""
    return f"transformers {transformers.__version__}"
