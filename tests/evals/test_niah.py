"""Cases fit, carry their needle at its depth, and are answered by a model that copies."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from ctxext.data.niah import BEFORE, NEEDLE, QUESTION, niah_case
from ctxext.errors import InputError
from ctxext.evals import niah
from ctxext.evals.eval_spec import Niah
from ctxext.evals.item_runner import Ledger, run_job


def spec(**fields: Any) -> Niah:
    return Niah(**{"lengths": (700, 900), "depths": (0.0, 0.5, 1.0), "cases": 2, "data": "grass", **fields})


@pytest.mark.parametrize("data", ["grass", "embedded"])
def test_every_case_fits_and_has_its_needle_where_it_says(loaded: Any, data: str) -> None:
    questions = niah.job(loaded, spec(data=data), Path()).items
    assert len(questions) == 2 * 3 * 2 and len({question.id for question in questions}) == 12
    for question in questions:
        case = question.case
        spare = case.length - len(question.ids) - case.max_new_tokens
        assert 0 <= spare < 60, (case.id, spare)
        needle = NEEDLE.format(key=case.facts["key"], value=case.references[0])
        assert case.prompt.count(needle) == 1 and case.prompt.count(case.references[0]) == 1
        body = case.prompt.removeprefix(BEFORE).removesuffix(QUESTION.format(key=case.facts["key"]))
        before, after = (len(part.split()) for part in body.split(needle))
        assert abs(before / (before + after) - case.facts["depth"]) < 0.02, (case.id, before, after)


class Reader(LlamaModel):
    """Reads the key out of the question, finds `for KEY is: ` in what it has seen, and copies what follows."""

    reach = 10**9  # characters that it looks back

    def forward(self, input_ids: torch.Tensor, past_key_values: Any = None, **_: Any) -> BaseModelOutputWithPast:
        seen = getattr(past_key_values, "seen", [[] for _ in input_ids])
        past_key_values.seen = [before + row for before, row in zip(seen, input_ids.tolist(), strict=True)]
        hidden = torch.zeros(*input_ids.shape, self.config.hidden_size)
        for b, row in enumerate(past_key_values.seen):
            hidden[b, -1, self.following(self.text.decode(row, skip_special_tokens=True))] = 1.0
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=past_key_values)

    def following(self, text: str) -> int:
        prompt, _, written = text.rpartition("mentioned in the provided text is")
        key = prompt.split("What is the special magic number for ")[-1].split(" mentioned")[0]
        _, found, after = text[-self.reach :].partition(f"numbers for {key} is: ")
        return int(self.text.encode((f" {after}" if found else "?" * 99)[len(written)], add_special_tokens=False)[0])


def test_a_model_that_copies_scores_100_and_others_what_they_see(loaded: Any, stand_in: Any) -> None:
    shell = LlamaForCausalLM(LlamaConfig(vocab_size=260, hidden_size=260, num_attention_heads=2, num_hidden_layers=1))
    shell.model = Reader(shell.config)
    shell.model.text = loaded.tokenizer
    with torch.no_grad():
        shell.lm_head.weight.copy_(torch.eye(260))

    def rows(model: Any) -> list[tuple[float | None, Any]]:
        found = run_job(niah.job(model, spec(), Path()), Ledger(), 2048, lambda *_: None)
        return [(row.value, row.details["by_depth"]) for row in found]

    assert rows(stand_in(shell, loaded.tokenizer)) == [(1.0, {"0.0": 1.0, "0.5": 1.0, "1.0": 1.0})] * 2
    shell.model.reach = 300
    assert rows(stand_in(shell, loaded.tokenizer)) == [(pytest.approx(1 / 3), {"0.0": 0.0, "0.5": 0.0, "1.0": 1.0})] * 2
    assert [value for value, _ in rows(loaded)] == [0.0, 0.0], "a random model is at chance, 1 in 9 million"


def test_cases_are_the_same_in_every_process_and_do_not_depend_on_each_other() -> None:
    code = "from ctxext.data.niah import niah_case; print(niah_case(list('abcdefgh'), 20, 64, 0.5, 3, 7).prompt)"
    runs = [
        subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True)
        for seed in ("1", "2")
    ]
    here = niah_case(list("abcdefgh"), 20, 64, 0.5, 3, 7).prompt
    assert [run.stdout.decode().removesuffix("\n") for run in runs] == [here, here]


def test_a_length_without_room_is_refused(loaded: Any) -> None:
    with pytest.raises(InputError, match="at least"):
        niah.job(loaded, spec(lengths=(64,)), Path())
