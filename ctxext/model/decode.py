"""Generation in batches, greedy or sampled: unequal prompts, prefill in chunks, a cache that is O(W) on sliding layers.

The cache is transformers' own (DynamicCache), which keeps `sliding_window` - 1 tokens of a layer with a window; its
full layers have room for the whole answer from the start, where transformers copies all keys and values at every token.
Rows are padded on the left and the padding is seen by none; positions count a row's own tokens, so that a row is
rotated as it would be by itself. Beams, penalties and sampling from a part of the vocabulary are not done.

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
    **attention_arguments: Any,
) -> list[list[int]]:
    """The continuation of each prompt: at most `max_new_tokens` ids, ending before the first of `stop`.

    `choose` takes logits [B, V] to ids [B]; those of rows that have ended are drawn and not used.
    `attention_arguments` go to model/attention.py with every forward: watch, backend.

    Memory: the cache of B x (T + max_new_tokens) tokens on full layers and B x W on sliding ones, and the activations
    of B x `chunk`; logits are made of one token a row. Raises InputError for an empty prompt.
    """
    if not prompts or min(map(len, prompts)) == 0:
        raise InputError("nothing to generate from: a prompt has no tokens")
    weight = output_weight(model)
    decoder = causal_lm(model).get_decoder()
    ids, mask = _padded(prompts, weight.device)  # [B, T]
    padded = not bool(mask.all())
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # [B, T]
    cache, out = reserved_cache(decoder.config, ids.shape[1] + max_new_tokens), None
    for begin in range(0, ids.shape[1], chunk):
        end = min(begin + chunk, ids.shape[1])
        out = decoder(
            input_ids=ids[:, begin:end],
            attention_mask=mask[:, :end] if padded else None,
            position_ids=positions[:, begin:end] if padded else None,
            past_key_values=cache,
            use_cache=True,
            **attention_arguments,
        )
    answers: list[list[int]] = [[] for _ in prompts]
    going = [True] * len(prompts)
    for step in range(max_new_tokens):
        logits = torch.nn.functional.linear(out.last_hidden_state[:, -1], weight)  # [B, V]
        chosen = choose(logits)  # [B]
        for row, token in enumerate(chosen.tolist()):
            going[row] = going[row] and token not in stop
            if going[row]:
                answers[row].append(token)
        if not any(going) or step + 1 == max_new_tokens:
            break
        mask = torch.cat((mask, mask.new_ones(len(prompts), 1)), 1)
        positions = positions[:, -1:] + 1
        out = decoder(
            input_ids=chosen[:, None],
            attention_mask=mask if padded else None,
            position_ids=positions if padded else None,
            past_key_values=cache,
            use_cache=True,
            **attention_arguments,
        )
    return answers


class ReservedLayer(DynamicLayer):
    """Keys and values of a full layer in memory for `reserve` tokens, written in place."""

    def __init__(self, reserve: int):
        super().__init__()
        self.reserve = reserve

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Add keys and values [B, K, t, D]; gives all so far, as views. Raises RuntimeError beyond the reserve."""
        begin = self.get_seq_length()
        end = begin + key_states.shape[2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.store = [x.new_empty(*x.shape[:2], self.reserve, x.shape[3]) for x in (key_states, value_states)]
        for store, new in zip(self.store, (key_states, value_states), strict=True):
            store[:, :, begin:end] = new
        self.keys, self.values = (store[:, :, :end] for store in self.store)
        return self.keys, self.values


def reserved_cache(config: Any, tokens: int) -> DynamicCache:
    """transformers' cache for a model's config, with `tokens` reserved on its full layers."""
    cache = DynamicCache(config=config)
    cache.layers = [ReservedLayer(tokens) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


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
