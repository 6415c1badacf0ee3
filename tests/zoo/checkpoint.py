"""One checkpoint of the zoo: what its files say, and the same facts at a size that a test can run.

`Checkpoint` holds the values of the published files. `scaled_config` makes the small config.json. It divides widths,
depth, windows and vocabulary, and it renumbers the special tokens. Head counts, the ratio of head width to hidden size,
RoPE, tying, biases and all other fields stay as published.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Config = dict[str, Any]
DIM = 8  # width of a head in the zoo
WINDOW_SHARE = 256  # a window of 4,096 becomes one of 16
WIDTHS = ("hidden_size",)
MLP_WIDTHS = ("intermediate_size", "moe_intermediate_size", "shared_intermediate_size")
LISTS = ("layer_types", "no_rope_layers", "layer_rope_theta", "mlp_layer_types")  # one entry a layer
MEMORY = "not found, from memory"


@dataclass(frozen=True)
class Checkpoint:
    """The facts of one checkpoint.

    name              the hub id
    config            config.json with its published values
    pieces            the kind of tokenizer.json, a key of tokenization.KINDS
    tokens            published id -> text of the special tokens. Ids below 1,000 stand before the learned tokens
    tokenizer_config  tokenizer_config.json without added_tokens_decoder and chat_template, which the builder adds
    source            where the facts come from
    adds_bos          whether the post-processor of tokenizer.json puts the BOS in front
    plain             texts among `tokens` that are added tokens but not special ones
    spare_rows        rows of the embedding that no token uses (published: some hundreds, or none)
    generation        generation_config.json; None where the checkpoint has none
    template          the name of one of templates.TEMPLATES; None where the checkpoint has none
    template_file     whether the template is chat_template.jinja, and not a field of tokenizer_config.json
    shards            weight files. More than one means an index
    layers            layers of the small model
    dim               width of a head of the small model
    overrides         fields of the small config that no rule of `scaled_config` gives
    """

    name: str
    config: Config
    pieces: str
    tokens: dict[int, str]
    tokenizer_config: Config
    source: str
    adds_bos: bool = False
    plain: tuple[str, ...] = ()
    spare_rows: int = 0
    generation: Config | None = None
    template: str | None = None
    template_file: bool = False
    shards: int = 1
    layers: int = 4
    dim: int = DIM
    overrides: Config = field(default_factory=dict)

    @property
    def model_type(self) -> str:
        return str(self.config["model_type"])

    @property
    def slug(self) -> str:
        return self.name.rpartition("/")[2]


def scaled_ids(value: Any, ids: dict[int, int]) -> Any:
    """A token id of a config, or a list of them, renumbered."""
    if isinstance(value, list):
        return [ids[one] for one in value]
    return value if value is None else ids[value]


def scaled_config(row: Checkpoint, ids: dict[int, int], rows: int) -> Config:
    """The small config.json. `ids`: published id -> small id. `rows`: rows of the embedding."""
    if "text_config" in row.config:
        text = _scaled(row, row.config["text_config"], ids, rows)
        outer = {k: v for k, v in row.config.items() if not k.endswith("_token_id")}
        return outer | {"text_config": text}
    return _scaled(row, row.config, ids, rows)


def _scaled(row: Checkpoint, published: Config, ids: dict[int, int], rows: int) -> Config:
    config = dict(published)
    head = published.get("head_dim") or published["hidden_size"] // published["num_attention_heads"]
    depth, layers = published["num_hidden_layers"], row.layers
    for name in (*WIDTHS, *MLP_WIDTHS):
        if name in config:
            share = 1 if name in WIDTHS else 4
            config[name] = max(8, config[name] * row.dim // head // share // 2 * 2)
    if published.get("head_dim") is not None:
        config["head_dim"] = row.dim
    config |= {"num_hidden_layers": layers, "vocab_size": rows}
    config |= {name: config[name][:layers] for name in LISTS if config.get(name) is not None}
    if "max_window_layers" in config:
        config["max_window_layers"] = round(layers * config["max_window_layers"] / depth)
    if config.get("sliding_window") is not None:
        config["sliding_window"] = max(4, config["sliding_window"] // WINDOW_SHARE)
    config |= {k: scaled_ids(v, ids) for k, v in config.items() if k.endswith("_token_id")}
    if config.get("rope_scaling"):
        config["rope_scaling"] = _shortened(config["rope_scaling"], row.dim // 2)
    return config | row.overrides


def _shortened(rope: Config, length: int) -> Config:
    """RoPE parameters with each list of factors cut to one number a frequency, evenly chosen."""
    return {
        name: [value[i * (len(value) - 1) // (length - 1)] for i in range(length)] if isinstance(value, list) else value
        for name, value in rope.items()
    }
