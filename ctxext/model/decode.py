"""Generation in batches, greedy or sampled: unequal prompts, prefill in chunks, a cache that is O(W) on sliding layers.

The cache is transformers' own (DynamicCache), which keeps `sliding_window` - 1 tokens of a layer with a window; its
full layers have room for the whole answer from the start, where transformers copies all keys and values at every token.
Rows are padded on the left and the padding is seen by none; positions count a row's own tokens, so that a row is
rotated as it would be by itself. A cache may be kept, so that what a row has seen is not computed again. Beams,
penalties and sampling from a part of the vocabulary are not done.

B rows, T tokens of the longest prompt, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from ctxext.errors import InputError
from ctxext.model.load import causal_lm, output_weight

CHUNK = 16_384  # tokens of a row prefilled at once: activations are bounded by it, not by the prompt; a chunk after the
# first costs a quarter more than its share, because attention over cached keys takes masks


def greedy(logits: Tensor) -> Tensor:
    """The most probable token of each row: [B, V] -> [B]."""
    return logits.argmax(-1)


def sampled(temperature: float, seed: int) -> Callable[[Tensor], Tensor]:
    """Draws a token of each row from all of the vocabulary, softmax(logits / temperature): [B, V] -> [B]."""
    generator = torch.Generator().manual_seed(seed)

    def choose(logits: Tensor) -> Tensor:
        weights = (logits.float() / temperature).softmax(-1).cpu()  # one generator, the same numbers on every device
        return torch.multinomial(weights, 1, generator=generator)[:, 0].to(logits.device)

    return choose


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
    prefilled: Callable[[int, int], None] = lambda done, total: None,
    told: Callable[[int, int], None] = lambda row, token: None,
    **attention_arguments: Any,
) -> list[list[int]]:
    """The continuation of each prompt: at most `max_new_tokens` ids, ending before the first of `stop`.

    choose      takes logits [B, V] to ids [B]; those of rows that have ended are drawn and not used
    cache       a `reserved_cache` with what the rows, of one length, have seen before their prompts; it then holds the
                prompts as well, and all that was answered but a last token that nothing came after
    prefilled   told how many tokens of the longest prompt are done, of how many, at each chunk
    told        told (row, id) of each token when it is chosen
    `attention_arguments` go to model/attention.py with every forward: watch, backend.

    Memory: the cache of B x (T + max_new_tokens) tokens on full layers and B x W on sliding ones, and the activations
    of B x `chunk`; logits are made of one token a row. Raises InputError for an empty prompt.
    """
    if not prompts or min(map(len, prompts)) == 0:
        raise InputError("nothing to generate from: a prompt has no tokens")
    weight, decoder = output_weight(model), causal_lm(model).get_decoder()
    ids, mask = _padded(prompts, weight.device)  # [B, T]
    padded, T = not bool(mask.all()), ids.shape[1]
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # [B, T]
    cache = reserved_cache(decoder.config, 0) if cache is None else cache
    if padded and cache.get_seq_length():
        raise InputError("prompts that go on with a cache must be of one length")
    reserve(cache, cache.get_seq_length() + T + max_new_tokens)

    def last_state(ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        padding = {"attention_mask": mask, "position_ids": positions} if padded else {}
        out = decoder(input_ids=ids, past_key_values=cache, use_cache=True, **padding, **attention_arguments)
        return out.last_hidden_state[:, -1]  # [B, E]

    for begin in range(0, T, chunk):
        end = min(begin + chunk, T)
        state = last_state(ids[:, begin:end], mask[:, :end], positions[:, begin:end])
        prefilled(end, T)
    answers, going = [list[int]() for _ in prompts], [True] * len(prompts)
    for step in range(max_new_tokens):
        chosen = choose(torch.nn.functional.linear(state, weight))  # [B, V] -> [B]
        for row, token in enumerate(chosen.tolist()):
            going[row] = going[row] and token not in stop
            if going[row]:
                answers[row].append(token)
                told(row, token)
        if not any(going) or step + 1 == max_new_tokens:
            break
        mask = torch.cat((mask, mask.new_ones(len(prompts), 1)), 1)
        positions = positions[:, -1:] + 1
        state = last_state(chosen[:, None], mask, positions)
    return answers


class ReservedLayer(DynamicLayer):
    """Keys and values of a full layer in memory for `reserve` tokens, written in place; moved when that has grown."""

    def __init__(self, reserve: int):
        super().__init__()
        self.reserve = reserve

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Add keys and values [B, K, t, D]; gives all so far, as views. Raises RuntimeError beyond the reserve."""
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
    """transformers' cache for a model's config, with `tokens` reserved on its full layers."""
    cache = DynamicCache(config=config)
    cache.layers = [ReservedLayer(tokens) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def reserve(cache: DynamicCache, tokens: int) -> None:
    """Room for `tokens` in all on the full layers of a `reserved_cache`; what they hold is moved at the next update."""
    for layer in cache.layers:
        if isinstance(layer, ReservedLayer):
            layer.reserve = max(layer.reserve, tokens)


def _padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and a mask, both [B, T], with the padding on the left."""
    T = max(map(len, prompts))
    ids = torch.zeros(len(prompts), T, dtype=torch.long)
    mask = torch.zeros(len(prompts), T, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, T - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, T - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def stop_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer: the tokenizer's EOS and those of the model's generation config."""
    configured = getattr(causal_lm(model), "generation_config", None)
    given = getattr(configured, "eos_token_id", None)
    listed = [given] if isinstance(given, int) else list(given or [])
    return frozenset(listed + ([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []))
