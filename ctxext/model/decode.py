"""Batched generation, greedy or sampled: prompts of different lengths, chunked prefill, a cache of O(W) per window.

The cache is transformers' own (DynamicCache), which keeps `sliding_window` - 1 tokens of a layer with a window. Its
full layers reserve memory for the whole answer at the start; stock transformers copies all keys and values at every
token. Rows are padded on the left and no token sees the padding. Positions count a row's own tokens, so a row gets the
same rotations as it would alone. A caller may keep the cache, so that earlier tokens are not computed again. Not done:
beams, penalties and sampling from a part of the vocabulary.

RoPE of type dynamic and longrope takes its frequencies from the length of the text, and cached keys keep the
frequencies of the length at which they were computed. The answers here equal those of a new forward pass over the whole
text at every token: `Reader` reads the text again from its start when the frequencies change (longrope: once; dynamic:
at every token beyond the original length), and rows of different lengths run one by one. Stock `generate` does not do
this.

B rows, T tokens of the longest prompt, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from ctxext.errors import InputError
from ctxext.model.frequencies import same_frequencies_from, switch_length
from ctxext.model.load import causal_lm, output_weight
from ctxext.progress import CountProgress, ignore

# Tokens of a row per prefill chunk: it bounds the memory of activations for prompts of any length. Each chunk after the
# first costs a quarter more than its share, because attention over cached keys needs masks.
CHUNK = 16_384


def greedy(logits: Tensor) -> Tensor:
    """Returns the most probable token of each row: [B, V] -> [B]."""
    return logits.argmax(-1)


def sampled(temperature: float, seed: int) -> Callable[[Tensor], Tensor]:
    """Returns a function that samples a token of each row, [B, V] -> [B], from softmax(logits / temperature).

    It samples from the whole vocabulary.
    """
    generator = torch.Generator().manual_seed(seed)

    def choose(logits: Tensor) -> Tensor:
        weights = (logits.float() / temperature).softmax(-1).cpu()  # a CPU generator: the same numbers on every device
        return torch.multinomial(weights, 1, generator=generator)[:, 0].to(logits.device)

    return choose


class Reader:
    """Runs rows of ids through a model with a cache, and reads the text again where RoPE requires it.

    cache   a `reserved_cache`; None makes a new one
    seen    the ids in the cache, row by row. Needed only where RoPE's frequencies depend on the text length
    `attention_arguments` go to model/attention.py with every forward pass.
    """

    def __init__(
        self,
        model: Any,
        cache: DynamicCache | None = None,
        seen: Sequence[Sequence[int]] | None = None,
        **attention_arguments: Any,
    ):
        self.decoder: Any = causal_lm(model).get_decoder()
        self.cache = reserved_cache(self.decoder.config, 0) if cache is None else cache
        self.arguments = attention_arguments
        self.ids = None if seen is None else torch.tensor([list(row) for row in seen], dtype=torch.long)  # [B, n]

    def read(
        self,
        ids: Tensor,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        *,
        chunk: int = CHUNK,
        prefilled: CountProgress = ignore,
    ) -> Tensor:
        """Runs `ids` [B, T] after the cached tokens. Returns the last hidden states [B, t, E] of the last piece.

        mask, positions   of padded rows: [B, n + T] with the n tokens in the cache, and [B, T]; None without padding
        chunk             the maximum number of tokens of a piece. The first piece of a text is longer where a shorter
                          one would have other RoPE frequencies than the whole text. Then `chunk` does not bound memory
        prefilled         a progress callback, called after each piece with the tokens done and their total

        Raises InputError where the text must be read again and the ids in the cache are not known (`seen`).
        """
        # `settled`: a cache shorter than this has other RoPE frequencies than the whole text.
        held = self.cache.get_seq_length()
        settled = same_frequencies_from(self.decoder.config, held + ids.shape[1])
        whole = self._note(ids, held)
        # The cached keys have the frequencies of a shorter text: drop them and read everything again. The cache keeps
        # its reserve, and it stays the same object, because the caller may hold it.
        if 0 < held < settled:
            if whole is None:
                raise InputError(
                    f"this model's RoPE depends on the length of the text, and the ids of the {held:,} tokens in the "
                    "cache are not known, so that they cannot be computed again",
                    hint="give the ids of the cached tokens (seen), or generate without a cache",
                )
            room = max((x.reserve for x in self.cache.layers if isinstance(x, ReservedLayer)), default=0)
            self.cache.layers = reserved_cache(self.decoder.config, room).layers
            ids, held = whole, 0
        begin, T = 0, ids.shape[1]
        reserve(self.cache, held + T)
        while begin < T:
            # The first piece of a text must be at least `settled` tokens long to get the final frequencies.
            end = min(begin + (chunk if held + begin else max(chunk, settled)), T)
            padding = {}
            if mask is not None and positions is not None:
                padding = {"attention_mask": mask[:, : held + end], "position_ids": positions[:, begin:end]}
            piece = ids[:, begin:end]
            out = self.decoder(input_ids=piece, past_key_values=self.cache, use_cache=True, **padding, **self.arguments)
            prefilled(end, T)
            begin = end
        states: Tensor = out.last_hidden_state
        return states

    def _note(self, ids: Tensor, held: int) -> Tensor | None:
        """Records the ids for a repeated read later. Returns all ids of the rows, [B, n + T].

        Returns None where some ids are unknown, and where RoPE never depends on the text length.
        """
        if switch_length(self.decoder.config) is None:
            return None  # no text is ever read again
        if not held:
            self.ids = ids
        elif self.ids is not None and self.ids.shape[1] == held:
            self.ids = torch.cat((self.ids.to(ids.device), ids), 1)
        else:
            self.ids = None
        return self.ids


@torch.inference_mode()
def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    stop: Collection[int] = (),
    chunk: int = CHUNK,
    choose: Callable[[Tensor], Tensor] = greedy,
    cache: DynamicCache | None = None,
    seen: Sequence[Sequence[int]] | None = None,
    prefilled: CountProgress = ignore,
    on_token: Callable[[int, int], None] = lambda row, token: None,
    **attention_arguments: Any,
) -> list[list[int]]:
    """Generates the continuation of each prompt: at most `max_new_tokens` ids, ending before the first id in `stop`.

    choose      maps logits [B, V] to ids [B]; the ids of finished rows are drawn but not used
    cache       a `reserved_cache` with the tokens before the prompts, for rows of one length. Afterwards it also holds
                the prompts and the chosen tokens, except the last one where no forward pass followed it
    seen        the ids in `cache`, row by row; needed where RoPE depends on the text length (`Reader`)
    prefilled   a progress callback, called at each chunk with the tokens done of the longest prompt and their total
    on_token    a callback, called with (row, id) for each token when it is chosen
    `attention_arguments` go to model/attention.py with every forward pass: watch, backend.

    Memory: the cache takes B x (T + max_new_tokens) tokens on full layers and B x W on sliding layers. Activations take
    B x `chunk` tokens (the whole text where RoPE is dynamic and the text is longer than the original length). Logits
    are computed for one token per row. Raises InputError for an empty prompt, and for prompts of different lengths with
    a cache that is not empty, or with any cache where RoPE's frequencies change within this generation.
    """
    if not prompts or min(map(len, prompts)) == 0:
        raise InputError("a prompt has no tokens")
    weight, reader = output_weight(model), Reader(model, cache, seen, **attention_arguments)
    ids, mask = _padded(prompts, weight.device)  # [B, T]
    padded, T = not bool(mask.all()), ids.shape[1]
    if padded and reader.cache.get_seq_length():
        raise InputError("prompts that continue a cache must have one length")
    # All rows of a batch share RoPE's frequencies, which depend on the longest row. Where they change within this
    # generation, rows of different lengths run one by one.
    if padded and same_frequencies_from(reader.decoder.config, T + max_new_tokens) > 1:
        if cache is not None:
            raise InputError(
                "this model's RoPE follows the length of the text, so prompts of different lengths run one by one and "
                "cannot share a cache",
                hint="generate without a cache, or give prompts of one length",
            )
        how = {"stop": stop, "chunk": chunk, "choose": choose, "prefilled": prefilled} | attention_arguments
        one = partial(generate, model, max_new_tokens=max_new_tokens, **how)
        return [one([prompt], on_token=partial(_of_row, on_token, row))[0] for row, prompt in enumerate(prompts)]
    # Positions count a row's own tokens. Without padding the decoder makes them itself.
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # [B, T]
    reserve(reader.cache, reader.cache.get_seq_length() + T + max_new_tokens)
    padding = (mask, positions) if padded else ()
    state = reader.read(ids, *padding, chunk=chunk, prefilled=prefilled)[:, -1]  # [B, E]
    answers, going = [list[int]() for _ in prompts], [True] * len(prompts)
    # `state` is the hidden state of each row's last token. Finished rows stay in the batch; their tokens are ignored.
    for step in range(max_new_tokens):
        chosen = choose(torch.nn.functional.linear(state, weight))  # [B, V] -> [B]
        for row, token in enumerate(chosen.tolist()):
            going[row] = going[row] and token not in stop
            if going[row]:
                answers[row].append(token)
                on_token(row, token)
        if not any(going) or step + 1 == max_new_tokens:
            break
        # Feed the chosen tokens: one more column of the mask, and the next position of each row.
        mask, positions = torch.cat((mask, mask.new_ones(len(prompts), 1)), 1), positions[:, -1:] + 1
        padding = (mask, positions) if padded else ()
        state = reader.read(chosen[:, None], *padding, chunk=chunk)[:, -1]
    return answers


def _of_row(on_token: Callable[[int, int], None], row: int, _: int, token: int) -> None:
    """Calls `on_token` for a row that runs alone, with its number in the batch."""
    on_token(row, token)


class ReservedLayer(DynamicLayer):
    """A cache layer that writes keys and values in place, in memory for `reserve` tokens. It moves when that grows."""

    def __init__(self, reserve: int):
        super().__init__()
        self.reserve = reserve

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Adds keys and values [B, K, t, D]. Returns all so far, as views. Raises RuntimeError beyond the reserve."""
        # `store` is the reserved memory; `keys` and `values`, which transformers reads, are views of its filled part.
        begin = self.get_seq_length()
        end = begin + key_states.shape[2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.store = [x.new_empty(*x.shape[:2], 0, x.shape[3]) for x in (key_states, value_states)]
        if self.store[0].shape[2] < self.reserve:
            self.store = [_moved(store, begin, self.reserve) for store in self.store]
        for store, new in zip(self.store, (key_states, value_states), strict=True):
            store[:, :, begin:end] = new
        self.keys, self.values = (store[:, :, :end] for store in self.store)
        return self.keys, self.values


def _moved(store: Tensor, held: int, reserve: int) -> Tensor:
    larger = store.new_empty(*store.shape[:2], reserve, store.shape[3])
    larger[:, :, :held] = store[:, :, :held]
    return larger


def reserved_cache(config: Any, tokens: int) -> DynamicCache:
    """Returns transformers' cache for a model's config, with memory for `tokens` reserved on its full layers."""
    cache = DynamicCache(config=config)
    cache.layers = [ReservedLayer(tokens) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def reserve(cache: DynamicCache, tokens: int) -> None:
    """Reserves `tokens` in total on the full layers of a `reserved_cache`. The next update moves their contents."""
    for layer in cache.layers:
        if isinstance(layer, ReservedLayer):
            layer.reserve = max(layer.reserve, tokens)


def _padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns ids and a mask, both [B, T], with the padding on the left."""
    T = max(map(len, prompts))
    ids = torch.zeros(len(prompts), T, dtype=torch.long)
    mask = torch.zeros(len(prompts), T, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, T - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, T - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def stop_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Returns the tokens that end an answer: the tokenizer's EOS and those of the model's generation config."""
    configured = getattr(causal_lm(model), "generation_config", None)
    given = getattr(configured, "eos_token_id", None)
    listed = [given] if isinstance(given, int) else list(given or [])
    return frozenset(listed + ([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []))
