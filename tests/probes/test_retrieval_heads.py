"""Retrieval heads of a model whose retrieval head is known; scores against naive attention; what masking takes away."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from ctxext.data.haystack import HaystackCase
from ctxext.errors import InputError
from ctxext.evals.eval_spec import Passkey
from ctxext.evals.item_runner import Ledger, run_job
from ctxext.evals.passkey import job
from ctxext.model.convert import plan_conversion, run_conversion
from ctxext.model.load import hidden_states, load_model
from ctxext.model.source import resolve
from ctxext.ops.masks import lower_bounds
from ctxext.ops.naive_attention import naive_attention
from ctxext.probes.ablation import without
from ctxext.probes.plan_probes import plan_probe
from ctxext.probes.probe_spec import RetrievalHeads
from ctxext.probes.retrieval_heads import (
    RetrievalQuestion,
    _hits,
    answer_attention,
    looked_at,
    measure,
    questions,
    ranking,
    reachable,
    recall,
    statistics,
)
from ctxext.probes.subject import Subject
from tests.probes.conftest import HEADS, INDUCTION

SCORES = Path(__file__).parent / "data" / "retrieval_scores.json"
LENGTH = 150


def converted(source: Path, layout: str, window: int, out: Path) -> Path:
    run_conversion(plan_conversion(str(source), layout, out=out, sliding_window=window), gate=False)
    return out


def found(directory, text, told=lambda *_: None, **fields):
    spec = RetrievalHeads(**{"length": LENGTH, "samples": 6, "data": str(text)} | fields)
    finding = measure(Subject(resolve(str(directory)), device="cpu"), spec, told)
    json.dumps(asdict(finding), allow_nan=False)
    return finding


def test_both_definitions_rank_the_retrieval_head_first(induction, letters):
    told = []
    finding = found(induction, letters, lambda done, total: told.append((done, total)), seed=3)
    layer, head = INDUCTION
    for name in ("mass", "copy"):
        scores = finding.facts[name]["scores"]
        others = [x for i, row in enumerate(scores) for j, x in enumerate(row) if (i, j) != INDUCTION]
        assert len(scores) == 2 and {len(row) for row in scores} == {HEADS}
        assert scores[layer][head] > 0.99 and max(others) < 0.3
        (grid,) = (grid for grid in finding.pictures if grid.name == name)
        assert grid.cells == tuple(map(tuple, scores)) and grid.letters == "FF"
    assert finding.facts["copy"]["scores"][layer][head] == 1.0  # every token of every answer
    assert finding.facts["copy"]["successes"] == finding.facts["copy"]["trials"] == 6
    assert finding.facts["top"][0] == [layer, head] and finding.tables[0].rows[0][1] == f"{layer}.{head}"
    assert told[-1][0] == told[-1][1] == 12 and finding.notes == ()


def test_masking_the_retrieval_head_breaks_copying_and_masking_any_other_does_not(induction, letters):
    loaded = load_model(induction, device="cpu")
    requested = job(loaded, Passkey(lengths=(LENGTH,), data=str(letters), cases=1, depths=(0.0, 0.9)), Path())

    def accuracy(heads):
        with without(loaded, heads):
            return run_job(requested, Ledger(), 4096, lambda *_: None)[0].value

    others = [(i, h) for i in range(2) for h in range(HEADS) if (i, h) != INDUCTION]
    assert accuracy([]) == 1.0 and accuracy([INDUCTION]) == 0.0
    assert [accuracy([head]) for head in others] == [1.0] * len(others)
    assert accuracy([(1, h) for h in range(HEADS) if h != INDUCTION[1]]) == 1.0


def test_the_ablation_says_so(induction, letters):
    facts = found(induction, letters, ablate=1, draws=2, samples=5).facts["ablation"]
    runs = facts["runs"]
    assert list(runs) == ["nothing", "top 1", "random 1, draw 1", "random 1, draw 2"]
    assert runs["top 1"]["masked"] == [list(INDUCTION)] and runs["nothing"]["masked"] == []
    drawn = [runs["random 1, draw 1"], runs["random 1, draw 2"]]
    assert all(len(one["masked"]) == 1 and one["masked"] != [list(INDUCTION)] for one in drawn)
    assert drawn[0]["masked"] != drawn[1]["masked"]
    assert (runs["nothing"]["accuracy"], runs["top 1"]["accuracy"], facts["random_mean"]["accuracy"]) == (1, 0, 1)
    assert runs["top 1"]["answer_nats"] > 1 > 0.01 > runs["nothing"]["answer_nats"]
    assert runs["top 1"]["loss"] != runs["nothing"]["loss"]
    assert facts["random_mean"]["loss"] == pytest.approx(sum(one["loss"] for one in drawn) / 2)


def test_the_random_heads_are_the_others(model_dir, letters):
    """Half of all heads are masked, so that the draw can only be the other half."""
    finding = found(model_dir("llama"), letters, ablate=8, draws=1, samples=1, definitions=("mass",))
    runs = finding.facts["ablation"]["runs"]
    top, drawn = ({tuple(head) for head in runs[name]["masked"]} for name in ("top 8", "random 8, draw 1"))
    assert len(top) == len(drawn) == 8 and not top & drawn
    assert top == {tuple(head) for head in finding.facts["top"][:8]}


def test_the_questions_of_the_ablation_are_others(induction, letters):
    loaded = load_model(induction, device="cpu")
    mine = {q.case.prompt_ids for q in questions(loaded, str(letters), LENGTH, 5, seed=0)}
    theirs = job(loaded, Passkey(lengths=(LENGTH,), data=str(letters), cases=1, seed=1), Path()).items
    assert not mine & {item.case.prompt_ids for item in theirs}


def test_more_heads_than_there_are_cannot_be_masked(induction, letters, tmp_path):
    with pytest.raises(InputError, match="has 16 heads") as caught:
        plan_probe(str(induction), ["retrieval-heads"], {"ablate": 9, "data": str(letters)}, out=tmp_path / "out")
    assert "at most 8" in caught.value.hint


def test_equal_scores_are_ranked_by_the_other_definition_and_masking_them_is_said(induction, letters):
    copy, mass = torch.tensor([[0.0, 0.0], [0.5, 0.0]]), torch.tensor([[0.1, 0.3], [0.2, 0.9]])
    assert ranking([copy, mass], [1.0, 1.0]) == [(1, 0), (1, 1), (0, 1), (0, 0)]
    assert ranking([copy, mass], [0.0, 1.0]) == [(1, 0), (1, 1)]
    notes = found(induction, letters, ablate=8, draws=1, samples=2, definitions=("copy",)).notes
    assert any("fewer than 8 heads have a score above 0" in note for note in notes)


def test_a_model_that_cannot_do_it_has_no_copy_scores(model_dir, letters):
    finding = found(model_dir("llama"), letters, ablate=2, draws=1, samples=2)
    assert finding.facts["copy"] == {"scores": None, "statistics": None, "successes": 0, "trials": 2}
    assert finding.facts["ranked_by"] == "mass" and [picture.name for picture in finding.pictures] == ["mass"]
    assert "answers was found, so no head has a score" in finding.notes[0] and {
        row[3] for row in finding.tables[0].rows
    } == {"none"}
    alone = found(model_dir("llama"), letters, ablate=2, definitions=("copy",), samples=2)
    assert alone.pictures == alone.tables == () and "no head was masked" in alone.notes[-1]


@pytest.mark.parametrize("window", [110, 125])
def test_a_sliding_layer_copies_what_is_in_its_window_and_is_flagged(window, induction, letters, tmp_path):
    finding = found(converted(induction, "FS", window, tmp_path / "FS"), letters, length=200)
    layer, head = INDUCTION
    facts = finding.facts
    assert facts["layers"] == "FS" and facts["reach"][0] == 1.0 and 0 < facts["reach"][1] < 1
    assert facts["copy"]["successes"] >= 1 and facts["copy"]["scores"][layer][head] == 1.0
    assert facts["top"][0] == [layer, head] and "only some answers" in finding.notes[0]
    assert finding.tables[0].rows[0][-1] == f"{facts['reach'][1]:.0%}"


def test_a_layer_that_cannot_see_any_answer_is_zero_and_not_ranked(induction, letters, tmp_path):
    finding = found(converted(induction, "FS", 20, tmp_path / "FS"), letters)
    assert finding.facts["reach"] == [1.0, 0.0] and finding.facts["mass"]["scores"][1] == [0.0] * HEADS
    assert all(layer == 0 for layer, _ in finding.facts["top"])
    assert any("layers 1: their scores are necessarily 0" in note for note in finding.notes)
    with pytest.raises(InputError, match="only 0 heads can see an answer"):
        found(converted(induction, "SS", 20, tmp_path / "SS"), letters, ablate=1, definitions=("mass",))


@pytest.fixture(scope="module")
def hybrid(model_dir, tmp_path_factory):
    """Random, 4 query heads on 2 key heads, S N S N with a window of 16."""
    return load_model(converted(model_dir("llama"), "SN", 16, tmp_path_factory.mktemp("hybrid") / "out"), device="cpu")


def naive_rows(loaded, ids):
    """Attention weights [L,B,H,T,T] of ids [B,T], with the identity for values."""
    T, found = ids.shape[1], []

    def watch(module, query, key, pattern, scaling):
        identity = torch.eye(T).expand(*key.shape[:2], T, T)
        found.append(naive_attention(query, key, identity, lower_bounds(pattern, T), scale=scaling))

    with torch.no_grad():
        hidden_states(loaded.model, ids, watch=watch)
    return torch.stack(found)


def asked_of(prompts, needle):
    return [
        RetrievalQuestion(HaystackCase(tuple(ids), (7, 8), len(ids) + 2, 0.5, 0, "78"), needle)
        for ids in prompts.tolist()
    ]


def test_mass_and_entropy_are_those_of_naive_attention(hybrid):
    prompts = torch.randint(2, 260, (3, 70), generator=torch.Generator().manual_seed(0))
    needle = (40, 58, 59)  # the window of the sliding layers begins at 54
    mass, entropy = answer_attention(hybrid, asked_of(prompts, needle))
    truth = naive_rows(hybrid, prompts)
    torch.testing.assert_close(mass.float(), truth[:, :, :, -1, list(needle)].sum(-1).mean(1), atol=1e-6, rtol=0)
    last = truth[:, :, :, -4:]
    torch.testing.assert_close(entropy.float(), torch.special.entr(last).sum(-1).mean((1, 3)), atol=1e-5, rtol=0)
    assert (truth[0, :, :, -1, 40] == 0).all() and (truth[1, :, :, -1, 40] > 0).all()


@pytest.mark.parametrize("chunk", [16_384, 30])
def test_where_heads_look_while_decoding_is_where_they_look_without_a_cache(chunk, hybrid):
    prompts = torch.randint(2, 260, (3, 70), generator=torch.Generator().manual_seed(1))
    answers, places = looked_at(hybrid, prompts.tolist(), 5, chunk=chunk)
    truth = naive_rows(hybrid, torch.cat([prompts, answers], 1)[:, :-1])[..., 69:, :].argmax(-1)  # [L,B,H,N]
    assert answers.shape == (3, 5) and places.shape == (4, 5, 3, 4)
    assert torch.equal(places, truth.permute(0, 3, 1, 2))
    assert places[0].min() >= 70 - 16 and places[1].min() < 40


def test_reach_counts_the_windows_tokens_with_the_query_among_them(hybrid):
    prompts = torch.zeros(1, 70, dtype=torch.long)
    assert [reachable(hybrid.kinds, asked_of(prompts, (20, place)))[0] for place in (53, 54)] == [0.0, 1.0]
    assert reachable(hybrid.kinds, asked_of(prompts, (0,))) == [0.0, 1.0, 0.0, 1.0]


def test_a_hit_is_the_generated_token_where_it_stands_in_the_needle():
    """Row 0: 5 stands in the needle at 1 and elsewhere at 3; row 1: its needle is at 2 and 3, and generates 8, 6."""
    whole = torch.tensor([[4, 5, 6, 5, 5, 6], [7, 5, 8, 6, 8, 6]])
    wanted = torch.tensor([[0, 1, 1, 0, 0, 0], [0, 0, 1, 1, 0, 0]]).bool()
    places = torch.tensor([[[[1, 3, 2], [2, 3, 1]], [[2, 1, 5], [3, 2, 5]]]])  # [1,N=2,B=2,H=3]
    hits = _hits(whole[:, 4:], places, whole, wanted)
    assert hits.tolist() == [
        [[[True, False, False], [True, False, False]], [[True, False, False], [True, False, False]]]
    ]


def test_recall_is_the_share_of_the_reference():
    assert recall([1, 2, 3, 4, 5], [5, 4, 3, 2, 1]) == 1.0 and recall([9, 9], [1, 2]) == 0.0
    assert recall([1, 1, 1, 1], [1, 1, 2, 2]) == 0.5 and recall([1, 3], [1, 1, 2, 2]) == 0.25


def test_statistics_of_the_score_file_are_the_anchors():
    """32 x 32 scores, made so that their shares are those EVALS.md gives of llama-2-7b-80k: 3.2% and 0.6%. Three of
    them are exactly at a threshold, which is not above it."""
    scores = json.loads(SCORES.read_text())
    told = statistics(scores)
    assert told["heads"] == 1024 and (told["above_0.1"], told["above_0.5"]) == (33, 6)
    assert f"{told['share_above_0.1']:.1%} {told['share_above_0.5']:.1%}" == "3.2% 0.6%"
    assert (scores[16][19], scores[11][15], scores[8][26]) == (0.943, 0.920, 0.800)


def test_tiny_has_retrieval_heads_in_its_second_layer():
    finding = measure(Subject(resolve("tiny"), device="cpu"), RetrievalHeads(length=256, samples=2), lambda *_: None)
    json.dumps(asdict(finding), allow_nan=False)
    assert finding.facts["top"][0][0] == 1 and finding.facts["copy"]["successes"] > 0
    assert [len(row) for row in finding.facts["mass"]["scores"]] == [4] * 4
