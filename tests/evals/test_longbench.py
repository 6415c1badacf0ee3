"""LongBench: metrics by hand and against lm-eval's, prompts, the middle cut out, answers scored, bad data refused."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from ctxext.data.cases import prompt_ids
from ctxext.data.longbench import TASKS, read_questions, read_templates
from ctxext.errors import DataError, EnvironmentFault, InputError
from ctxext.evals import longbench
from ctxext.evals import longbench_metrics as metrics
from ctxext.evals.eval_spec import LongBench
from ctxext.evals.item_runner import Outcome, run_job


def question(task: str, number: int = 0, **changes: Any) -> dict[str, Any]:
    row = {
        "_id": f"{task}-{number}",
        "dataset": task,
        "context": "The sun is far away. " * 3,
        "input": "What is far away?",
        "answers": ["the sun"],
        "length": 15,
        "language": "en",
        "all_classes": None,
    }
    return {**row, **changes}


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


BY_HAND = [
    ("qa_f1", "The Sun!", "the sun", 1.0),
    ("qa_f1", "a big sun", "the sun", 2 / 3),  # 1 of 2 words right, 1 of 1 found
    ("qa_f1", "sun sun sun", "sun sun moon", 2 / 3),  # a bag: two of three on both sides
    ("qa_f1", "", "sun", 0.0),
    ("qa_f1", "the", "the", 0.0),  # nothing is left of either
    ("qa_f1", "theatre an-other", "theatre another", 1.0),
    ("rouge_l", "the cat sat", "the cat sat", 1.0),
    ("rouge_l", "cat the sat", "the cat sat", 2 / 3),  # "the sat" or "cat sat": two of three words
    ("rouge_l", "The cat", "the cat", 1 / 2),  # case counts
    ("rouge_l", "a a a b", "a b", 1.0),  # words count once
    ("rouge_l", "b. a", "a. b", 1.0),  # sentences: the union over all pairs
    ("rouge_l", "b a", "a. b", 1.0),
    ("rouge_l", "b a", "a b", 1 / 2),
    ("rouge_l", "sun", "sun. ", 2 / 3),  # the blank after the dot is a word of the package's
    ("rouge_l", "", "sun", 0.0),
    ("rouge_l", "...", "sun", 0.0),
    ("count", "There are 12, or 13", "12", 1 / 2),
    ("count", "none", "12", 0.0),
    ("count", "112", "12", 0.0),
    ("retrieval", "Paragraph 7", "Paragraph 7", 1.0),
    ("retrieval", "7, 8, 7 or 9", "Paragraph 7", 1 / 2),
    ("retrieval_zh", "段落3", "段落3", 1.0),
    ("code_similarity", "\n\n# a comment\n`x`\nreturn x", "return x", 1.0),
    ("code_similarity", "abcd", "bcde", 0.75),  # 2 x 3 / 8
    ("code_similarity", "abc", "abcd", 0.86),  # 6 / 7, in whole percent
    ("code_similarity", "// only\n# comments", "x", 0.0),
]


@pytest.mark.parametrize(("metric", "answer", "truth", "score"), BY_HAND)
def test_metrics_by_hand(metric: str, answer: str, truth: str, score: float) -> None:
    assert metrics.best(metric, answer, [truth]) == pytest.approx(score, abs=1e-7)


def test_the_best_truth_counts() -> None:
    assert metrics.best("qa_f1", "moon", ["sun", "the moon", "star"]) == 1.0


def test_classification_by_hand() -> None:
    classes = ["Food", "Fast food", "Date", "Sport", "food"]

    def score(answer: str, truth: str) -> float:
        return metrics.best("classification", answer, [truth], classes)

    assert score("Type: Date", "Date") == 1.0
    assert score("Date or Sport", "Date") == 0.5
    assert score("Sport", "Date") == 0.0
    assert score("nothing known", "Date") == 0.0
    assert score("Fast food", "Fast food") == 1.0, "`food` is a part of the true class's name"
    # The official loop steps over the class after one it took out: b is a part of `abc` too, and still counts.
    assert metrics.best("classification", "abc", ["abc"], ["a", "b", "abc"]) == 0.5


def test_a_truth_without_a_paragraph_is_refused() -> None:
    with pytest.raises(DataError, match="names no paragraph"):
        metrics.best("retrieval", "Paragraph 7", ["seven"])


def test_a_long_text_without_dots_is_scored() -> None:
    """The package the official script uses overflows its recursion here, and the script gives 0."""
    text = " ".join(f"w{i}" for i in range(1200))
    assert metrics.best("rouge_l", text, [text]) == pytest.approx(1.0, abs=1e-7)


def test_the_table() -> None:
    assert len(TASKS) == 21
    for name, task in TASKS.items():
        assert task.metric in metrics.METRICS, name
        prompt = task.template.format(context="{input}", input="INPUT")
        assert "{input}" in prompt and "{context}" not in prompt
        assert ("INPUT" in prompt) == (name not in ("gov_report", "multi_news", "vcsum", "passage_count", "lcc")), (
            "the question is missing, or stands where there is none"
        )
    assert {name for name, task in TASKS.items() if task.first_line} == {"trec", "triviaqa", "samsum", "lsht"}
    assert TASKS["hotpotqa"].template.count("Answer a question from these passages.") == 2, "at both ends"
    assert TASKS["qasper"].template.endswith("\n\nQuestion: {input}\nAnswer:")


def test_prompts_of_a_file(tmp_path: Path) -> None:
    path, rows = tmp_path / "prompts.json", [question("hotpotqa", 0), question("lcc", 0)]
    data = write(tmp_path / "d.jsonl", *rows)
    path.write_text(json.dumps({"hotpotqa": "{context} ASKED {input}", "lcc": "{context}", "other": "{context}"}))
    assert read_templates(str(path)) == {"hotpotqa": "{context} ASKED {input}", "lcc": "{context}"}
    found = [item.prompt(read_templates(str(path))) for item in read_questions(data)]
    assert " ASKED " in found[0] and found[1] == rows[1]["context"]
    for text, said in [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ('{"lcc": "{input}"}', "has the fields"),
        ('{"lcc": "{context} {answers}"}', "has the fields"),
        ('{"lcc": "{context} {"}', "is not valid"),
        ('{"lcc": 3}', "is not valid"),
    ]:
        path.write_text(text)
        with pytest.raises(DataError, match=said):
            read_templates(str(path))
    with pytest.raises(InputError, match="cannot read the prompts"):
        read_templates(str(tmp_path / "none.json"))
    path.write_text('{"lcc": "{context}"}')
    with pytest.raises(InputError, match="has no prompt for hotpotqa"):
        longbench.check(LongBench(data=data, lengths=(1024,), prompts=str(path)))


def random_text(rng: random.Random, letters: str, size: int) -> str:
    return "".join(rng.choice(letters) for _ in range(size))


@pytest.mark.parametrize("letters", ["abcdef .\n", "长文本é🌞a"])
def test_the_middle_is_cut_out(loaded: Any, letters: str) -> None:
    rng = random.Random(0)
    for size in (10, 40, 200, 1000):
        for budget in (32, 33, 47, 64):
            text = random_text(rng, letters, size)
            whole = prompt_ids(loaded.tokenizer, text)
            ids, cut = longbench.truncated(loaded.tokenizer, text, budget)
            assert len(ids) <= budget
            assert cut == (len(whole) > budget)
            if not cut:
                assert ids == whole
                continue
            kept = loaded.tokenizer.decode(ids)
            assert kept[:3] == text[:3] and kept[-3:] == text[-3:], "the ends are not those of the prompt"
            if letters.isascii():
                assert ids == whole[: budget // 2] + whole[-(budget // 2) :]


class Scripted:
    """A model that writes `answer`, one token a character, whatever it is asked; B rows in step."""

    def __init__(self, tokenizer: Any, answer: str):
        self.ids = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        self.prompts: list[torch.Tensor] = []
        self.head = SimpleNamespace(weight=torch.eye(260))
        self.written = 0
        self.config = LlamaConfig(num_hidden_layers=1)

    def get_decoder(self) -> Any:
        return self

    def get_output_embeddings(self) -> Any:
        return self.head

    def eval(self) -> Any:
        return self

    def __call__(self, input_ids: torch.Tensor, **_: Any) -> Any:
        B, T = input_ids.shape
        if T > 1:
            self.prompts.append(input_ids)
            self.written = 0
        hidden = torch.zeros(B, T, 260)
        hidden[:, -1, self.ids[min(self.written, len(self.ids) - 1)]] = 1
        self.written += 1
        return SimpleNamespace(last_hidden_state=hidden, past_key_values=None)


def rows_of(loaded: Any, stand_in: Any, spec: LongBench, answer: str) -> tuple[list[Any], list[Outcome], Scripted]:
    from ctxext.evals.item_runner import Ledger

    model = Scripted(loaded.tokenizer, answer)
    ledger = Ledger()
    job = longbench.job(stand_in(model, loaded.tokenizer), spec, Path())
    rows = run_job(job, ledger, 4096, lambda *_: None)
    return rows, [ledger.outcomes[item.id] for item in job.items], model


def test_answers_are_scored_and_averaged(loaded: Any, stand_in: Any, tmp_path: Path) -> None:
    data = write(
        tmp_path / "mixed.jsonl",
        question("hotpotqa", 0, answers=["moon", "the sun"]),
        question("hotpotqa", 1, answers=["star"]),
        question("triviaqa", 0, answers=["sun"]),
        question("trec", 0, answers=["sun"], all_classes=["sun", "moon"]),
    )
    spec = LongBench(data=data, lengths=(1024,))
    rows, outcomes, _ = rows_of(loaded, stand_in, spec, "\nsun\nmoon")
    assert [outcome.score for outcome in outcomes] == [pytest.approx(2 / 3), 0.0, 1.0, 1.0], (
        "trec and triviaqa are scored on the first line, hotpotqa on all of the answer"
    )
    assert [(row.task, row.metric, row.n) for row in rows] == [
        ("", "average", 4),
        ("hotpotqa", "qa_f1", 2),
        ("triviaqa", "qa_f1", 1),
        ("trec", "classification", 1),
    ]
    assert [row.value for row in rows] == [pytest.approx(v) for v in ((100 / 3 + 200) / 3, 100 / 3, 100, 100)]
    assert "3 of 21 tasks" in rows[0].protocol
    assert outcomes[0].details["answer"] == "\nsun\nmoon"


def test_an_answer_ends_at_the_official_number_of_tokens(loaded: Any, stand_in: Any, tmp_path: Path) -> None:
    data = write(tmp_path / "hotpotqa.jsonl", question("hotpotqa"))
    _, (outcome,), _ = rows_of(loaded, stand_in, LongBench(data=data, lengths=(1024,)), "x" * 100)
    assert outcome.details["answer"] == "x" * 32


def test_prompts_keep_their_length(loaded: Any, stand_in: Any, tmp_path: Path) -> None:
    long = "The moon is near. " * 100
    data = write(
        tmp_path / "d.jsonl",
        question("hotpotqa", 0, context=long),
        question("hotpotqa", 1),
        question("lcc", 0, context=long),
    )
    spec = LongBench(data=data, lengths=(256, 1024))
    rows, outcomes, model = rows_of(loaded, stand_in, spec, "x")
    whole = len(longbench.check(spec)[1].prompt(read_templates(None)))  # one token a character
    assert 224 < whole < 992
    assert [outcome.details["prompt_tokens"] for outcome in outcomes] == [224, 224, 192, 992, whole, 960]
    assert [outcome.details["cut"] for outcome in outcomes] == [True, True, True, True, False, True]
    assert [row.details["cut"] for row in rows] == [3, 2, 1, 2, 1, 1]
    assert [prompts.shape[0] for prompts in model.prompts] == [2, 1, 2, 1], "neighbours of one task run together"
    text = loaded.tokenizer.decode(model.prompts[0][0].tolist())
    assert text.startswith("Answer a question") and text.endswith("Question: What is far away?\nAnswer:")


def test_a_limit_is_shared_out(loaded: Any, stand_in: Any, tmp_path: Path) -> None:
    rows = [question(task, i) for task in ("hotpotqa", "musique", "lcc") for i in range(4)]
    spec = LongBench(data=write(tmp_path / "d.jsonl", *rows), lengths=(512, 1024), limit=7)
    job = longbench.job(stand_in(Scripted(loaded.tokenizer, ""), loaded.tokenizer), spec, Path())
    assert [item.id for item in job.items] == [
        "512/hotpotqa/hotpotqa-0",
        "512/hotpotqa/hotpotqa-1",
        "512/musique/musique-0",
        "512/lcc/lcc-0",
        "1024/hotpotqa/hotpotqa-0",
        "1024/musique/musique-0",
        "1024/lcc/lcc-0",
    ]


def test_a_real_model_answers(loaded: Any, tmp_path: Path) -> None:
    """A random one: what it writes is what transformers' own generate writes."""
    data = write(tmp_path / "d.jsonl", question("hotpotqa", 0, context="far " * 200))
    spec = LongBench(data=data, lengths=(128,))
    job = longbench.job(loaded, spec, Path())
    (item,) = job.items
    (outcome,) = job.run([item])
    ids, cut = longbench.truncated(loaded.tokenizer, item.question.prompt(read_templates(None)), 96)
    assert cut and len(ids) == 96
    mask = torch.ones(1, len(ids), dtype=torch.long)
    full = loaded.model.generate(
        torch.tensor([ids]), attention_mask=mask, max_new_tokens=32, do_sample=False, pad_token_id=0
    )
    assert outcome.details["answer"] == loaded.tokenizer.decode(full[0, 96:], skip_special_tokens=True)


def test_directories_and_tasks(tmp_path: Path) -> None:
    for task in ("qasper", "lcc"):
        write(tmp_path / f"{task}.jsonl", question(task, 0), question(task, 1))
    assert [q.id for q in read_questions(str(tmp_path))] == ["lcc-0", "lcc-1", "qasper-0", "qasper-1"]
    assert {q.task for q in read_questions(str(tmp_path), ("qasper",))} == {"qasper"}
    with pytest.raises(InputError, match="has no questions of trec"):
        read_questions(str(tmp_path), ("qasper", "trec"))
    write(tmp_path / "qasper_e.jsonl", question("qasper"))
    with pytest.raises(
        DataError, match=r"qasper_e.jsonl: the names are not tasks; allowed are narrativeqa, .*repobench-p"
    ):
        read_questions(str(tmp_path))
    assert len(read_questions(str(tmp_path / "qasper_e.jsonl"))) == 1


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{not json", "d.jsonl:2: not JSON"),
        ("[1]", "d.jsonl:2: not a JSON object"),
        (json.dumps({k: v for k, v in question("lcc", 1).items() if k != "context"}), "d.jsonl:2: context is missing"),
        (json.dumps(question("lcc", 1, answers="x")), "answers is str 'x'; allowed: list"),
        (json.dumps(question("lcc", 1, answers=[])), "at least one"),
        (json.dumps(question("trec", 1)), "all_classes is NoneType"),
        (json.dumps(question("nq", 1)), "d.jsonl:2: unknown task 'nq'; allowed are narrativeqa"),
        (json.dumps(question("lcc", 0)), "the id 'lcc-0' of lcc is used twice"),
        (json.dumps(question("lcc", 1, context="\ud800")), "surrogate"),
    ],
)
def test_bad_lines(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(question("lcc", 0)) + "\n" + line + "\n")
    with pytest.raises(DataError, match=said.replace("[", r"\[")):
        read_questions(str(path))


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not include or download"):
        longbench.check(LongBench(lengths=(1024,)))
    with pytest.raises(InputError, match="no such file"):
        longbench.check(LongBench(data=str(tmp_path / "nothing")))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="has no question"):
        longbench.check(LongBench(data=str(tmp_path / "empty.jsonl")))
    data = write(tmp_path / "d.jsonl", question("qmsum"), question("lcc"))
    with pytest.raises(InputError, match="unknown LongBench tasks: qm") as refused:
        longbench.check(LongBench(data=data, tasks=("qm", "lcc")))
    assert "repobench-p" in str(refused.value.hint)
    spec = LongBench(data=data, lengths=(512, 4096))
    with pytest.raises(InputError, match="at length 512: answers of up to 512 tokens"):
        longbench.check(spec)
    assert len(longbench.check(replace(spec, tasks=("lcc",)))) == 1


@pytest.mark.skipif(find_spec("jieba") is not None, reason="jieba is installed")
def test_chinese_tasks_need_jieba(tmp_path: Path) -> None:
    data = write(tmp_path / "d.jsonl", question("vcsum"), question("passage_retrieval_zh", answers=["段落3"]))
    with pytest.raises(EnvironmentFault, match="jieba for Chinese text, which is not installed"):
        longbench.check(LongBench(data=data, lengths=(1024,)))
    assert len(longbench.check(LongBench(data=data, tasks=("passage_retrieval_zh",), lengths=(1024,)))) == 1


def test_check_costs_no_torch(tmp_path: Path) -> None:
    data = write(tmp_path / "d.jsonl", question("lcc"))
    code = f"""
import sys
from ctxext.evals.longbench import check
from ctxext.evals.eval_spec import LongBench
check(LongBench(data={data!r}, lengths=(1024,)))
assert not {{"torch", "transformers"}} & set(sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


THEIRS = {
    "qa_f1": "qa_f1_score",
    "qa_f1_zh": "qa_f1_zh_score",
    "rouge_l": "rouge_score",
    "rouge_l_zh": "rouge_zh_score",
    "classification": "classification_score",
    "count": "count_score",
    "retrieval": "retrieval_score",
    "retrieval_zh": "retrieval_zh_score",
    "code_similarity": "code_sim_score",
}
CLASSES = ["sun", "sunny", "moon", "a", "an", "star rain", "7"]


@pytest.mark.parametrize("metric", THEIRS)
def test_against_the_metrics_of_lm_eval(metric: str) -> None:
    """Theirs are LongBench's own, but that blank lines before code are passed over: no answer here has one."""
    for needed in ("lm_eval", "rouge", "jieba", "fuzzywuzzy"):
        pytest.importorskip(needed, reason=f"{needed} is not installed: metrics are not held against lm-eval's")
    from lm_eval.tasks.longbench import metrics as official

    theirs: Callable[..., float] = getattr(official, THEIRS[metric])
    rng = random.Random(metric)
    words = [
        "sun",
        "sunny",
        "moon",
        "a",
        "the",
        "star",
        "rain",
        "7",
        "12",
        ".",
        ". ",
        "The",
        "an",
        "#",
        "x = 1",
        "段落7",
    ]
    words += ["北京清华大学", "今天", "天气", "很好，", "。", "Paragraph 7"]
    for _ in range(300):
        answer = " ".join(rng.choice(words) for _ in range(rng.randrange(1, 30)))
        truth = " ".join(rng.choice(words) for _ in range(rng.randrange(1, 30)))
        truth = {"classification": rng.choice(CLASSES), "count": "7", "retrieval": "Paragraph 7"}.get(metric, truth)
        truth = "段落7" if metric == "retrieval_zh" else truth
        expected = theirs(answer, truth, all_classes=CLASSES)
        assert metrics.best(metric, answer, [truth], CLASSES) == pytest.approx(expected, abs=1e-9), (answer, truth)
    for _, answer, truth, _ in [case for case in BY_HAND if case[0] == metric and "\n\n" not in case[1]]:
        assert metrics.best(metric, answer, [truth]) == pytest.approx(theirs(answer, truth, all_classes=[]), abs=1e-9)


def test_against_the_answer_lengths_of_lm_eval() -> None:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed: answer lengths are not held against lm-eval's")
    import lm_eval.tasks.longbench
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: None)
    place = Path(next(iter(lm_eval.tasks.longbench.__path__)))
    for name, task in TASKS.items():
        theirs = yaml.load((place / f"{name}.yaml").read_text("utf-8"), Loader)
        assert theirs["generation_kwargs"]["max_gen_toks"] == task.max_new_tokens, name
        assert ("{{question}}" in theirs["doc_to_text"]) == ("{input}" in task.template), name
