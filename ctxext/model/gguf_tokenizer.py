"""Turns the tokenizer of a GGUF file into a tokenizer.json: byte-level BPE, or SentencePiece's BPE.

A GGUF file only names the pattern that splits text before BPE (tokenizer.ggml.pre). The patterns here are those of
the tokenizer.json files that the models were published with. Any other name raises an error, because another split
gives other ids. For settings that the file omits, the code uses llama.cpp's defaults (src/llama-vocab.cpp): BOS is
added for SentencePiece, Llama 3 and tekken unless the file says no. A second chat template is not read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ctxext.errors import ModelError
from ctxext.model.gguf_header import read_header
from ctxext.model.model_config import ModelConfig
from ctxext.model.tokenizer import load_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # tokenizer.ggml.token_type
SPACE = "\u2581"
KEYS = "tokenizer.ggml."
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
SPLITS = {
    "llama-bpe": WORDS + r"\p{N}{1,3}" + REST,
    "qwen2": WORDS + r"\p{N}" + REST,
    "tekken": rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
SAME = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "smaug-bpe": "llama-bpe", "deepseek-r1-qwen": "qwen2"}
WHOLE = ("llama-bpe", "tekken")  # a piece that is in the vocabulary becomes that token without any merges
ADDS_BOS = ("llama-bpe", "tekken")
PRE = (*SPLITS, *SAME, "gpt-2", "smollm")
SAMPLE = "Zwölf Boxkämpfer jagen Viktor, 42 × 3.14  =  131.88!\n\tdef f(x): return x  # 你好 мир 🙂 e\u0301\n"


def write_tokenizer(file: Path, directory: Path, config: ModelConfig) -> None:
    """Writes tokenizer.json, tokenizer_config.json and the chat template of a GGUF file into a directory.

    Raises ModelError for a vocabulary that cannot be read, for more tokens than the embedding has rows, and if the
    written files give other ids than the tokenizer that was built.
    """
    header = read_header(file, (f"{KEYS}tokens", f"{KEYS}merges"))
    settings = {key.removeprefix(KEYS): value for key, value in header.metadata.items() if key.startswith(KEYS)}
    # Check the vocabulary first: each token needs a type and an embedding row, and no token may occur twice.
    tokens, kinds = settings.get("tokens"), settings.get("token_type")
    if not isinstance(tokens, list) or not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise ModelError(f"{file}: it has no vocabulary (tokenizer.ggml.tokens and token_type)")
    if len(tokens) > config.shape.vocab_size:
        raise ModelError(f"{file}: {len(tokens):,} tokens, the embedding has {config.shape.vocab_size:,} rows")
    if len(set(tokens)) != len(tokens):
        raise ModelError(f"{file}: its vocabulary lists a token twice")
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if settings.get("model") not in builders:
        raise ModelError(f"{file}: a tokenizer of type {settings.get('model')!r}; supported are {', '.join(builders)}")
    built = builders[settings["model"]](file, settings)
    # Tokens that text matches before BPE: control and unknown tokens as special tokens, user-defined ones as plain
    # added tokens. All are in the vocabulary already, so their ids do not change.
    for special in (True, False):
        wanted = (CONTROL, UNKNOWN) if special else (USER_DEFINED,)
        added = [
            AddedToken(token, normalized=False, special=special)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind in wanted
        ]
        (built.add_special_tokens if special else built.add_tokens)(added)
    names = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "unk_token": "unknown_token_id",
             "pad_token": "padding_token_id"}  # fmt: skip
    special = {name: tokens[settings[key]] for name, key in names.items() if type(settings.get(key)) is int and
            0 <= settings[key] < len(tokens)}  # fmt: skip
    # BOS and EOS go into the post-processor, because transformers 5 ignores add_bos_token next to a tokenizer.json.
    _add_ends(file, built, settings, special)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=built, clean_up_tokenization_spaces=False, **special)
    wrapped.chat_template = header.metadata.get("tokenizer.chat_template")
    wrapped.save_pretrained(directory)
    _check(file, directory, built)


def _check(file: Path, directory: Path, built: Tokenizer) -> None:
    # Open the written files in the same way as any model directory, with and without BOS and EOS.
    again = load_tokenizer(directory)
    for special in (True, False):
        if (
            list(again(SAMPLE, add_special_tokens=special)["input_ids"])
            != built.encode(SAMPLE, None, False, special).ids
        ):
            raise ModelError(f"{file}: its tokenizer, written and opened again by transformers, gives other ids")


def _byte_level(file: Path, settings: dict[str, Any]) -> Tokenizer:
    pre = settings.get("pre")
    if pre not in PRE:
        raise ModelError(
            f"{file}: tokenizer.ggml.pre {pre!r}: unknown way to split text; supported are {', '.join(PRE)}",
            hint="give the model's original directory, or make the file again with a newer llama.cpp",
        )
    # Some names are aliases of the same pattern.
    pre = SAME.get(pre, pre)
    merges = [tuple(merge.split(" ")) for merge in settings.get("merges") or ()]
    if not merges or any(len(pair) != 2 for pair in merges):
        raise ModelError(f"{file}: it has no merges (tokenizer.ggml.merges)")
    vocabulary = {token: number for number, token in enumerate(settings["tokens"])}
    try:
        built = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre in WHOLE))
    except Exception as error:  # the library raises bare Exception for a merge whose tokens are not in the vocabulary
        raise ModelError(f"{file}: its merges do not fit its tokens ({error})") from None
    # With a pattern of its own the text is split before ByteLevel; otherwise ByteLevel splits with GPT-2's pattern,
    # after smollm has split digits.
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre not in SPLITS)
    if pre in SPLITS:
        first: Any = pre_tokenizers.Split(Regex(SPLITS[pre]), behavior="isolated")
        built.pre_tokenizer = pre_tokenizers.Sequence([first, byte_level])
    elif pre == "smollm":
        built.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    else:
        built.pre_tokenizer = byte_level
    # The alias deepseek-r1-qwen has qwen2's pattern but no normaliser.
    if settings["pre"] == "qwen2":
        built.normalizer = normalizers.NFC()
    built.decoder = decoders.ByteLevel()
    return built


def _sentencepiece(file: Path, settings: dict[str, Any]) -> Tokenizer:
    tokens, scores = settings["tokens"], settings.get("scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise ModelError(f"{file}: it has no scores (tokenizer.ggml.scores)")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    # SentencePiece merges the pair whose result has the best score, so a merge has the rank of its result.
    ranked = sorted((number for number, kind in enumerate(settings["token_type"]) if kind == NORMAL),
                    key=lambda number: -scores[number])  # fmt: skip
    # A token has one merge for each way to cut it into two tokens of the vocabulary.
    merges = [
        (token[:cut], token[cut:])
        for token in (tokens[number] for number in ranked)
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    unknown = settings.get("unknown_token_id")
    unk = tokens[unknown] if type(unknown) is int and 0 <= unknown < len(tokens) else None
    built = Tokenizer(models.BPE(vocabulary, merges, unk_token=unk, fuse_unk=True, byte_fallback=True))
    # The prefix space that the normaliser adds is removed again by the decoder.
    spaces = normalizers.Replace(" ", SPACE)
    prefix = settings.get("add_space_prefix", True)
    built.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefix else spaces
    parts = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    built.decoder = decoders.Sequence([*parts, *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    return built


def _add_ends(file: Path, built: Tokenizer, settings: dict[str, Any], special: dict[str, str]) -> None:
    """Makes the tokenizer add BOS and EOS to a text if the file says so; if it says nothing, as llama.cpp does."""
    pre = SAME.get(settings.get("pre", ""), settings.get("pre"))
    bos = settings.get("add_bos_token", settings["model"] == "llama" or pre in ADDS_BOS)
    ends = {"bos_token": bool(bos), "eos_token": bool(settings.get("add_eos_token", False))}
    for name, wanted in ends.items():
        if wanted and name not in special:
            raise ModelError(f"{file}: it adds a {name} to every text but does not name the token")
    begin, end = (special[name] if wanted else None for name, wanted in ends.items())
    if begin is None and end is None:
        return
    # The pair template repeats BOS and EOS around the second text, with type id 1.
    single = " ".join([*([begin] if begin else []), "$A", *([end] if end else [])])
    pair = f"{single} " + " ".join([*([f"{begin}:1"] if begin else []), "$B:1", *([f"{end}:1"] if end else [])])
    special = [(token, built.token_to_id(token)) for token in dict.fromkeys((begin, end)) if token is not None]
    built.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=special)
