"""Which layers of a source retrieve: passkeys as questions, and the warning where windows hide them from such a layer.

A layer retrieves if its heads, at the last token of a question, attend to the answer far back in the text (retrieval
heads, arXiv 2404.15574 and 2606.15378). These layers need full attention. In SmolLM2-135M they are layers 14 to 24, and
the alternating patterns give a window to half of them (LOG.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ctxext.data.cases import private_random
from ctxext.data.documents import EMBEDDED, read_documents
from ctxext.data.haystack import HaystackCase, key_places, passkey_case
from ctxext.errors import InputError
from ctxext.machine.gpu import default_device
from ctxext.model.convert import ConversionPlan
from ctxext.model.load import load_tokenizer
from ctxext.model.weights import only_pickles
from ctxext.ops.cost import parameter_count
from ctxext.retrofit.calibration import joined
from ctxext.retrofit.damage import MIN_SHARE, Samples, head_scores_and_states
from ctxext.retrofit.fitted_sinks import narrows, open_conversion
from ctxext.train.loss import token_losses

MAX_ANSWER_LOSS = 1.0  # nats a token: with a higher loss at the answers a source cannot retrieve
MIN_QUESTIONS = 4
SHORTEST, ROW_TOKENS = 256, 1024  # tokens of a row with a question: at least, and at most
CPU_FLOPS = 4e12  # of the measurement on a CPU, some twenty seconds on two cores; a larger model is not measured


def with_questions(text: Tensor, tokenizer: Any, filler: list[int], window: int, count: int) -> Samples:
    """Returns rows of text [n,T] and after them `count` rows with passkeys in `filler`, none where they do not fit.

    Passkeys are at all depths that are further from the question than `window`, if a row is long enough.
    """
    n, T = text.shape
    cases = _cases(tokenizer, filler, T, window, count)
    rows = torch.tensor([[*case.prompt_ids, *case.answer_ids] for case in cases], dtype=torch.int64).view(-1, T)
    answers, needles = torch.zeros(2, n + len(cases), T, dtype=torch.bool)
    for row, case in enumerate(cases, start=n):
        # Position t is marked if the NEXT token belongs to the answer.
        prompt_length = len(case.prompt_ids)
        answers[row, prompt_length - 1 : T - 1] = True
        needles[row, list(key_places(tokenizer, case))] = True
    return Samples(torch.cat([text, rows]), n, answers, needles)


def _cases(tokenizer: Any, filler: list[int], T: int, window: int, count: int) -> list[HaystackCase]:
    rng = private_random("retrofit", T, count)
    # A needle at this depth or before is further from the question than the window, with a margin of a quarter.
    deepest = max(0.0, 1 - 1.25 * window / T)
    try:
        return [passkey_case(tokenizer, T, deepest * (i + 0.5) / count, rng, filler) for i in range(count)]
    except InputError:  # rows too short for a needle and a question
        return []


@torch.no_grad()
def hidden_retrieval(plan: ConversionPlan, device: str | None = None) -> str | None:
    """Returns a warning where layers with the strongest retrieval heads become sliding, from one pass over the source.

    As many of the strongest layers are looked at as the layout has full ones. None if all of them stay full, if the
    model does not find the passkeys, and where nothing is measured: without a new window, for rows too short for
    passkeys beyond the window, for pickled weights, and above CPU_FLOPS on a CPU.
    """
    source = plan.source
    windows = {kind.sliding_window for kind in plan.kinds} - {None}
    window, full = min(windows, default=0), [i for i, kind in enumerate(plan.kinds) if kind.sliding_window is None]
    T = min(source.usable_length, ROW_TOKENS)
    if not (any(map(narrows, plan.kinds, source.kinds)) and full and SHORTEST <= T and 2 * window <= T):
        return None
    where = torch.device(device or default_device())
    flops = 2.0 * parameter_count(source.shape) * MIN_QUESTIONS * T
    if only_pickles(source.directory) or (where.type == "cpu" and flops > CPU_FLOPS):
        return None
    # Passkeys in the embedded text, further from the question than the window.
    tokenizer = load_tokenizer(source.directory)
    filler = joined(read_documents(EMBEDDED), tokenizer, 4 * T)
    samples = with_questions(torch.zeros(0, T, dtype=torch.int64), tokenizer, filler.tolist(), window, MIN_QUESTIONS)
    if not len(samples.ids) or int(samples.ids.max()) >= source.shape.vocab_size:
        return None
    # One pass of the source gives the attention of its heads and its loss at the answers.
    layers = open_conversion(plan, [], where)
    scores, states = head_scores_and_states(layers, samples)
    labels = samples.ids.roll(-1, 1)[samples.answers].to(where)
    if not float(token_losses(states[samples.answers].to(where), layers.head, labels).mean()) <= MAX_ANSWER_LOSS:
        return None
    # The strongest layers, among those with a retrieval head.
    sums = scores.sum(1)
    strongest = [i for i in sums.argsort(descending=True).tolist() if float(scores[i].max()) >= MIN_SHARE][: len(full)]
    hidden = sorted(i for i in strongest if i not in full)
    if not hidden:
        return None
    return (
        f"warning: {len(hidden)} of the {len(strongest)} layers with the strongest retrieval heads become sliding: "
        f"{', '.join(map(str, hidden))}; --full-layers retrieval keeps them full"
    )
