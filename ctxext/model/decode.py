"""Generation in batches, greedy or sampled: unequal prompts, prefill in chunks, a cache that is O(W) on sliding layers.

The cache is transformers' own (DynamicCache), which keeps `sliding_window` - 1 tokens of a layer with a window; its
full layers have room for the whole answer from the start, where transformers copies all keys and values at every token.
Rows are padded on the left and the padding is seen by none; positions count a row's own tokens, so that a row is
rotated as it would be by itself. A cache may be kept, so that what a row has seen is not computed again. Beams,
penalties and sampling from a part of the vocabulary are not done.

RoPE of type dynamic and longrope takes its frequencies from the length of the text, and cached keys keep the
frequencies of the length at which they were computed. The answers here are those of a fresh forward of the whole text
at every token: `Reader` reads the text again from its start when its frequencies change (longrope: once; dynamic: at
every token beyond the original length), and rows of unequal lengths run one by one. Stock `generate` does not do this.

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


class Reader:
    """Rows of one model, the cache of what they have read, and the way they read more.

    cache   a `reserved_cache`; None makes a new one
    seen    the ids that the cache holds, row by row. Only RoPE whose frequencies follow the length needs them
    `attention_arguments` go to model/attention.py with every forward.
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
        """The last hidden states [B, t, E] of the last piece of `ids` [B, T], read after what the cache holds.

        mask, positions   of padded rows: [B, n + T] with the n tokens in the cache, and [B, T]; None without padding
        chunk             the most tokens of a piece. The first piece of a text is longer where a shorter one would have
                          other RoPE frequencies than the whole text: there `chunk` does not bound the memory
        prefilled         called with the tokens done and their total after each piece

        Raises InputError where the text has to be read again and `seen` did not say what the cache holds.
        """
        held = self.cache.get_seq_length()
        settled = same_frequencies_from(self.decoder.config, held + ids.shape[1])
        whole = self._note(ids, held)
        # The cached keys have the frequencies of a shorter text: drop them and read everything again.
        if 0 < held < settled:
            if whole is None:
                raise InputError(
                    f"this model's RoPE follows the length of the text, and the ids of the {held:,} tokens in the "
                    "cache are not known: the text cannot be read again",
                    hint="give the ids of what the cache holds (seen), or generate without a cache",
                )
            room = max((x.reserve for x in self.cache.layers if isinstance(x, ReservedLayer)), default=0)
            self.cache.layers = reserved_cache(self.decoder.config, room).layers
            ids, held = whole, 0
        begin, T = 0, ids.shape[1]
        reserve(self.cache, held + T)
        while begin < T:
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
        """All ids of the rows with these, [B, n + T], noted for a later reading; None where some are not known."""
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
    """The continuation of each prompt: at most `max_new_tokens` ids, ending before the first of `stop`.

    choose      takes logits [B, V] to ids [B]; those of rows that have ended are drawn and not used
    cache       a `reserved_cache` with what the rows, of one length, have seen before their prompts; it then holds the
                prompts as well, and all that was answered but a last token that nothing came after
    seen        the ids that `cache` holds, row by row; needed where RoPE follows the length of the text (`Reader`)
    prefilled   told how many tokens of the longest prompt are done, of how many, at each chunk
    told        told (row, id) of each token when it is chosen
    `attention_arguments` go to model/attention.py with every forward: watch, backend.

    Memory: the cache of B x (T + max_new_tokens) tokens on full layers and B x W on sliding ones, and the activations
    of B x `chunk` (of the whole text where RoPE is dynamic and it is beyond the original length); logits are made of
    one token a row. Raises InputError for an empty prompt.
    """
    if not prompts or min(map(len, prompts)) == 0:
        raise InputError("nothing to generate from: a prompt has no tokens")
    weight, reader = output_weight(model), Reader(model, cache, seen, **attention_arguments)
    ids, mask = _padded(prompts, weight.device)  # [B, T]
    padded, T = not bool(mask.all()), ids.shape[1]
    if padded and reader.cache.get_seq_length():
        raise InputError("prompts that go on with a cache must be of one length")
    # The longest row decides the frequencies of a batch: rows of other lengths would get those of its length.
    if padded and same_frequencies_from(reader.decoder.config, T + max_new_tokens) > 1:
        how = {"stop": stop, "chunk": chunk, "choose": choose, "prefilled": prefilled} | attention_arguments
        one = partial(generate, model, max_new_tokens=max_new_tokens, **how)
        return [one([prompt], on_token=partial(_of_row, on_token, row))[0] for row, prompt in enumerate(prompts)]
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # [B, T]
    reserve(reader.cache, reader.cache.get_seq_length() + T + max_new_tokens)
    padding = (mask, positions) if padded else ()
    state = reader.read(ids, *padding, chunk=chunk, prefilled=prefilled)[:, -1]  # [B, E]
    answers, going = [list[int]() for _ in prompts], [True] * len(prompts)
    for step in range(max_new_tokens):
        chosen = choose(torch.nn.functional.linear(state, weight))  # [B, V] -> [B]
        for row, token in enumerate(chosen.tolist()):
            going[row] = going[row] and token not in stop
            if going[row]:
                answers[row].append(token)
                on_token(row, token)
        if not any(going) or step + 1 == max_new_tokens:
            break
        mask, positions = torch.cat((mask, mask.new_ones(len(prompts), 1)), 1), positions[:, -1:] + 1
        padding = (mask, positions) if padded else ()
        state = reader.read(chosen[:, None], *padding, chunk=chunk)[:, -1]
    return answers


def _of_row(on_token: Callable[[int, int], None], row: int, _: int, token: int) -> None:
    """Report a token of a row that runs alone under its number in the batch."""
    on_token(row, token)


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
