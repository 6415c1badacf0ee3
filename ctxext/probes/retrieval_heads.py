"""Finds the heads that fetch a passkey's answer, by two definitions; and what the model loses without them.

mass   the attention from the position before the answer, the prompt's last token, to the answer's tokens in the needle,
       mean over questions (arXiv 2606.15378, released code)
copy   the model decodes greedily, with a cache. A step scores 1 / |needle| for a head if the head attends most to a
       token of the needle and that token is the one just generated. The score is the sum over an answer's steps, mean
       over the questions that succeed: ROUGE-1 recall above 50% (arXiv 2404.15574, section 2, and its released code)

The needle of both is the answer inside the inserted sentence, as in the released code of 2404.15574 (the rest of the
sentence does not count): |needle| is the number of the answer's tokens, and a head that copies all of them scores 1. A
passkey's sentence has its key twice, and either counts. ROUGE-1 recall is counted in tokens: the share of the answer's
tokens found in what was generated, in any order, each as often as it occurs there.

A sliding layer cannot see an answer beyond its window. Its zero is by construction, and it is flagged: `reach` is the
share of questions whose answer is visible to the prompt's last token, at least by the answer's last token.

    B questions of a batch   T tokens of a prompt   N of an answer   L layers   H heads   S keys
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ctxext.data.cases import private_random
from ctxext.data.haystack import HaystackCase, haystack_ids, key_places, passkey_case
from ctxext.errors import InputError
from ctxext.evals.haystacks import haystack
from ctxext.evals.item_runner import batches
from ctxext.model.decode import CHUNK, generate
from ctxext.model.layout import LayerKind
from ctxext.model.load import LoadedModel
from ctxext.ops.masks import Pattern
from ctxext.ops.naive_attention import attention_rows
from ctxext.probes.ablation import BATCH_TOKENS, Head, ablate
from ctxext.probes.probe_finding import Grid, ProbeFinding, Table
from ctxext.probes.probe_spec import RetrievalHeads
from ctxext.probes.subject import Subject, watch_rows
from ctxext.progress import CountProgress
from ctxext.units import counted

SHOWN = 20  # heads in the table
LAST = 4  # last queries, whose entropy is measured (arXiv 2606.15378, released code)
RECALL = 0.5  # share of an answer's tokens; a question succeeds above it
ABOVE = (0.1, 0.5)  # EVALS' anchors: llama-2-7b-80k has 3.2% of its heads above 0.1 and 0.6% above 0.5
MEANINGS = {
    "mass": "attention mass from the prompt's last token to the answer in the needle (arXiv 2606.15378)",
    "copy": "copying while decoding; 1 means every token of the answer (arXiv 2404.15574)",
}


@dataclass(frozen=True)
class RetrievalQuestion:
    """A passkey case; `needle` has the prompt indices of the answer's tokens, ascending."""

    case: HaystackCase
    needle: tuple[int, ...]

    @property
    def size(self) -> int:
        """Returns the number of tokens of the prompt."""
        return len(self.case.prompt_ids)


@dataclass(frozen=True)
class Copied:
    """The copy scores fp64 [L,H], None where no question succeeded."""

    scores: Tensor | None
    successes: int
    trials: int


def measure(subject: Subject, spec: RetrievalHeads, progress: CountProgress) -> ProbeFinding:
    """Scores all heads, as grids and a ranked table, and measures what masking the best of them costs.

    Raises InputError where `ablate` requests more heads than can see an answer.
    """
    assert spec.length is not None
    L, H = len(subject.kinds), subject.heads
    items = questions(subject.loaded, spec.data, spec.length, spec.samples, spec.seed)
    reach = reachable(subject.kinds, items)
    check_reach("retrieval-heads: ablate", spec.ablate or 0, reach, H)
    # Progress counts questions: one run for each definition, and with ablation one unmasked, one with the top heads
    # masked, and the draws.
    done, runs = 0, len(spec.definitions) + (2 + spec.draws if spec.ablate else 0)

    def more(count: int) -> None:
        nonlocal done
        done += count
        progress(done, runs * len(items))

    mass = answer_attention(subject.loaded, items, more)[0] if "mass" in spec.definitions else None
    copied = copies(subject.loaded, items, more) if "copy" in spec.definitions else Copied(None, 0, 0)
    # Where both are known, copy ranks the heads and mass decides ties.
    scores = {"copy": copied.scores, "mass": mass}
    known = {name: score for name, score in scores.items() if score is not None}
    ranked = ranking(list(known.values()), reach) if known else []
    facts: dict[str, Any] = {
        "length": spec.length,
        "haystack": haystack(spec.data)[0],
        "layers": subject.letters,
        "definitions": {name: MEANINGS[name] for name in spec.definitions},
        "reach": reach,
        "ranked_by": next(iter(known), None),
        "top": [list(head) for head in ranked[:SHOWN]],
    }
    for name in spec.definitions:
        score = known.get(name)
        facts[name] = {
            "scores": None if score is None else score.tolist(),
            "statistics": None if score is None else statistics(score.tolist()),
        }
    if "copy" in spec.definitions:
        facts["copy"] |= {"successes": copied.successes, "trials": copied.trials}
    tables = [_ranked_table(ranked, known, reach, subject, spec)] if known else []
    if spec.ablate is not None and known:
        facts["ablation"], table = ablate(subject.loaded, spec, ranked[: spec.ablate], (L, H), lambda: more(len(items)))
        tables.append(table)
    pictures = tuple(_grid(name, score, subject.letters, spec) for name, score in known.items())
    notes = _notes(spec, subject, copied, reach)
    if spec.ablate is not None and ranked and float(next(iter(known.values()))[ranked[spec.ablate - 1]]) == 0:
        notes += (f"fewer than {spec.ablate} heads have a score above 0: the other masked heads do not retrieve",)
    return ProbeFinding(facts, pictures, tuple(tables), notes)


def questions(loaded: LoadedModel, data: str, length: int, samples: int, seed: int) -> list[RetrievalQuestion]:
    """Returns `samples` passkeys of `length` tokens with their answers, at depths evenly spread over the text."""
    ids = haystack_ids(loaded.tokenizer, haystack(data)[1])
    rng = private_random("retrieval heads", seed, length)
    made = []
    for i in range(samples):
        case = passkey_case(loaded.tokenizer, length, (i + 0.5) / samples, rng, ids)
        made.append(RetrievalQuestion(case, key_places(loaded.tokenizer, case)))
    return sorted(made, key=lambda question: question.size)


def answer_attention(
    loaded: LoadedModel, items: Sequence[RetrievalQuestion], more: Callable[[int], object] = lambda count: None
) -> Tensor:
    """Returns fp64 [2,L,H]: the mass on the answer, and the entropy in nats of the prompts' last 4 queries.

    Both are means over `items`. `more(count)` is called with the number of questions done.
    """
    L, H = len(loaded.kinds), loaded.source.shape.num_heads
    total = torch.zeros(2, L, H, dtype=torch.float64)
    for batch in batches(items, BATCH_TOKENS):
        ids = torch.tensor([question.case.prompt_ids for question in batch], device=loaded.device)
        wanted = _needles(batch, ids.shape[1], loaded.device)
        at = torch.arange(ids.shape[1] - LAST, ids.shape[1]).expand(len(batch), LAST)

        def take(layer: int, weights: Tensor, rows: slice, wanted: Tensor = wanted) -> None:
            # Rows come in pieces; only the piece with the prompt's last token counts for the mass.
            if rows.start + weights.shape[2] == LAST:
                total[0, layer] += (weights[:, :, -1] * wanted[:, None]).sum((0, 2)).double().cpu()
            total[1, layer] += torch.special.entr(weights).sum((0, 2, 3)).double().cpu() / LAST

        watch_rows(loaded.model, ids, at, take)
        more(len(batch))
    return total / len(items)


def copies(
    loaded: LoadedModel, items: Sequence[RetrievalQuestion], more: Callable[[int], object] = lambda count: None
) -> Copied:
    """Returns the copy scores of all heads."""
    total = torch.zeros(len(loaded.kinds), loaded.source.shape.num_heads, dtype=torch.float64)
    successes = 0
    for batch in batches(items, BATCH_TOKENS):
        prompts = [question.case.prompt_ids for question in batch]
        answers, places = looked_at(loaded, prompts, len(batch[0].case.answer_ids))
        whole = torch.cat([torch.tensor(prompts), answers], 1)  # [B,T+N]
        wanted = _needles(batch, whole.shape[1], torch.device("cpu"))
        hits = _hits(answers, places, whole, wanted).double()
        for i, question in enumerate(batch):
            # A failed question counts neither in the sum nor in the mean.
            if recall(answers[i].tolist(), question.case.answer_ids) > RECALL:
                total += hits[:, :, i].sum(1) / len(question.case.answer_ids)
                successes += 1
        more(len(batch))
    return Copied(total / successes if successes else None, successes, len(items))


def _hits(answers: Tensor, places: Tensor, whole: Tensor, wanted: Tensor) -> Tensor:
    """Returns bool [L,N,B,H]: steps at which a head attended most to the needle's token that was then generated.

    answers [B,N]; places [L,N,B,H] are indices into the rows of `whole` and `wanted` [B,T+N].
    """
    row = torch.arange(len(whole))[:, None]  # [B,1], broadcasts against places' last two axes
    hits: Tensor = wanted[row, places] & (whole[row, places] == answers.t()[..., None])
    return hits


def looked_at(
    loaded: LoadedModel, prompts: Sequence[Sequence[int]], steps: int, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """Returns greedy answers [B,N] to prompts of one length and the tokens that each head attended most to.

    N is `steps`. The second result, [L,N,B,H], is the index in prompt and answer of the most attended token when each
    token was generated.
    """
    back: dict[int, list[Tensor]] = {}

    def watch(module: nn.Module, query: Tensor, key: Tensor, pattern: Pattern, scaling: float | None) -> None:
        """Records where the last query looks, as tokens back from the end; the query itself is -1.

        The cache of a sliding layer has dropped its first tokens, so an index from the front would be wrong.
        """
        S = key.shape[2]
        at = torch.full((len(query), 1), S - 1, device=key.device)
        rows = attention_rows(query[:, :, -1:], key, at, sliding_window=pattern.sliding_window, scale=scaling)
        back.setdefault(int(module.layer_idx), []).append(rows[:, :, 0].argmax(-1).cpu() - S)  # [B,H]

    answers = torch.tensor(generate(loaded.model, prompts, steps, chunk=chunk, watch=watch))
    T = len(prompts[0])
    # The prompt may take several forwards, and `watch` runs in each. The last `steps` forwards generated the tokens.
    places = torch.stack([torch.stack(back[layer][-steps:]) for layer in range(len(loaded.kinds))])
    return answers, places + torch.arange(T, T + steps)[:, None, None]


def recall(given: Sequence[int], reference: Sequence[int]) -> float:
    """Returns the ROUGE-1 recall in tokens: the share of `reference` found in `given`, with repeats."""
    return sum((Counter(given) & Counter(reference)).values()) / len(reference)


def reachable(kinds: Sequence[LayerKind], items: Sequence[RetrievalQuestion]) -> list[float]:
    """Returns for each layer the share of questions whose answer's end is visible to the prompt's last token."""
    back = [question.size - 1 - question.needle[-1] for question in items]
    return [
        sum(kind.sliding_window is None or distance < kind.sliding_window for distance in back) / len(back)
        for kind in kinds
    ]


def check_reach(what: str, wanted: int, reach: Sequence[float], heads: int) -> None:
    """Raises InputError unless `wanted` heads are in layers that can see an answer; each layer has `heads` heads."""
    there = heads * sum(of > 0 for of in reach)
    if there < wanted:
        raise InputError(
            f"{what} {wanted}, but only {there} heads can see an answer",
            hint="give fewer: the windows of the other heads end before the answer",
        )


def ranking(scores: Sequence[Tensor], reach: Sequence[float]) -> list[Head]:
    """Returns (layer, head), best first, of layers that can reach an answer: by the first scores, ties by the next."""
    heads = [(layer, head) for layer, of in enumerate(reach) if of > 0 for head in range(scores[0].shape[1])]
    return sorted(heads, key=lambda head: [-float(each[head]) for each in scores])


def statistics(scores: Sequence[Sequence[float]]) -> dict[str, float]:
    """Returns how many heads, and what share of them, score above 0.1 and above 0.5."""
    flat = [score for layer in scores for score in layer]
    counts = {above: sum(score > above for score in flat) for above in ABOVE}
    found = {f"above_{above}": float(count) for above, count in counts.items()}
    return {"heads": len(flat), **found, **{f"share_above_{above}": n / len(flat) for above, n in counts.items()}}


def _needles(batch: Sequence[RetrievalQuestion], tokens: int, device: torch.device) -> Tensor:
    """Returns bool [B,tokens]: true at the answer's tokens in the needle."""
    wanted = torch.zeros(len(batch), tokens, dtype=torch.bool)
    for row, question in enumerate(batch):
        wanted[row, list(question.needle)] = True
    return wanted.to(device)


def _notes(spec: RetrievalHeads, subject: Subject, copied: Copied, reach: Sequence[float]) -> tuple[str, ...]:
    notes = []
    if "copy" in spec.definitions and copied.scores is None:
        notes.append(f"copy: none of {copied.trials} answers was found, so no head has a score")
    blind = [str(layer) for layer, of in enumerate(reach) if of == 0]
    partly = [str(layer) for layer, of in enumerate(reach) if 0 < of < 1]
    if blind:
        notes.append(f"no answer is within the window of layers {', '.join(blind)}: their scores are necessarily 0")
    if partly:
        notes.append(f"only some answers are within the window of layers {', '.join(partly)}: see their reach")
    if spec.ablate is not None and copied.scores is None and "mass" not in spec.definitions:
        notes.append("no head was masked, since none has a score")
    return tuple(notes)


def _grid(name: str, scores: Tensor, letters: str, spec: RetrievalHeads) -> Grid:
    rows, columns = (tuple(map(str, range(size))) for size in scores.shape)
    title = f"Retrieval heads by {name}, {spec.length:,} tokens"
    return Grid(name, title, "head", "layer", rows, columns, tuple(map(tuple, scores.tolist())), letters)


def _ranked_table(
    ranked: Sequence[Head], known: dict[str, Tensor], reach: Sequence[float], subject: Subject, spec: RetrievalHeads
) -> Table:
    first = next(iter(known))
    rows = [
        (
            str(place),
            f"{layer}.{head}",
            subject.letters[layer],
            *(f"{known[name][layer, head]:.3f}" if name in known else "none" for name in ("copy", "mass")),
            f"{reach[layer]:.0%}",
        )
        for place, (layer, head) in enumerate(ranked[:SHOWN], start=1)
    ]
    passkeys = counted(spec.samples, "passkey")
    caption = f"heads by {first}, of {passkeys} in {spec.length:,} tokens; reach: share of answers within the window"
    return Table(caption, ("rank", "layer.head", "kind", "copy", "mass", "reach"), tuple(rows))
