"""generate and chat: what streams is what was written, what is kept is what would be computed anew, refusals."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from ctxext.cli.chat import chat
from ctxext.cli.generate import generate
from ctxext.config.presets import shipped
from ctxext.errors import CtxextError, DataError, EnvironmentFault, InputError, ModelError
from ctxext.generation import Conversation, TextStream, plan_generation, read_prompt
from ctxext.model import decode
from ctxext.model.convert import plan_conversion, run_conversion
from ctxext.model.load import load_tokenizer

WINDOW = 8
CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def layout(model_dir: Any, place: Path, pattern: str) -> Path:
    window = WINDOW if "S" in pattern else None
    run_conversion(plan_conversion(str(model_dir()), pattern, out=place / "model", sliding_window=window), gate=False)
    return place / "model"


def talk_to(model: Path | str, **given: Any) -> Conversation:
    return Conversation(plan_generation(str(model), device="cpu", **({"max_new_tokens": 12} | given)))


@pytest.fixture(scope="module")
def tokenizers(model_dir: Any) -> list[Any]:
    return [load_tokenizer(model_dir()), load_tokenizer(shipped("presets") / "models" / "tiny")]


def streamed(tokenizer: Any, ids: list[int]) -> tuple[list[str], str]:
    """The pieces with what is left at the end, and the text at once."""

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    stream = TextStream(decode)
    return [*map(stream.add, ids), stream.rest()], decode(ids)


def test_a_character_of_several_tokens_comes_whole(tokenizers: list[Any]) -> None:
    for tokenizer in tokenizers:
        ids = tokenizer("a🙂é  \n日本", add_special_tokens=False)["input_ids"]
        pieces, whole = streamed(tokenizer, ids)
        assert "".join(pieces) == whole == "a🙂é  \n日本"
        assert not any("\ufffd" in piece for piece in pieces) and pieces[-1] == ""
        assert pieces.index("🙂") > 1  # it waited


@given(text=st.text(max_size=60))
def test_what_streams_is_the_text_at_once(tokenizers: list[Any], text: str) -> None:
    for tokenizer in tokenizers:
        pieces, whole = streamed(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"])
        assert "".join(pieces) == whole


@given(ids=st.lists(st.integers(0, 255), max_size=40))
def test_bytes_that_are_no_text_stream_as_the_decoder_has_them(tokenizers: list[Any], ids: list[int]) -> None:
    pieces, whole = streamed(tokenizers[0], ids)
    assert "".join(pieces) == whole


def test_spaces_of_a_sentencepiece_tokenizer_are_kept(stories: Path) -> None:
    tokenizer = load_tokenizer(stories)
    ids = tokenizer("Once upon a time, é 🙂 there  was", add_special_tokens=False)["input_ids"]
    pieces, whole = streamed(tokenizer, [ids[0], tokenizer.bos_token_id, *ids[1:]])
    assert "".join(pieces) == whole == "Once upon a time, é 🙂 there  was"
    assert sum(bool(piece) for piece in pieces) > 10


def test_greedy_is_what_transformers_writes(model_dir: Any) -> None:
    stock = AutoModelForCausalLM.from_pretrained(model_dir())
    ids = AutoTokenizer.from_pretrained(model_dir())("Once upon a time", return_tensors="pt")["input_ids"]
    given = stock.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20, pad_token_id=0)
    talk = talk_to(model_dir(), max_new_tokens=20)
    talk.ask("Once upon a time")
    expected = given[0].tolist()
    assert talk.ids == (expected[:-1] if expected[-1] == 0 else expected)


@pytest.mark.parametrize("pattern", ["full", "SN", "S", "SSSN"])
def test_a_second_turn_on_the_kept_cache_is_that_of_a_fresh_reading(
    model_dir: Any, tmp_path: Path, pattern: str
) -> None:
    """Far beyond the window, whether the first answer was cut or ended by itself."""
    talk, seen = talk_to(layout(model_dir, tmp_path, pattern)), []
    first, second = "In a hole in the ground there lived", "a number, and not"

    def noting(logits: Any) -> Any:
        seen.append(logits)
        return logits.argmax(-1)

    talk.choose, talk.stop = noting, frozenset()
    talk.ask(first)
    for stop, unread in ((frozenset(), 1), (frozenset(talk.ids[-4:]), 0)):
        talk.reset()
        talk.stop = stop
        talk.ask(first)
        talk.stop, before = frozenset(), len(talk.ids)
        seen.clear()
        answer = talk.ask(second)
        assert answer.kept == before - unread > 4 * WINDOW and answer.read == len(f"\n{second}\n") + unread
        kept, history = list(seen), talk.ids[: answer.kept + answer.read]
        seen.clear()
        assert decode.generate(talk.loaded.model, [history], 12, choose=noting) == [talk.ids[len(history) :]]
        assert max(float((a - b).abs().max()) for a, b in zip(kept, seen, strict=True)) < 1e-4


@pytest.mark.parametrize("place", ["reading", "first token", "later"])
@pytest.mark.parametrize("fault", [KeyboardInterrupt, torch.OutOfMemoryError])
def test_a_turn_that_fails_leaves_the_conversation_as_before(
    model_dir: Any, tmp_path: Path, fault: type[BaseException], place: str
) -> None:
    """The cache held tokens of the failed turn, and the next turn continued them."""
    directory = layout(model_dir, tmp_path, "SN")
    talk, healthy = talk_to(directory), talk_to(directory)
    talk.stop = healthy.stop = frozenset()
    for one in (talk, healthy):
        one.ask("In a hole in the ground")
    written: list[str] = []

    def progress(phase: str, done: int, total: int) -> None:
        if place == "reading" and done == total:
            raise fault

    def write(piece: str) -> None:
        written.append(piece)
        if place == "first token" or len(written) == 5:
            raise fault

    before = (list(talk.ids), list(talk.user_texts))
    with pytest.raises(EnvironmentFault if fault is torch.OutOfMemoryError else fault):
        talk.ask("there lived a number", progress=progress, write=write)
    assert (talk.ids, talk.user_texts) == before
    answer, expected = talk.ask("and not"), healthy.ask("and not")
    assert (answer.text, talk.ids) == (expected.text, healthy.ids)
    assert answer.kept == 0 and answer.read == expected.read + expected.kept and answer.cache == expected.cache


def test_a_sliding_layer_keeps_its_window_less_one_and_a_full_one_everything(model_dir: Any, tmp_path: Path) -> None:
    talk = talk_to(layout(model_dir, tmp_path, "SN"))
    for _ in range(3):
        answer = talk.ask("more and more words")
        sliding, full = answer.cache
        token = 2 * 2 * 8 * 4  # keys and values, 2 heads of 8, fp32
        held = answer.read + answer.kept + answer.written - (not answer.stopped)
        assert (sliding.kind, sliding.layers, sliding.tokens) == ("S", 2, WINDOW - 1)
        assert sliding.bytes == 2 * (WINDOW - 1) * token
        assert (full.kind, full.layers, full.tokens, full.bytes) == ("N", 2, held, 2 * held * token)
    assert "the most it keeps" in answer.rows()[-2][1] and "the most it keeps" not in answer.rows()[-1][1]


def templated(write_model: Any, place: Path, template: str = CHATML) -> Path:
    write_model(place / "model")
    (place / "model" / "chat_template.jinja").write_text(template, "utf-8")
    return place / "model"


def test_a_chat_template_gives_the_turns(write_model: Any, tmp_path: Path) -> None:
    talk = talk_to(templated(write_model, tmp_path))
    assert talk.templated
    for words in ("hello", "and you?", "bye"):
        talk.ask(words)
    history = talk.decode(talk.ids)
    for words in ("<|user|>hello<|end|><|assistant|>", "<|end|><|user|>and you?<|end|><|assistant|>"):
        assert history.count(words) == 1
    assert history.startswith("<|user|>hello") and history.count("<|assistant|>") == 3


def test_templates_that_a_cache_cannot_follow_are_refused(write_model: Any, tmp_path: Path) -> None:
    forgetful = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    talk = talk_to(templated(write_model, tmp_path / "a", forgetful))
    talk.ask("hello")
    with pytest.raises(ModelError, match="leaves out earlier answers"):
        talk.ask("again")
    talk = talk_to(templated(write_model, tmp_path / "b", "{{ raise_exception('never') }}"))
    with pytest.raises(ModelError, match=r"does not render this \(never\)"):
        talk.ask("hello")
    assert not talk_to(tmp_path / "b" / "model", chat=False).templated


def test_the_text_goes_on_with_the_space_of_its_first_token(stories: Path) -> None:
    """As transformers decodes the whole: what follows "was a little" begins with a space. Pieces and text agree."""
    pieces: list[str] = []
    answer = talk_to(stories).ask("Once upon a time, there was a little", write=pieces.append)
    tokenizer = AutoTokenizer.from_pretrained(stories)
    model = AutoModelForCausalLM.from_pretrained(stories)
    prompt = tokenizer("Once upon a time, there was a little", return_tensors="pt")
    stock = model.generate(**prompt, do_sample=False, max_new_tokens=12)[0].tolist()
    whole, start = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (stock, prompt["input_ids"][0].tolist()))
    assert answer.text == whole[len(start) :] == "".join(pieces) and answer.text.startswith(" girl named")


def test_characters_of_several_tokens_stream_after_a_prompt(tokenizers: list[Any], stories: Path) -> None:
    for tokenizer in (*tokenizers, load_tokenizer(stories)):
        before = tokenizer("Once upon", add_special_tokens=False)["input_ids"]
        ids = tokenizer("Once upon a 🙂é  \n日本", add_special_tokens=False)["input_ids"][len(before) :]
        stream = TextStream(lambda ids, tokenizer=tokenizer: str(tokenizer.decode(ids)), before)
        assert "".join([*map(stream.add, ids), stream.rest()]) == " a 🙂é  \n日本"


QA = (
    "{{ bos_token }}{% for m in messages %}{{ 'Q: ' + m.content + '\\nA:' if m.role == 'user' else m.content + '\\n' }}"
    "{% endfor %}"
)


@pytest.mark.parametrize("template", [None, QA])
def test_a_conversation_is_tokenised_whole(stories: Path, tmp_path: Path, template: str | None) -> None:
    """The ids of every turn are those that the whole text has there: no space before a turn that nobody wrote."""
    for name in (
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    ):
        if (stories / name).is_file():
            shutil.copyfile(stories / name, tmp_path / name)
    if template:
        (tmp_path / "chat_template.jinja").write_text(template)
    talk = talk_to(tmp_path, max_new_tokens=6)
    for words in ("Once upon a time", "Then the dog", "The end"):
        talk.ask(words)
    file = Tokenizer.from_file(str(stories / "tokenizer.json"))
    text = file.decode(talk.ids, skip_special_tokens=True)
    assert talk.ids == file.encode(text).ids, (text, talk.tokenizer.convert_ids_to_tokens(talk.ids))


def test_a_prompt_is_what_the_tokenizer_gives(model_dir: Any, stories: Path) -> None:
    """One tokenizer names a BOS and adds none, as SmolLM2's; the other adds it."""
    for model, adds in ((model_dir(), False), (stories, True)):
        talk = talk_to(model, max_new_tokens=1)
        talk.ask("Once upon a time")
        ids = AutoTokenizer.from_pretrained(model)("Once upon a time")["input_ids"]
        assert talk.ids[: len(ids)] == ids and (ids[0] == talk.tokenizer.bos_token_id) == adds


@pytest.mark.slow
def test_the_case_of_a_bos_that_is_not_added() -> None:
    """../shared/cases/bos-added on SmolLM2-135M-Instruct."""
    model = Path("/tmp/real/smollm2")
    if not model.is_dir():
        pytest.skip("/tmp/real/smollm2 is absent (../shared/tools/real_model.py writes it)")
    answer = talk_to(model, chat=False, max_new_tokens=24).ask("The capital of France is")
    assert answer.read == 5 and answer.text.startswith(" Paris.\n\nThe answer is: 201")


def test_what_leaves_the_usable_length_is_said_once(model_dir: Any) -> None:
    said: list[str] = []
    talk = talk_to(model_dir())
    talk.ask("short", warn=said.append)
    assert said == []
    for _ in range(2):
        talk.ask("x" * 70, warn=said.append)
    [line] = said
    assert "usable length of model, 64" in line and "tokens and up to 12 new ones" in line


def test_seeds_decide_what_is_drawn(model_dir: Any) -> None:
    texts = [talk_to(model_dir(), temperature=2.0, seed=seed).ask("a").text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_a_tokenizer_of_another_model_is_refused(write_model: Any, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", vocab_size=40)
    with pytest.raises(ModelError, match="the model has 40"):
        talk_to(model).ask("zzz")


def refused(error: type[CtxextError], words: str, prompt: str | None, file: Path | None, question: Any = None) -> None:
    with pytest.raises(error, match=words):
        read_prompt(prompt, None if file is None else str(file), question)


def test_prompts_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, raw in {"binary": b"\x80\x81", "nul": b"a\0b", "empty": b" \n"}.items():
        (tmp_path / name).write_bytes(raw)
    refused(InputError, "either --prompt", None, None)
    refused(InputError, "either --prompt", "a", tmp_path / "empty")
    refused(InputError, "--question needs --file", "a", None, "b")
    refused(InputError, "no text", "  ", None)
    refused(InputError, "no text", None, tmp_path / "empty", "what?")
    refused(InputError, "cannot be read", None, tmp_path / "absent")
    refused(InputError, "cannot be read", None, tmp_path)
    refused(InputError, "cannot be read", None, Path("a\0b"))
    refused(DataError, "byte 0 is not UTF-8", None, tmp_path / "binary")
    refused(DataError, "NUL", None, tmp_path / "nul")
    refused(DataError, "--prompt is not UTF-8", "a\udcff", None)
    (tmp_path / "text").write_text("a text")
    refused(DataError, "--question is not UTF-8", None, tmp_path / "text", "a\udcff")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"one\r\ntwo\n")))
    assert read_prompt(None, "-", "Which?") == "one\ntwo\n\nWhich?"


def test_plans_that_are_refused(model_dir: Any, write_model: Any, tmp_path: Path) -> None:
    for wrong, words in (
        ({"max_new_tokens": 0}, "allowed is 1 or more"),
        ({"temperature": -1.0}, "0 \\(greedy\\)"),
        ({"temperature": 1e-39}, r"0 \(greedy\) and numbers from 0.0001"),
        ({"temperature": float("nan")}, "0 \\(greedy\\)"),
        ({"seed": -1}, "--seed"),
        ({"dtype": "fp8"}, "float32, bfloat16"),
        ({"device": "tpu"}, "cpu, cuda"),
    ):
        with pytest.raises(InputError, match=words):
            plan_generation(str(model_dir()), **wrong)
    with pytest.raises(InputError, match="no chat template"):
        talk_to(model_dir(), chat=True)
    with pytest.raises(EnvironmentFault, match="torch finds"):
        Conversation(plan_generation(str(model_dir()), device="cuda:99"))
    bare = write_model(tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="no tokenizer"):
        plan_generation(str(bare))


def run(command: Any, *arguments: object, stdin: str = "") -> Any:
    app = typer.Typer()
    app.command()(command)
    done = CliRunner().invoke(app, [str(a) for a in arguments], input=stdin)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def test_the_text_is_on_stdout_and_its_price_on_stderr(model_dir: Any, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("word " * 60)
    given = (model_dir(), "--file", tmp_path / "long.txt", "--question", "why?", "--max-new-tokens", 9)
    done, data = run(generate, *given), json.loads(run(generate, *given, "--json").stdout)
    assert done.stdout == data["text"] + "\n" and data["read"] == 299 + 2 + 4 and data["written"] <= 9
    assert "warning: 305 tokens and" in done.stderr
    for words in ("305 tokens, ", "tokens/s", "peak memory", "KV cache     4 x full"):
        assert words in done.stderr, done.stderr


def test_a_chat_takes_commands_and_ends(model_dir: Any) -> None:
    done = run(chat, model_dir(), "--max-new-tokens", 5, stdin="one\n\n/what\n/reset\none\n/exit\nunseen\n")
    assert (
        "unknown command /what" in done.stderr
        and "conversation cleared" in done.stderr
        and "no chat template" in done.stderr
    )
    first, second = done.stderr.split("conversation cleared")
    assert "in the cache" not in first + second
    data = json.loads(run(chat, model_dir(), "--max-new-tokens", 5, "--json", stdin="one\ntwo").stdout)
    assert [turn["asked"] for turn in data["turns"]] == ["one", "two"] and data["turns"][1]["kept"] > 0
    with pytest.raises(DataError, match="UTF-8"):
        run(chat, model_dir(), stdin=b"\xff\n")
    with pytest.raises(DataError, match="NUL"):
        run(chat, model_dir(), stdin=b"a\0b\n")


def test_what_was_answered_is_told_whatever_ended_the_chat(model_dir: Any) -> None:
    app = typer.Typer()
    app.command()(chat)
    done = CliRunner().invoke(app, [str(model_dir()), "--max-new-tokens", "3", "--json"], input=b"one\n\xff\n")
    assert isinstance(done.exception, DataError)
    assert [turn["asked"] for turn in json.loads(done.stdout)["turns"]] == ["one"]


def test_memory_that_runs_out_is_said(model_dir: Any) -> None:
    with pytest.raises(EnvironmentFault, match="out of memory") as caught:
        talk_to(model_dir(), max_new_tokens=10**15).ask("one")
    assert "--max-new-tokens" in str(caught.value.hint)


def test_coldest(model_dir: Any) -> None:
    cold = talk_to(model_dir(), max_new_tokens=5, temperature=1e-4).ask("one").text
    assert cold == talk_to(model_dir(), max_new_tokens=5).ask("one").text
