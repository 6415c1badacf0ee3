"""Checkpoints of model_type mistral and smollm3, and the two that are hybrids already: Mellum 2, Granite SWA."""

from __future__ import annotations

from tests.zoo.checkpoint import MEMORY, Checkpoint
from tests.zoo.rows_llama import ENDLESS, LLAMA2_TOKENS, LLAMA2_WORDS, TT_METAL

MISTRAL = {
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "attention_dropout": 0.0, "bos_token_id": 1,
    "eos_token_id": 2, "hidden_act": "silu", "initializer_range": 0.02, "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
}  # fmt: skip
SEVEN = {"hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32,
         "num_hidden_layers": 32, "num_key_value_heads": 8}  # fmt: skip
MISTRAL_WORDS = LLAMA2_WORDS | {
    "add_bos_token": True, "add_eos_token": False, "additional_special_tokens": [],
    "clean_up_tokenization_spaces": False, "model_max_length": ENDLESS, "pad_token": None, "sp_model_kwargs": {},
    "spaces_between_special_tokens": False, "tokenizer_class": "LlamaTokenizer", "use_default_system_prompt": False,
}  # fmt: skip
CONTROL = {3: "[INST]", 4: "[/INST]", 5: "[TOOL_CALLS]", 6: "[AVAILABLE_TOOLS]", 7: "[/AVAILABLE_TOOLS]"}
TEKKEN_WORDS = LLAMA2_WORDS | {
    "add_bos_token": True, "add_eos_token": False, "add_prefix_space": False, "clean_up_tokenization_spaces": False,
    "model_max_length": ENDLESS, "tokenizer_class": "PreTrainedTokenizerFast",
}  # fmt: skip
TOKENIZER = f"tokenizer and generation files: {MEMORY}"

ROWS = (
    Checkpoint(
        name="mistralai/Mistral-7B-v0.1",
        config=MISTRAL | SEVEN | {
            "rope_theta": 10000.0, "sliding_window": 4096, "transformers_version": "4.34.0.dev0", "vocab_size": 32000,
        },
        pieces="normaliser",
        tokens=LLAMA2_TOKENS,
        tokenizer_config=MISTRAL_WORDS | {"legacy": True},
        adds_bos=True,
        generation={"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2,
                    "transformers_version": "4.34.0.dev0"},
        shards=2,
        source=f"config.json as printed in public repositories; {TOKENIZER}",
    ),
    Checkpoint(
        name="mistralai/Mistral-7B-Instruct-v0.3",
        config=MISTRAL | SEVEN | {
            "rope_theta": 1000000.0, "sliding_window": None, "transformers_version": "4.42.0.dev0",
            "vocab_size": 32768,
        },
        pieces="metaspace",
        tokens=LLAMA2_TOKENS | CONTROL,
        tokenizer_config=MISTRAL_WORDS | {"add_prefix_space": None, "legacy": False},
        adds_bos=True,
        generation={"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2,
                    "transformers_version": "4.42.0.dev0"},
        template="inst",
        shards=3,
        source=f"config.json {TT_METAL}/Mistral-7B-Instruct-v0.3; {TOKENIZER}",
    ),
    Checkpoint(
        name="mistralai/Mistral-Nemo-Base-2407",
        config=MISTRAL | {
            "head_dim": 128, "hidden_size": 5120, "intermediate_size": 14336, "max_position_embeddings": 128000,
            "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 8, "rope_theta": 1000000.0,
            "sliding_window": None, "transformers_version": "4.43.3", "vocab_size": 131072,
        },
        pieces="tekken",
        tokens=LLAMA2_TOKENS | CONTROL | {10: "<pad>"},
        tokenizer_config=TEKKEN_WORDS | {"tokenizer_class": "GPT2TokenizerFast"},
        adds_bos=True,
        generation={"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "transformers_version": "4.43.3"},
        shards=5,
        source=f"config.json as quoted in kevinstephano/thunder_model_blocks; {TOKENIZER}",
    ),
    Checkpoint(
        name="mistralai/Ministral-8B-Instruct-2410",
        config=MISTRAL | {
            "head_dim": 128, "hidden_size": 4096, "intermediate_size": 12288, "max_position_embeddings": 32768,
            "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8, "rope_theta": 100000000.0,
            "sliding_window": 32768, "transformers_version": "4.46.0.dev0", "vocab_size": 131072,
        },
        pieces="tekken",
        tokens=LLAMA2_TOKENS | CONTROL | {10: "<pad>"},
        tokenizer_config=TEKKEN_WORDS,
        adds_bos=True,
        generation={"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2,
                    "transformers_version": "4.46.0.dev0"},
        template="inst",
        shards=4,
        source=f"config.json as quoted in a public benchmark's list of configs; {TOKENIZER}",
    ),
    Checkpoint(
        name="HuggingFaceTB/SmolLM3-3B",
        config={
            "architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3", "attention_bias": False,
            "attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": 128012, "hidden_act": "silu",
            "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 11008,
            "layer_types": ["full_attention"] * 36, "max_position_embeddings": 65536, "max_window_layers": 28,
            "mlp_bias": False, "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9,
            "num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 4, "pad_token_id": 128004,
            "pretraining_tp": 2, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 5000000.0,
            "sliding_window": None, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
            "transformers_version": "4.54.0.dev0", "use_cache": False, "use_sliding_window": False,
            "vocab_size": 128256,
        },
        pieces="llama3",
        tokens={128000: "<|begin_of_text|>", 128001: "<|end_of_text|>", 128002: "<think>", 128003: "</think>",
                128004: "<|finetune_right_pad_id|>", 128011: "<|im_start|>", 128012: "<|im_end|>"},
        plain=("<think>", "</think>"),
        tokenizer_config={
            "bos_token": None, "clean_up_tokenization_spaces": True, "eos_token": "<|im_end|>", "fast": False,
            "extra_special_tokens": {}, "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": 131072, "pad_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast",
        },
        generation={"bos_token_id": 128000, "do_sample": True, "eos_token_id": 128012, "pad_token_id": 128004,
                    "temperature": 0.6, "top_p": 0.95, "transformers_version": "4.54.0.dev0"},
        template="chatml-reasoning",
        template_file=True,
        shards=2,
        source=f"config.json: fields and ids as quoted in tests of public repositories; {TOKENIZER}",
    ),
    Checkpoint(
        name="JetBrains/Mellum2-12B-A2.5B-Base",
        config={
            "architectures": ["MellumForCausalLM"], "model_type": "mellum", "attention_bias": False,
            "attention_dropout": 0.0, "bos_token_id": 0, "eos_token_id": 0, "head_dim": 128, "hidden_act": "silu",
            "hidden_size": 2304, "initializer_range": 0.02, "intermediate_size": 7168,
            "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 7, "max_position_embeddings": 131072,
            "mlp_layer_types": ["sparse"] * 28, "moe_intermediate_size": 896, "norm_topk_prob": True,
            "num_attention_heads": 32, "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 28,
            "num_key_value_heads": 4, "output_router_logits": False, "rms_norm_eps": 1e-06,
            "rope_parameters": {
                "full_attention": {"rope_type": "yarn", "rope_theta": 500000.0, "factor": 16.0,
                                   "original_max_position_embeddings": 8192},
                "sliding_attention": {"rope_type": "default", "rope_theta": 500000.0},
            },
            "router_aux_loss_coef": 0.001, "sliding_window": 1024, "tie_word_embeddings": False, "dtype": "bfloat16",
            "transformers_version": "5.9.0", "use_cache": True, "vocab_size": 98304,
        },
        pieces="digits",
        tokens={0: "<|endoftext|>", 1: "<fim_prefix>", 2: "<fim_middle>", 3: "<fim_suffix>"},
        tokenizer_config={"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "backend": "tokenizers",
                          "model_max_length": 131072, "tokenizer_class": "TokenizersBackend"},
        overrides={"num_experts": 4, "num_experts_per_tok": 2},
        source="sizes and experts: defaults of MellumConfig in transformers 5.23, which names this checkpoint; layers, "
        f"RoPE and tokenizer: {MEMORY}",
    ),
    Checkpoint(
        name="ibm-granite/granite-swash-2b",
        config={
            "architectures": ["GraniteSWAForCausalLM"], "model_type": "granite_swa", "attention_bias": False,
            "attention_dropout": 0.0, "attention_multiplier": 0.0078125, "bos_token_id": 100257,
            "embedding_multiplier": 12.0, "eos_token_id": 100257, "hidden_act": "silu", "hidden_size": 2560,
            "initializer_range": 0.02, "intermediate_size": 8192,
            "layer_rope_theta": [0, 10000, 10000, 10000] * 6,
            "layer_types": (["full_attention"] + ["sliding_attention"] * 3) * 6, "logits_scaling": 8.0,
            "max_position_embeddings": 8192, "mlp_bias": False, "num_attention_heads": 20, "num_hidden_layers": 24,
            "num_key_value_heads": 4, "pad_token_id": 100256, "residual_multiplier": 0.22, "rms_norm_eps": 1e-05,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000}, "sliding_window": 128,
            "tie_word_embeddings": True, "dtype": "bfloat16", "transformers_version": "5.15.0", "use_cache": True,
            "vocab_size": 100352,
        },
        pieces="llama3",
        tokens={100256: "<|pad|>", 100257: "<|end_of_text|>", 100264: "<|start_of_role|>", 100265: "<|end_of_role|>"},
        tokenizer_config={"bos_token": "<|end_of_text|>", "eos_token": "<|end_of_text|>", "pad_token": "<|pad|>",
                          "backend": "tokenizers", "model_max_length": ENDLESS,
                          "tokenizer_class": "TokenizersBackend"},
        spare_rows=4,
        source="sizes, layers, window, ids: defaults of GraniteSWAConfig in transformers 5.23, which names this "
        f"checkpoint; multipliers, thetas, tokenizer: {MEMORY}",
    ),
)  # fmt: skip
