"""Checks the tokenizer of a model directory: its ids against tokenizer.json, and its control tokens.

transformers is imported inside functions. Not checked: whether the weights were trained with this tokenizer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ctxext.doctor.finding import Finding, judged
from ctxext.errors import ModelError
from ctxext.model.companions import read_object, require_tokenizer
from ctxext.model.source import read_config

SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
REMEDY = "copy the tokenizer's files of the model these weights came from"


def tokenizer(path: Path, rows: int) -> list[Finding]:
    """Returns the findings about the tokenizer of a directory. `rows`: of the model's embedding."""
    found: list[Any] = []

    def opens() -> str:
        from ctxext.model.tokenizer import load_tokenizer

        require_tokenizer(path)
        found.append(load_tokenizer(path))
        known = found[0].get_vocab()
        largest = max(known.values(), default=-1)
        if largest >= rows:
            raise ModelError(f"its largest id is {largest:,}, the embedding has {rows:,} rows")
        return f"opens; {len(known):,} tokens for {rows:,} rows of the embedding"

    findings = [
        judged("tokenizer", opens, REMEDY),
        judged("special tokens", lambda: _in_range(path, rows), "correct the id in that file"),
    ]
    # The other checks need a tokenizer that opens; BOS and EOS also need ids in range.
    if found:
        findings += _ids(path, found[0])
        if findings[1].status == "ok":
            findings += _ends(path, found[0])
    return findings


def _in_range(path: Path, size: int) -> str:
    """The ids of control tokens in config.json and generation_config.json. Raises ModelError for one out of range."""
    ids: dict[str, Any] = {}
    for place, settings in _settings(path):
        for name in SPECIAL:
            value = settings.get(name)
            for one in value if isinstance(value, list) else [value]:
                if one is not None and not (isinstance(one, int) and 0 <= one < size):
                    raise ModelError(f"{place}: {name} {one!r} is outside the {size:,} rows of the embedding")
                ids[name] = value if value is not None else ids.get(name)
    return ", ".join(f"{name} {value}" for name, value in ids.items())


def _settings(path: Path) -> list[tuple[str, dict[str, Any]]]:
    defaults = path / "generation_config.json"
    also = [(defaults.name, read_object(defaults))] if defaults.is_file() else []
    return [("config.json", read_config(path)), *also]


def _ids(path: Path, mine: Any) -> list[Finding]:
    """Compares the ids of fixed texts: tokenizer.json against AutoTokenizer and against the tokenizer ctxext loads."""
    from tokenizers import Tokenizer

    from ctxext.model.tokenizer import FILE, PROBES, by_hand, differs, probe_texts, settle, stock_tokenizer, version

    name = "token ids"
    if not (path / FILE).is_file():
        return [Finding(name, "ok", f"not compared: there is no {FILE}")]
    # The file may ask for truncation or padding, which are not part of the ids.
    file = Tokenizer.from_file(str(path / FILE))
    file.no_truncation()
    file.no_padding()
    texts = list(probe_texts(mine))

    def against(tokenizer: Any) -> str | None:
        for text in texts:
            ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
            wanted = file.encode(text, add_special_tokens=False).ids
            if ids != wanted:
                return differs(tokenizer, text, ids, wanted)
        return None

    try:
        stock: Any = stock_tokenizer(path)
        problem = against(stock)
    except Exception as error:  # transformers raises errors of any kind for foreign files
        problem = f"it cannot open the files ({str(error)[:200]})"
    # AutoTokenizer gives other ids, ctxext gives the right ones: a warning for programs that use AutoTokenizer.
    if problem is not None and against(mine) is None:
        text = f"AutoTokenizer of {version()} does not follow {FILE}: {problem}; ctxext uses {FILE}"
        settled = settle(path, read_config(path))
        remedy = f"in your own programs: {by_hand(str(path))}"
        if settled.problem is None and settled.files:
            remedy = f"set tokenizer_class to PreTrainedTokenizerFast in tokenizer_config.json; {remedy}"
        return [Finding(name, "warning", text, remedy)]
    # Both give other ids: the files themselves disagree.
    if problem is not None:
        text = f"the other tokenizer files change the ids of {FILE}: {problem}"
        return [Finding(name, "warning", text, "remove the added tokens of tokenizer_config.json that differ")]
    return [Finding(name, "ok", f"those of {FILE}, on {len(texts)} texts ({len(PROBES)} of many languages and code)")]


def _ends(path: Path, mine: Any) -> list[Finding]:
    """Warnings where there is no EOS, or where BOS is not added as tokenizer_config.json says."""
    from ctxext.data.prompts import framing

    found = []
    if mine.eos_token_id is None:
        text = "the tokenizer has no EOS token to end documents, so finetune refuses it"
        found.append(Finding("EOS", "warning", text, "set eos_token in tokenizer_config.json"))
    file = path / "tokenizer_config.json"
    # What the tokenizer adds is measured on a text: transformers 5 follows the post_processor of tokenizer.json.
    stated = read_object(file).get("add_bos_token") if file.is_file() else None
    adds = mine.bos_token_id is not None and mine.bos_token_id in framing(mine)[0]
    if stated is not None and bool(stated) != adds:
        text = f"tokenizer_config.json says add_bos_token {str(bool(stated)).lower()}, and the tokenizer "
        text += "adds one" if adds else "adds none"
        remedy = "nothing with transformers 5, which follows the post_processor of tokenizer.json"
        found.append(Finding("BOS", "warning", text, remedy))
    return found
