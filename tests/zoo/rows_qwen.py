"""Checkpoints of model_type qwen2 and qwen3, Qwen3.5, and what borrows qwen2's class."""

from __future__ import annotations

from tests.zoo.checkpoint import MEMORY, Checkpoint
from tests.zoo.rows_llama import DEEPSEEK_TOKENS, DEEPSEEK_WORDS, ENDLESS, TT_METAL

QWEN_TOKENS = {151643: "<|endoftext|>", 151644: "<|im_start|>", 151645: "<|im_end|>", 151657: "<tool_call>",
               151658: "</tool_call>"}  # fmt: skip
QWEN_PLAIN = ("<tool_call>", "</tool_call>", "<think>", "</think>")
QWEN_WORDS = {
    "add_bos_token": False, "add_prefix_space": False, "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
    "bos_token": None, "clean_up_tokenization_spaces": False, "eos_token": "<|im_end|>", "errors": "replace",
    "model_max_length": 131072, "pad_token": "<|endoftext|>", "split_special_tokens": False,
    "tokenizer_class": "Qwen2Tokenizer", "unk_token": None,
}  # fmt: skip
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "attention_dropout": 0.0, "bos_token_id": 151643,
    "hidden_act": "silu", "initializer_range": 0.02, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "torch_dtype": "bfloat16", "transformers_version": "4.43.1", "use_cache": True, "use_sliding_window": False,
}  # fmt: skip
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "initializer_range": 0.02,
    "max_position_embeddings": 40960, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000,
    "sliding_window": None, "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True,
    "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
CHAT = {"bos_token_id": 151643, "pad_token_id": 151643, "do_sample": True, "eos_token_id": [151645, 151643]}
GENERATION = CHAT | {"repetition_penalty": 1.05, "temperature": 0.7, "top_p": 0.8, "top_k": 20,
                     "transformers_version": "4.37.0"}  # fmt: skip
QWEN3_GENERATION = CHAT | {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "transformers_version": "4.51.0"}
TOKENIZER = f"tokenizer and generation files: {MEMORY}"

ROWS = (
    Checkpoint(
        name="Qwen/Qwen2.5-0.5B-Instruct",
        config=QWEN2 | {
            "eos_token_id": 151645, "hidden_size": 896, "intermediate_size": 4864, "max_position_embeddings": 32768,
            "max_window_layers": 21, "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2,
            "sliding_window": 32768, "tie_word_embeddings": True, "vocab_size": 151936,
        },
        pieces="qwen2",
        tokens=QWEN_TOKENS,
        plain=QWEN_PLAIN,
        tokenizer_config=QWEN_WORDS,
        spare_rows=8,
        generation=GENERATION | {"repetition_penalty": 1.1},
        template="chatml-system",
        source=f"config.json as quoted in several public repositories; {TOKENIZER}",
    ),
    Checkpoint(
        name="Qwen/Qwen2.5-7B-Instruct",
        config=QWEN2 | {
            "eos_token_id": 151645, "hidden_size": 3584, "intermediate_size": 18944, "max_position_embeddings": 32768,
            "max_window_layers": 28, "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
            "sliding_window": 131072, "tie_word_embeddings": False, "vocab_size": 152064,
        },
        pieces="qwen2",
        tokens=QWEN_TOKENS,
        plain=QWEN_PLAIN,
        tokenizer_config=QWEN_WORDS,
        spare_rows=16,
        generation=GENERATION,
        template="chatml-system",
        shards=4,
        source=f"config.json {TT_METAL}/Qwen2.5-7B-Instruct; {TOKENIZER}",
    ),
    Checkpoint(
        name="Qwen/Qwen2.5-72B-Instruct",
        config=QWEN2 | {
            "eos_token_id": 151645, "hidden_size": 8192, "intermediate_size": 29568, "max_position_embeddings": 32768,
            "max_window_layers": 70, "num_attention_heads": 64, "num_hidden_layers": 80, "num_key_value_heads": 8,
            "sliding_window": 131072, "tie_word_embeddings": False, "vocab_size": 152064,
        },
        pieces="qwen2",
        tokens=QWEN_TOKENS,
        plain=QWEN_PLAIN,
        tokenizer_config=QWEN_WORDS,
        spare_rows=16,
        generation=GENERATION,
        template="chatml-system",
        shards=6,
        dim=4,
        source=f"widths, heads, depth, vocabulary: lists of public repositories; windows: {MEMORY}; {TOKENIZER}",
    ),
    Checkpoint(
        name="Qwen/Qwen3-0.6B",
        config=QWEN3 | {
            "hidden_size": 1024, "intermediate_size": 3072, "max_window_layers": 28, "num_attention_heads": 16,
            "num_hidden_layers": 28, "num_key_value_heads": 8, "tie_word_embeddings": True,
        },
        pieces="qwen2",
        tokens=QWEN_TOKENS | {151667: "<think>", 151668: "</think>"},
        plain=QWEN_PLAIN,
        tokenizer_config=QWEN_WORDS,
        spare_rows=8,
        generation=QWEN3_GENERATION,
        template="chatml-reasoning",
        source=f"fields as Qwen3-8B's; widths, heads, depth: {MEMORY}; {TOKENIZER}",
    ),
    Checkpoint(
        name="Qwen/Qwen3-8B",
        config=QWEN3 | {
            "hidden_size": 4096, "intermediate_size": 12288, "max_window_layers": 36, "num_attention_heads": 32,
            "num_hidden_layers": 36, "num_key_value_heads": 8, "tie_word_embeddings": False,
        },
        pieces="qwen2",
        tokens=QWEN_TOKENS | {151667: "<think>", 151668: "</think>"},
        plain=QWEN_PLAIN,
        tokenizer_config=QWEN_WORDS,
        spare_rows=8,
        generation=QWEN3_GENERATION,
        template="chatml-reasoning",
        shards=5,
        source=f"config.json {TT_METAL}/Qwen3-8B; head_dim and {TOKENIZER}",
    ),
    Checkpoint(
        name="deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
        config=QWEN2 | {
            "eos_token_id": 151643, "bos_token_id": 151643, "hidden_size": 3584, "intermediate_size": 18944,
            "max_position_embeddings": 131072, "max_window_layers": 28, "num_attention_heads": 28,
            "num_hidden_layers": 28, "num_key_value_heads": 4, "rope_theta": 10000, "sliding_window": 4096,
            "tie_word_embeddings": False, "transformers_version": "4.44.0", "use_mrope": False, "vocab_size": 152064,
        },
        pieces="qwen2",
        tokens={151643: DEEPSEEK_TOKENS["eos"], 151644: DEEPSEEK_TOKENS["user"], 151645: DEEPSEEK_TOKENS["assistant"],
                151646: DEEPSEEK_TOKENS["bos"], 151648: DEEPSEEK_TOKENS["think"], 151649: DEEPSEEK_TOKENS["thought"]},
        plain=tuple(DEEPSEEK_TOKENS[one] for one in ("user", "assistant", "think", "thought")),
        tokenizer_config=DEEPSEEK_WORDS,
        adds_bos=True,
        spare_rows=16,
        generation={"_from_model_config": True, "bos_token_id": 151646, "eos_token_id": 151643, "do_sample": True,
                    "temperature": 0.6, "top_p": 0.95, "transformers_version": "4.39.3"},
        template="full-width",
        shards=2,
        source="widths as Qwen2.5-7B; tokenizer_config.json: as quoted in public repositories for DeepSeek's; theta, "
        f"ids, windows: {MEMORY}",
    ),
    Checkpoint(
        name="Qwen/CodeQwen1.5-7B-Chat",
        config=QWEN2 | {
            "bos_token_id": 2, "eos_token_id": 4, "hidden_size": 4096, "intermediate_size": 13440,
            "max_position_embeddings": 65536, "max_window_layers": 28, "num_attention_heads": 32,
            "num_hidden_layers": 32, "num_key_value_heads": 4, "rms_norm_eps": 1e-05, "rope_theta": 1000000,
            "rotary_emb_base": 1000000, "seq_length": 65536, "sliding_window": 65536, "tie_word_embeddings": False,
            "transformers_version": "4.39.3", "vocab_size": 92416,
        },
        pieces="normaliser",
        tokens={0: "<unk>", 1: "<pad>", 2: "<|endoftext|>", 3: "<|im_start|>", 4: "<|im_end|>", 5: "<fim_prefix>"},
        tokenizer_config={
            "bos_token": "<|endoftext|>", "clean_up_tokenization_spaces": False, "eos_token": "<|im_end|>",
            "model_max_length": ENDLESS,
            "pad_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>",
        },
        spare_rows=4,
        generation={"do_sample": True, "eos_token_id": [2, 4], "pad_token_id": 1, "top_p": 0.95,
                    "transformers_version": "4.39.3"},
        template="chatml-system",
        shards=4,
        source="that the class is PreTrainedTokenizerFast over a tokenizer that is not Qwen's: QwenLM/Qwen3-Coder #77; "
        f"the rest {MEMORY}",
    ),
    Checkpoint(
        name="Qwen/Qwen3.5-9B",
        config={
            "architectures": ["Qwen3_5ForConditionalGeneration"], "image_token_id": 248056, "model_type": "qwen3_5",
            "text_config": {
                "attention_bias": False, "attention_dropout": 0.0, "attn_output_gate": True, "dtype": "bfloat16",
                "eos_token_id": 248044, "full_attention_interval": 4, "head_dim": 256, "hidden_act": "silu",
                "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 12288,
                "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 8, "linear_conv_kernel_dim": 4,
                "linear_key_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
                "linear_value_head_dim": 128, "max_position_embeddings": 262144, "mlp_only_layers": [],
                "model_type": "qwen3_5_text", "mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False,
                "num_attention_heads": 16, "num_hidden_layers": 32, "num_key_value_heads": 4, "rms_norm_eps": 1e-06,
                "use_cache": True, "vocab_size": 248320, "mamba_ssm_dtype": "float32",
                "rope_parameters": {"mrope_interleaved": True, "mrope_section": [11, 11, 10], "rope_type": "default",
                                    "rope_theta": 10000000, "partial_rotary_factor": 0.25},
            },
            "tie_word_embeddings": False, "transformers_version": "4.57.0.dev0", "video_token_id": 248057,
            "vision_config": {
                "deepstack_visual_indexes": [], "depth": 1, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 32,
                "in_channels": 3, "initializer_range": 0.02, "intermediate_size": 32, "model_type": "qwen3_5",
                "num_heads": 2, "num_position_embeddings": 16, "out_hidden_size": 512, "patch_size": 4,
                "spatial_merge_size": 2, "temporal_patch_size": 2,
            },
            "vision_end_token_id": 248054, "vision_start_token_id": 248053,
        },
        pieces="marks",
        tokens={248044: "<|endoftext|>", 248045: "<|im_start|>", 248046: "<|im_end|>", 248053: "<|vision_start|>",
                248054: "<|vision_end|>", 248056: "<|image_pad|>", 248057: "<|video_pad|>", 248068: "<think>",
                248069: "</think>"},
        plain=QWEN_PLAIN,
        tokenizer_config=QWEN_WORDS | {"model_max_length": 262144},
        spare_rows=8,
        template="chatml-reasoning",
        template_file=True,
        dim=32,
        overrides={"linear_key_head_dim": 16, "linear_value_head_dim": 16,
                   "rope_parameters": {"mrope_interleaved": True, "mrope_section": [2, 1, 1], "rope_type": "default",
                                       "rope_theta": 10000000, "partial_rotary_factor": 0.25}},
        source=f"config.json {TT_METAL}/Qwen3.5-9B, its vision tower cut to one small layer; that tokenizer.json and "
        "the class Qwen2Tokenizer cut combining marks differently: read in a public tokenizer's comments; the rest "
        f"{MEMORY}",
    ),
)  # fmt: skip
