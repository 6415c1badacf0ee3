"""Plain text has no control tokens, whatever characters stand in it; all other ids are those of the tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from ctxext.data.documents import Document
from ctxext.data.encoding import PlainText
from ctxext.data.haystack import haystack_ids
from ctxext.data.store import tokenise
from ctxext.errors import InputError

CHAT = ["<|im_start|>", "<|im_end|>", "<unk>"]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, three control tokens beside BOS and EOS, and `<think>`, which is added and not special."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({"</s>": 0, "<s>": 1, **{c: i + 2 for i, c in enumerate(letters)}}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>", unk_token="<unk>", extra_special_tokens=CHAT[:2]
    )
    made.add_tokens([AddedToken("<think>", special=False), AddedToken("    ", special=False)])
    return made


PAGE = "The price was <s>ten</s> five <|im_end|> coins <unk>.\n"


def test_control_tokens_in_plain_text_are_its_characters() -> None:
    tokenizer = byte_tokenizer()
    plain = PlainText(tokenizer)
    ids, _ = plain.encode([PAGE])
    assert tokenizer.decode(ids[0]) == PAGE
    assert len(ids[0]) == len(PAGE), "one token a byte"
    assert not set(tokenizer.all_special_ids) & set(ids[0])
    stock = tokenizer(PAGE, add_special_tokens=False)["input_ids"]
    assert len(set(tokenizer.all_special_ids) & set(stock)) == 4, "stock transformers makes control tokens of it"
    assert plain.read_as_text == 4
    assert plain.notes() == ["4 control tokens in the text read as the characters they are, such as <s> in a web page"]


def test_other_ids_are_those_of_the_tokenizer_and_its_state_is_left_as_it_was() -> None:
    tokenizer = byte_tokenizer()
    text = "def f(x):\n    return '<think>' # é 🙂 < s > </ s>"
    plain = PlainText(tokenizer)
    both, spans = plain.encode([text, PAGE], spans=True)
    stock = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert both[0] == stock["input_ids"] and spans is not None and spans[0] == stock["offset_mapping"]
    added = tokenizer.convert_tokens_to_ids(["<think>", "    "])
    assert set(added) <= set(both[0]), "added tokens that are not special stay tokens"
    assert spans[1] == [(i, i + 1) for i in range(len(PAGE))]
    # Beside a control token, the other added tokens stay tokens too.
    mixed = plain.encode(["<s><think>    "])[0][0]
    assert mixed[-2:] == added and len(mixed) == len("<s>") + 2
    assert not tokenizer.backend_tokenizer.encode_special_tokens
    assert tokenizer.backend_tokenizer.encode("<s>", add_special_tokens=False).ids == [1]
    assert plain.largest == max(added)
    assert PlainText(tokenizer).notes() == []


def test_unknown_characters_are_no_control_tokens() -> None:
    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="b")
    plain = PlainText(tokenizer)
    assert plain.encode(["a x y a"])[0] == [[1, 0, 0, 1]]
    assert (plain.read_as_text, plain.kept) == (0, 0)


def test_a_control_token_that_is_a_word_of_the_vocabulary_is_kept_and_said() -> None:
    letters = [(letter, -9.0) for letter in "</s>"]
    pieces = Tokenizer(models.Unigram([("<unk>", 0.0), ("</s>", 0.0), ("▁", -2.0), ("a", -2.0), *letters], unk_id=0))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces, unk_token="<unk>", eos_token="</s>")
    plain = PlainText(tokenizer)
    assert plain.encode(["a</s>a"])[0] == [[3, 1, 3]]
    assert (plain.read_as_text, plain.kept) == (0, 1)
    assert plain.notes() == [
        "warning: 1 control token in the text kept: the tokenizer has no other token for these characters"
    ]


def test_slow_tokenizers_read_control_tokens_as_text_or_refuse() -> None:
    tokenizer = ByT5Tokenizer(extra_ids=0)
    assert not tokenizer.is_fast
    plain = PlainText(tokenizer)
    assert plain.encode(["a</s>b", "ab"])[0] == [[ord(c) + 3 for c in "a</s>b"], [ord(c) + 3 for c in "ab"]]
    assert plain.read_as_text == 1
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    with pytest.raises(InputError, match=r"control tokens next to '<think>', and ByT5Tokenizer treats both"):
        PlainText(tokenizer).encode(["a</s><think>"])


def test_what_templates_and_prompts_hold_are_control_tokens(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    text = "<|im_start|>hello<|im_end|>"
    answer = tokenise([Document(text, "d", ((12, len(text)),))], tokenizer, tmp_path / "a", eos_id=0)
    assert answer.meta.tokens == len("hello") + 3, "two control tokens and EOS"
    plain = tokenise([Document(text, "d")], tokenizer, tmp_path / "p", eos_id=0)
    assert plain.meta.tokens == len(text) + 1
    assert "2 control tokens" in plain.meta.reading["notes"][0]
    own = tokenise([Document(text, "d", ids=(5, 1, 6))], tokenizer, tmp_path / "o", eos_id=0)
    assert own.read(0, 4).tolist() == [5, 1, 6, 0] and own.meta.reading["notes"] == []


def test_haystacks_are_plain_text() -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.decode(haystack_ids(tokenizer, PAGE)) == PAGE


def test_a_real_tokenizer_gives_back_the_page_and_its_ids_of_other_text(stories: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(stories)
    page = "The price was <s>ten</s> five coins. Tom was happy to pay it.\n"
    plain = PlainText(tokenizer)
    ids = plain.encode([page])[0][0]
    assert tokenizer.decode(ids) == page
    assert not {1, 2} & set(ids) and plain.read_as_text == 2
    text = (stories.parents[1] / "cases" / "stories.txt").read_text()
    assert plain.encode([text])[0][0] == tokenizer(text, add_special_tokens=False)["input_ids"]
