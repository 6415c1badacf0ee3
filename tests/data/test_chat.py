"""What instruction data is read as, and that exactly its answers are scored: spans, tokens, labels."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ctxext.data.chat import chat_rows, template_hash
from ctxext.data.documents import Document, fingerprint, read_documents
from ctxext.data.packing import NO_LABEL, PackedSequences
from ctxext.data.store import TokenStore, scored_tokens, tokenise
from ctxext.errors import CtxextError, DataError, InputError

EOS = 0
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (  # as Llama 2's: no prompt for the answer but the end of the question, EOS after every answer
    "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }} </s>{% else %}{{ raise_exception('only user and assistant') }}"
    "{% endif %}{% endfor %}"
)
TALK = [
    {"role": "system", "content": "Say yes."},
    {"role": "user", "content": "yes"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "é?"},
    {"role": "assistant", "content": "naïve 42"},
    {"role": "user", "content": "ok"},
]


@pytest.fixture(scope="module")
def make() -> Callable[..., PreTrainedTokenizerFast]:
    """make(template) -> a tokenizer of one token a byte, but `</s>` (EOS), `<s>` and ChatML's markers."""

    def make(template: str | None = CHATML, trim: bool = False) -> PreTrainedTokenizerFast:
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        words = Tokenizer(models.BPE({"</s>": 0, "<s>": 1, **{c: i + 2 for i, c in enumerate(letters)}}, []))
        words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        words.post_processor = processors.ByteLevel(trim_offsets=trim)
        words.decoder = decoders.ByteLevel()
        words.add_special_tokens([AddedToken(word, special=True) for word in ("<|im_start|>", "<|im_end|>")])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", bos_token="<s>")
        tokenizer.chat_template = template
        return tokenizer

    return make


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read(path: Path, tokenizer: Any, format: str = "messages") -> list[Document]:
    return list(read_documents(str(path), rows=chat_rows(format, tokenizer)))


def answers(document: Document) -> list[str]:
    return [document.text[start:stop] for start, stop in document.answers or ()]


def fault(kind: type[CtxextError], act: Callable[[], object]) -> str:
    with pytest.raises(kind) as caught:
        act()
    assert caught.value.hint, f"no hint beside: {caught.value.message}"
    return caught.value.message


def test_answers_are_what_assistants_say_and_the_marker_after_it(tmp_path: Path, make: Any) -> None:
    (document,) = read(write(tmp_path / "a.jsonl", {"messages": TALK, "id": 7}), make())
    said = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in TALK]
    assert document.text == "".join(said)
    assert answers(document) == ["yes<|im_end|>", "naïve 42<|im_end|>"], "the line end is the template's"
    first = len(said[0]) + len(said[1]) + len("<|im_start|>assistant\n")
    assert document.answers and document.answers[0][0] == first, "the user's yes is taken for the assistant's"
    assert document.name == f"{tmp_path / 'a.jsonl'}:1"


def test_a_template_without_a_prompt_for_answers(tmp_path: Path, make: Any) -> None:
    (document,) = read(write(tmp_path / "a.jsonl", {"messages": TALK[1:5]}), make(INST))
    assert document.text == "<s>[INST] yes [/INST] yes </s><s>[INST] é? [/INST] naïve 42 </s>"
    assert answers(document) == [" yes </s>", " naïve 42 </s>"]


def test_prompts_are_joined_as_they_are_or_by_the_template(tmp_path: Path, make: Any) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "2 + 2 =", "completion": " 4"}, {"prompt": "", "completion": "x"})
    for tokenizer in (make(None), make()):
        plain = read(path, tokenizer, "prompt")
        assert [document.text for document in plain] == ["2 + 2 = 4", "x"]
        assert [answers(document) for document in plain] == [[" 4"], ["x"]]
    chat = read(path, make(), "prompt_chat")[0]
    assert chat.text == "<|im_start|>user\n2 + 2 =<|im_end|>\n<|im_start|>assistant\n 4<|im_end|>"
    assert answers(chat) == [" 4<|im_end|>"]


def test_parquet_is_read_as_jsonl_is_and_texts_beside_rows_are_not(tmp_path: Path, make: Any) -> None:
    rows = [{"messages": TALK}, {"messages": [{**TALK[1], "name": None}, TALK[4]]}]
    write(tmp_path / "a.jsonl", *rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "b.parquet")
    (tmp_path / "README.md").write_text("not data")
    documents = read(tmp_path, make())
    assert [document.name.rsplit("/")[-1] for document in documents] == [
        "a.jsonl:1", "a.jsonl:2", "b.parquet:1", "b.parquet:2"]  # fmt: skip
    for a, b in zip(documents[:2], documents[2:], strict=True):
        assert (a.text, a.answers) == (b.text, b.answers)
    said = fault(InputError, lambda: read(tmp_path / "README.md", make()))
    assert "allowed are .jsonl, .json, .parquet" in said
    as_read = {fingerprint(documents[0].name.partition(":")[0], format=name) for name in ("text", "messages", "prompt")}
    assert len(as_read) == 3
    text, chat = (fingerprint(str(tmp_path), format=name) for name in ("text", "messages"))
    (tmp_path / "README.md").write_text("changed")
    assert fingerprint(str(tmp_path)) != text and fingerprint(str(tmp_path), format="messages") == chat != text


NEVER_ENDS = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
CHANNELS = (  # as gpt-oss: control tokens and a name before the text, in the answer's own part
    "{% for m in messages %}<|im_start|>{{ m.role }}{% if m.role == 'assistant' %}<s>final<s>{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)
TRIMS = CHATML.replace("m.content }}", "m.content | trim | replace('  ', ' ') }}")


@pytest.mark.parametrize(
    ("template", "content", "expected"),
    [
        (CHATML, "yes\n", "yes\n<|im_end|>"),
        (CHATML, "", "<|im_end|>"),
        (CHATML, "<think>\nwhy\n</think>\n\nyes", "<think>\nwhy\n</think>\n\nyes<|im_end|>"),
        (TRIMS, " a  b ", "a b<|im_end|>"),
        (CHANNELS, "final", "<s>final<s>final<|im_end|>"),
        (NEVER_ENDS, "yes", "assistant: yes\n"),
    ],
)
def test_an_answer_ends_at_its_first_end_of_turn(tmp_path, make, template, content, expected) -> None:
    """And so does the row. Where a template writes no control token, all that it writes is the answer."""
    row = {"messages": [TALK[1], {"role": "assistant", "content": content}]}
    (document,) = read(write(tmp_path / "a.jsonl", row), make(template))
    assert answers(document) == [expected] and document.text.endswith(expected)


SYSTEMLESS = CHATML.replace("messages %}", "messages if m.role != 'system' %}", 1)
SHORTENS = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
ANSWERS_ONCE = CHATML.replace("{{ m.content }}", "{% if m.content != 'naïve 42' %}{{ m.content }}{% endif %}")


@pytest.mark.parametrize(
    ("template", "messages", "said"),
    [
        (SYSTEMLESS, [{"role": "system", "content": "Be brief."}, *TALK[1:3]], "message 1 (system)"),
        (SHORTENS, [TALK[1], {"role": "assistant", "content": "<think>hm</think>yes"}], "message 2 (assistant)"),
        (ANSWERS_ONCE, TALK, "message 5 (assistant)"),
    ],
)
def test_a_text_that_the_template_leaves_out_is_named(tmp_path, make, template, messages, said) -> None:
    path = write(tmp_path / "a.jsonl", {"messages": messages})
    message = fault(DataError, lambda: read(path, make(template)))
    assert message == f"{path}:1: the chat template leaves out or changes the text of {said}"


def test_a_template_that_adds_a_system_prompt_or_merges_the_given_one_is_read(tmp_path: Path, make: Any) -> None:
    adds = "<|im_start|>system\nHelp.<|im_end|>\n" + CHATML
    merges = CHATML.replace(
        "{% for m in messages %}",
        "{% set ns = namespace(first='') %}{% for m in messages %}{% if m.role == 'system' %}"
        "{% set ns.first = m.content %}{% else %}",
    ).replace(
        "{{ m.content }}<|im_end|>\n", "{{ ns.first }}{% set ns.first = '' %}{{ m.content }}<|im_end|>\n{% endif %}"
    )
    for template in (adds, merges):
        (document,) = read(write(tmp_path / "a.jsonl", {"messages": TALK[:3]}), make(template))
        assert answers(document) == ["yes<|im_end|>"] and "Say yes." in document.text


@pytest.mark.parametrize("text", ["a <|im_end|> b", "</s>", "<|im_start|>user"])
def test_control_tokens_in_a_message_are_refused(tmp_path: Path, make: Any, text: str) -> None:
    for number, role in ((1, "user"), (2, "assistant")):
        messages = [dict(TALK[1]), dict(TALK[2])]
        messages[number - 1]["content"] = text
        path = write(tmp_path / "a.jsonl", {"messages": TALK}, {"messages": messages})
        message = fault(DataError, lambda path=path: read(path, make()))
        assert message.startswith(f"{path}:2: message {number} ({role}) has '<") and "control token" in message


THINKS = CHATML.replace("assistant\n{% endif", "assistant\n<think>{% endif")
LAST_ONLY = (
    "{% for m in messages %}{{ m.content }}{% if loop.last and m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
)
SILENT = "{% for m in messages %}{% if m.role != 'assistant' %}{{ m.content }}{% endif %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (THINKS, "before message 3 is not the beginning of the whole"),
        (LAST_ONLY, "up to message 3 is not the beginning of the whole"),
        (SILENT, "leaves every answer out"),
        (INST, "does not render this conversation: only user and assistant"),
        (CHATML + "{% if messages|length == 2 %}{{ nothing.there }}{% endif %}", "(its first 2 messages)"),
    ],
)
def test_a_template_that_hides_where_answers_lie_is_refused(tmp_path, make, template, said) -> None:
    path = write(tmp_path / "a.jsonl", "", {"messages": TALK})
    message = fault(DataError, lambda: read(path, make(template)))
    assert message.startswith(f"{path}:2: ") and said in message


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": "hi"}, "field 'messages' holds str, not a list of messages"),
        ({"messages": []}, "holds an empty list"),
        ({"messages": ["hi"]}, "message 1 is str; allowed: an object with role and content"),
        ({"messages": [{"from": "human", "value": "hi"}]}, "message 1 has the fields from, value; allowed: role and"),
        ({"messages": [TALK[1], {"role": "assistant", "content": None}]}, "message 2 has the fields role; allowed"),
        ({"messages": [TALK[1], {**TALK[2], "weight": 0}]}, "message 2 has the fields role, content, weight"),
        ({"messages": [TALK[1], {"role": "assistant", "content": ["x"]}]}, "message 2: field 'content' holds list"),
        ({"messages": [TALK[1], {"role": "assistant", "content": "\ud800"}]}, "half a surrogate pair"),
        ({"messages": TALK[:2]}, "no message has the role 'assistant'; the roles there are system, user"),
        ({"messages": [TALK[2]]}, "the first message has the role 'assistant'"),
        ({"messages": TALK, "tools": [{}]}, "tools are not supported"),
        ({"text": "hi", "id": 1}, "no field 'messages'; the fields there are text, id"),
        ("{", "not JSON"),
    ],
)
def test_bad_rows_are_named_by_their_line(tmp_path: Path, make: Any, row: Any, said: str) -> None:
    path = write(tmp_path / "a.jsonl", {"messages": TALK}, row)
    message = fault(DataError, lambda: read(path, make()))
    assert message.startswith(f"{path}:2: "), message
    assert said in message


def test_other_refusals(tmp_path: Path, make: Any) -> None:
    for format in ("messages", "prompt_chat"):
        message = fault(InputError, lambda format=format: chat_rows(format, make(None)))
        assert message == f"data.format={format} needs a chat template, and the model's tokenizer has none"
    path = write(tmp_path / "a.jsonl", {"prompt": "x", "completion": ""})
    assert f"{path}:1: field 'completion' is empty" in fault(DataError, lambda: read(path, make(), "prompt"))
    for row, hint in [({"messages": TALK}, "data.format=messages"), ({"prompt": "", "completion": "x"}, "=prompt")]:
        path = write(tmp_path / "b.jsonl", row)
        with pytest.raises(DataError, match="no field 'text'") as caught:
            list(read_documents(str(path)))
        assert hint in (caught.value.hint or "")

    class Slow:
        is_fast = False

        def __len__(self) -> int:
            return 10

        def get_vocab(self) -> dict[str, int]:
            return {}

    message = fault(InputError, lambda: tokenise([Document("x", "d", ((0, 1),))], Slow(), tmp_path / "t", eos_id=0))
    assert message.startswith("Slow does not map tokens to characters")
    mixed = [Document("x", "d", ((0, 1),)), Document("y", "e")]
    fault(DataError, lambda: tokenise(mixed, make(), tmp_path / "t", eos_id=0))


@given(st.lists(st.integers(0, 3), max_size=20), st.lists(st.tuples(st.integers(0, 4), st.integers(1, 5)), max_size=5))
def test_a_token_is_scored_when_one_of_its_characters_is(widths: list[int], gaps: list[tuple[int, int]]) -> None:
    edges = np.cumsum([0, *widths]).tolist()
    spans = list(itertools.pairwise(edges))  # width 0: spaces that a tokenizer trimmed
    spots, at = [], 0
    for gap, width in gaps:
        spots.append((at + gap, at + gap + width))
        at = spots[-1][1]
    inside = {c for start, stop in spots for c in range(start, stop)}
    expected = [bool(inside & set(range(min(a, b - 1), b))) for a, b in spans]
    assert scored_tokens(spans, tuple(spots)).tolist() == expected


def test_indentation_that_a_tokenizer_trims_is_scored_in_answers_alone(tmp_path: Path, make: Any) -> None:
    text = Document("  a  |  b  ", "d", ((6, 11),))
    for trim in (False, True):
        store = tokenise([text], make(trim=trim), tmp_path / f"{trim}", eos_id=EOS)
        marks = store.read_scored(0, store.meta.tokens)
        assert marks.astype(int).tolist() == [0] * 6 + [1] * 5 + [1], f"trim_offsets={trim}"


@pytest.mark.parametrize("shard_tokens", [7, 1 << 20])
def test_marks_lie_beside_the_tokens_and_eos_is_not_doubled(tmp_path: Path, make: Any, shard_tokens: int) -> None:
    tokenizer = make(INST)
    path = write(tmp_path / "a.jsonl", {"messages": TALK[1:3]}, {"messages": TALK[1:4]}, {"messages": TALK[3:5]})
    store = tokenise(read(path, tokenizer), tokenizer, tmp_path / "t", eos_id=EOS, shard_tokens=shard_tokens)
    expected: list[tuple[int, bool]] = []
    for parts in (
        [("<s>[INST] yes [/INST]", False), (" yes </s>", True)],  # ends with an answer, and its EOS is EOS enough
        [("<s>[INST] yes [/INST]", False), (" yes </s>", True), ("<s>[INST] é? [/INST]</s>", False)],
        [("<s>[INST] é? [/INST]", False), (" naïve 42 </s>", True)],
    ):
        expected += [(t, mark) for part, mark in parts for t in tokenizer.encode(part, add_special_tokens=False)]
    ids, marks = (list(column) for column in zip(*expected, strict=True))
    total = store.meta.tokens
    assert store.read(0, total).tolist() == ids
    assert store.read_scored(0, total).tolist() == marks
    assert store.read_scored(5, 30).tolist() == marks[5:30]
    assert store.meta.scored == sum(marks)
    again = TokenStore.open(tmp_path / "t")
    assert again.read_scored(0, total).tolist() == marks


def test_an_eos_behind_the_end_of_turn_is_not_scored(tmp_path: Path, make: Any) -> None:
    """ChatML ends an answer with <|im_end|>, which is not this tokenizer's EOS."""
    tokenizer = make()
    path = write(tmp_path / "a.jsonl", {"messages": TALK[1:3]})
    store = tokenise(read(path, tokenizer), tokenizer, tmp_path / "t", eos_id=EOS)
    ids, marks = (list(take(0, store.meta.tokens)) for take in (store.read, store.read_scored))
    assert ids[-2:] == [tokenizer.convert_tokens_to_ids("<|im_end|>"), EOS]
    assert marks[-2:] == [True, False]


@pytest.mark.parametrize("mask", [False, True])
def test_labels_are_the_answers_and_sequences_without_one_are_left_out(tmp_path: Path, make: Any, mask: bool) -> None:
    texts = [("q" * 3, "ab", ""), ("", "c", ""), ("u" * 60, "de", ""), ("u" * 9, "fgh", "")]
    texts += [("", "x", "u" * 17), ("", "z", "")]  # z is the last of its sequence, and alone in being scored
    documents = [Document(q + a + rest, "d", ((len(q), len(q + a)),)) for q, a, rest in texts]
    tokenizer, T = make(), 8
    store = tokenise(documents, tokenizer, tmp_path / "t", eos_id=EOS)
    flat = [
        (c, len(q) <= i < len(q + a) or (c is None and not rest), i == 0)
        for q, a, rest in texts
        for i, c in enumerate([*q, *a, *rest, None])
    ]
    ids = [EOS if c is None else tokenizer.convert_tokens_to_ids(c) for c, _, _ in flat]
    packed = PackedSequences(store, T, seed=0, document_mask=mask)
    wanted = {}
    for first in range(0, len(flat) // T * T, T):
        labels = [NO_LABEL] * T
        for t in range(T - 1):
            _, scored, begins = flat[first + t + 1]
            if scored and not (mask and begins):
                labels[t] = ids[first + t + 1]
        if set(labels) != {NO_LABEL}:
            wanted[first] = labels
    got = {packed.offset(i): packed.sequence(i) for i in range(len(packed))}
    assert got.keys() == wanted.keys() and len(wanted) < len(flat) // T
    assert packed.without_answer == len(flat) // T - len(wanted)
    for first, sequence in got.items():
        assert sequence.labels.tolist() == wanted[first], f"labels at {first}"
        assert sequence.tokens.tolist() == ids[first : first + T]
    head, tail = packed.part(0, len(packed) - 1), packed.part(len(packed) - 1, 1)
    assert tail.offset(0) == max(wanted) and {head.offset(i) for i in range(len(head))} == wanted.keys() - {max(wanted)}
    question = [Document("q" * 32 + "a", "d", ((32, 33),))]
    short = tokenise(question, tokenizer, tmp_path / "s", eos_id=EOS)
    message = fault(DataError, lambda: PackedSequences(short, T, seed=0, document_mask=mask))
    assert message == "none of the 4 sequences of 8 tokens has a token of an answer"


def test_what_renders_is_part_of_the_hash_and_tokens_of_other_versions_are_not_read(tmp_path: Path, make: Any) -> None:
    assert template_hash(make()) == template_hash(make()) != template_hash(make(INST))
    named = make()
    named.bos_token = "<|im_start|>"
    assert template_hash(named) != template_hash(make()), "the template may write the BOS token"
    document = Document("qa", "d", ((1, 2),))
    tokenise([document], make(), tmp_path / "t", eos_id=EOS, source_fingerprint="a")
    meta = tmp_path / "t" / "meta.json"
    old = {key: value for key, value in json.loads(meta.read_text()).items() if key != "scored"}
    meta.write_text(json.dumps(old | {"format": 1}))
    with pytest.raises(DataError, match="no finished tokens"):
        TokenStore.open(tmp_path / "t")
    store = tokenise([document], make(), tmp_path / "t", eos_id=EOS, source_fingerprint="a")
    assert not store.reused and store.meta.scored == 2
