"""tokenizer.json of every kind that the zoo's checkpoints have, its merges learned from a small text of ours.

A kind is how text is cut and written down: byte-level BPE behind one of four regular expressions, or SentencePiece-like
BPE with byte fallback, whose spaces are made by a normaliser or by Metaspace. The special tokens come from the row.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from tests.zoo.checkpoint import Checkpoint

LEARNED = 200  # tokens beside the alphabet, before the special ones
# how text is cut before BPE: GPT-2's expression is the default of ByteLevel, the others are as in their tokenizer.json
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3, QWEN2 = WORDS.format(digits=r"\p{N}{1,3}"), WORDS.format(digits=r"\p{N}")
MARKS = QWEN2.replace(r"\p{L}+", r"[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTE_LEVEL = {"gpt2": None, "digits": "digits", "llama3": LLAMA3, "qwen2": QWEN2, "marks": MARKS, "tekken": TEKKEN}
SPACE = "\u2581"
KINDS = (*BYTE_LEVEL, "normaliser", "replace", "metaspace")
NFC = ("qwen2", "marks")
LEARNED_FROM = """The harbour was quiet before the boats came home, and the keeper counted them one after another.
She wrote the numbers in a book: 12 boats in March, 1,984 in the year of the storm, 7 on the day of the fog.
def count(boats):
    total = 0
    for boat in boats:
        total += boat.crew  # one after another
    return {"total": total, "ok": True}
Der Hafen war still, bevor die Boote kamen. Le port était calme avant le retour des bateaux. El puerto estaba tranquilo.
港は静かだった。 港口很安静，船还没有回来。 Гавань была тиха. كان الميناء هادئا. बंदरगाह शांत था।
The keeper's lamp, the keeper's book, the keeper's dog: they're all there, and it's what we'll remember.
"""
# what every station compares: spaces, digits, code, marks, scripts, emoji
TEXT = (
    " The keeper counted 1234567 boats,  twice.\n\n    for boat in boats:\n\ttotal += 3.14\n"
    "Hafen Größe naïve cafe\u0301 港は静か 港口 Гавань الميناء बंदरगाह 👩‍🚀🚢 don't WE'LL ½ x² #5\r\n  end  "
)


def tokenizer_file(row: Checkpoint) -> tuple[dict[str, Any], dict[int, int]]:
    """tokenizer.json of a row, and the small id of every published one."""
    first = sorted(one for one in row.tokens if one < 1000)
    last = sorted(one for one in row.tokens if one >= 1000)
    pieces, merges = _learned(row.pieces)
    sentence = row.pieces not in BYTE_LEVEL
    if sentence:  # the bytes follow the first special tokens
        pieces = [*(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    known = [*(row.tokens[one] for one in first), *pieces]
    vocab = {piece: i for i, piece in enumerate(known)}
    assert len(vocab) == len(known), f"{row.name}: a special token is a learned piece too"
    ids = {one: vocab[row.tokens[one]] for one in first} | {one: len(known) + i for i, one in enumerate(last)}
    unknown = row.tokenizer_config.get("unk_token") if sentence else None
    model = {
        "type": "BPE", "dropout": None, "unk_token": unknown, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": sentence, "byte_fallback": sentence, "ignore_merges": False,
        "vocab": vocab, "merges": merges,
    }  # fmt: skip
    added = [
        {"id": ids[one], "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": text not in row.plain}
        for one, text in sorted(row.tokens.items(), key=lambda pair: ids[pair[0]])
    ]  # fmt: skip
    parts = _sentence_parts(row.pieces) if sentence else _byte_parts(row.pieces)
    whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}
    whole |= parts | {"model": model}
    if row.adds_bos:
        bos = row.tokenizer_config["bos_token"]
        here = next(ids[one] for one, text in row.tokens.items() if text == bos)
        whole["post_processor"] = _bos_first(bos, here, parts["post_processor"])
    return whole, ids


@cache
def _learned(kind: str) -> tuple[list[str], list[list[str]]]:
    """The alphabet and the merged pieces of a kind, in the order of their ids, and the merges."""
    tokenizer = Tokenizer(models.BPE())
    alphabet = [] if kind not in BYTE_LEVEL else sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.normalizer = normalizers.NFC() if kind in NFC else None
    # merges are learned inside words, as the trainer of SentencePiece does, whatever makes the spaces later
    words = pre_tokenizers.Metaspace(prepend_scheme="never" if kind == "replace" else "first")
    tokenizer.pre_tokenizer = words if kind not in BYTE_LEVEL else _from_json(_byte_parts(kind)["pre_tokenizer"])
    trainer = trainers.BpeTrainer(vocab_size=LEARNED + 256, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(LEARNED_FROM.splitlines(keepends=True), trainer)
    found = json.loads(tokenizer.to_str())["model"]
    pieces = sorted(found["vocab"], key=found["vocab"].__getitem__)
    return pieces, [pair if isinstance(pair, list) else pair.split(" ") for pair in found["merges"]]


def _from_json(part: dict[str, Any]) -> Any:
    """A pre-tokenizer from its JSON."""
    shell = json.loads(Tokenizer(models.BPE()).to_str()) | {"pre_tokenizer": part}
    return Tokenizer.from_str(json.dumps(shell)).pre_tokenizer


def _byte_parts(kind: str) -> dict[str, Any]:
    """Normaliser, pre-tokenizer, post-processor and decoder of a byte-level kind."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    before: list[dict[str, Any]] = []
    if BYTE_LEVEL[kind] == "digits":
        before = [{"type": "Digits", "individual_digits": True}]
    elif BYTE_LEVEL[kind] is not None:
        before = [{"type": "Split", "pattern": {"Regex": BYTE_LEVEL[kind]}, "behavior": "Isolated", "invert": False}]
        level |= {"use_regex": False}
    cut = {"type": "Sequence", "pretokenizers": [*before, level]} if before else level
    return {
        "normalizer": {"type": "NFC"} if kind in NFC else None,
        "pre_tokenizer": cut,
        "post_processor": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    }


def _sentence_parts(kind: str) -> dict[str, Any]:
    """The same of a SentencePiece-like kind."""
    back = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    by_normaliser = [
        {"type": "Prepend", "prepend": SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
    ]
    metaspace = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}
    normaliser = {"normaliser": {"type": "Sequence", "normalizers": by_normaliser}, "replace": by_normaliser[1]}
    return {
        "normalizer": normaliser.get(kind),
        "pre_tokenizer": metaspace if kind == "metaspace" else None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": back[:3] if kind == "replace" else back},
    }


def _bos_first(bos: str, here: int, before: dict[str, Any] | None) -> dict[str, Any]:
    """A post-processor that puts the BOS in front of a text."""
    one = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    two = [{"SpecialToken": {"id": bos, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    special = {bos: {"id": bos, "ids": [here], "tokens": [bos]}}
    template = {"type": "TemplateProcessing", "single": one, "pair": [*one, *two], "special_tokens": special}
    return template if before is None else {"type": "Sequence", "processors": [before, template]}
