"""A prompt is tokenizer(prompt) without an end, and a new turn is what the whole conversation has there."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ctxext.data.prompts import continued_ids, framing, prompt_ids

LETTERS = "abcdefghijklmnopqrstuvwxyzOTQ:[]/.,?"


def framed(tokenizer: Tokenizer, single: str, **tokens: str) -> Any:
    """`single` is the post-processor's template: `<s> $A </s>`."""
    named = [(word, tokenizer.token_to_id(word)) for word in ("<s>", "</s>") if word in single]
    if single != "$A":
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=named)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **({"bos_token": "<s>", "eos_token": "</s>"} | tokens))


def byte_level(single: str = "$A", **tokens: str) -> Any:
    """One token a byte, and one for two line ends."""
    vocabulary = {"</s>": 0, "<s>": 1} | {c: i + 2 for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    words = Tokenizer(models.BPE(vocabulary | {"ĊĊ": 300, "Ġt": 301}, [("Ċ", "Ċ"), ("Ġ", "t")]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    words.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in ("</s>", "<s>")])
    return framed(words, single, **tokens)


def sentencepiece(single: str = "<s> $A") -> Any:
    """As Llama 2's: a space before every text that is given, bytes for unknown characters."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *LETTERS, "▁t", "▁a", "th"]
    merges = [("▁", "t"), ("▁", "a"), ("t", "h")]
    bpe = models.BPE(
        {piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    words = Tokenizer(bpe)
    words.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    words.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    words.add_special_tokens([AddedToken(w, special=True, normalized=False) for w in ("<unk>", "<s>", "</s>")])
    return framed(words, single)


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
@pytest.mark.parametrize(
    ("single", "begin", "end"),
    [("$A", 0, 0), ("<s> $A", 1, 0), ("$A </s>", 0, 1), ("<s> $A </s>", 1, 1), ("<s> <s> $A </s>", 2, 1)],
)
def test_a_prompt_has_what_the_tokenizer_puts_before_it_and_not_what_it_appends(make, single, begin, end) -> None:
    tokenizer = make(single)
    before, after = framing(tokenizer)
    assert before == [tokenizer.bos_token_id] * begin and after == [tokenizer.eos_token_id] * end
    for text in ("a text", "", " ", "a text</s>", "<s>a", "é\n"):
        whole = tokenizer(text)["input_ids"]
        assert prompt_ids(tokenizer, text) == whole[: len(whole) - end]


def test_a_bos_that_is_the_eos_as_well_stays() -> None:
    tokenizer = byte_level("</s> $A", bos_token="</s>")
    assert framing(tokenizer) == ([0], [])
    assert prompt_ids(tokenizer, "") == [0] and prompt_ids(tokenizer, "a")[0] == 0


@pytest.mark.parametrize(
    ("earlier", "later"),
    [
        ("Once th", "\nThen\n"),
        ("a tart [/", "] to"),
        ("to?", "</s>[a] to [/a]"),
        ("to?</s>", "[a] to"),
        ("Q: é", "\nA: 日本 "),
        ("a", " t"),
    ],
)
@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_a_turn_is_what_the_whole_conversation_has_there(make, earlier, later) -> None:
    tokenizer = make()
    before = prompt_ids(tokenizer, earlier)
    assert before + continued_ids(tokenizer, before, later) == prompt_ids(tokenizer, earlier + later)


def test_a_turn_by_itself_has_a_space_that_nobody_wrote() -> None:
    tokenizer = sentencepiece()
    alone = tokenizer("\nto", add_special_tokens=False).tokens()
    assert alone == ["▁", "<0x0A>", "t", "o"]
    new = continued_ids(tokenizer, prompt_ids(tokenizer, "a th"), "\nto")
    assert tokenizer.convert_ids_to_tokens(new) == ["<0x0A>", "t", "o"]


def test_a_token_that_would_reach_over_the_boundary_leaves_what_is_there() -> None:
    tokenizer = byte_level()
    before = prompt_ids(tokenizer, "a\n")
    assert tokenizer("a\n\n").tokens() == ["a", "ĊĊ"]
    assert tokenizer.convert_ids_to_tokens(before + continued_ids(tokenizer, before, "\n")) == ["a", "Ċ", "Ċ"]


def test_ids_that_the_model_divided_otherwise_stay() -> None:
    tokenizer = sentencepiece()
    th = tokenizer.convert_tokens_to_ids(["▁", "t", "h"])  # the tokenizer has ▁t and h
    assert prompt_ids(tokenizer, "th")[1:] != th
    new = continued_ids(tokenizer, th, " a")
    assert tokenizer.convert_ids_to_tokens(new) == ["▁a"]
