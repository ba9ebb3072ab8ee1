from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tiktoken
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers

from qwen_ray.core.errors import CheckpointError
from qwen_ray.text.tokenizer import Tokenizer

SCRIPTS = st.sampled_from("abz ABZ019\n\t'sdll.,!_你好ह़ำน้ع٣½²👩‍👧️é\u0301Ω𝔘\x00\ufffd")
texts = st.text(max_size=40) | st.text(SCRIPTS, max_size=40)
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quick
@given(text=texts)
def test_qwen_ids_are_those_of_the_reference_encoder(
    qwen: Tokenizer, qwen_reference: tiktoken.Encoding, text: str
) -> None:
    normal = normalizers.NFC().normalize_str(text)
    assert qwen.encode(text) == qwen_reference.encode(normal, allowed_special="all")
    assert qwen.decode(qwen.encode(text)) == normal


def test_special_tokens_in_a_text_become_their_ids(qwen: Tokenizer) -> None:
    ids = qwen.encode("<|im_start|>user\nhi<|im_end|><tool_call>")
    assert [ids[0], *ids[-2:]] == [151644, 151645, 151657]
    assert qwen.decode(ids) == "user\nhi<tool_call>"
    assert qwen.decode(ids, skip_special_tokens=False) == "<|im_start|>user\nhi<|im_end|><tool_call>"


def test_directory_facts(qwen: Tokenizer) -> None:
    assert qwen.eos_token_ids == (151645, 151643)
    assert qwen.vocab_size == 151665
    assert 151643 in qwen.special_token_ids
    assert 151657 not in qwen.special_token_ids


def test_tokens_have_their_bytes(qwen: Tokenizer, qwen_ranks: dict[bytes, int]) -> None:
    assert all(qwen.token_bytes(rank) == token for token, rank in list(qwen_ranks.items())[::10])


def test_lone_surrogates_are_replaced(qwen: Tokenizer) -> None:
    assert qwen.decode(qwen.encode("a\ud800b\udfff\ud83d\ude00")) == "a\ufffdb\ufffd😀"


def test_ids_outside_the_vocabulary_are_empty(qwen: Tokenizer) -> None:
    assert qwen.decode([-1, 151935, 2**40, *qwen.encode("x")]) == "x"


@quick
@given(data=st.data())
def test_decoding_any_ids_equals_the_library(small: Tokenizer, small_backend: Backend, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, small_backend.get_vocab_size() - 1), max_size=30))
    for skip in (True, False):
        assert small.decode(ids, skip_special_tokens=skip) == small_backend.decode(ids, skip_special_tokens=skip)


def test_threads_share_one_tokenizer(qwen: Tokenizer) -> None:
    words = [f"number {i} 你好 {'x' * i}" for i in range(64)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda word: qwen.decode(qwen.encode(word)), words * 4)) == words * 4


def test_truncation_and_padding_in_the_file_are_ignored(small_backend: Backend, tmp_path: Path) -> None:
    spec = json.loads(small_backend.to_str())
    spec["truncation"] = {"max_length": 2, "stride": 0, "strategy": "LongestFirst", "direction": "Right"}
    spec["padding"] = {
        "strategy": {"Fixed": 50},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|begin|>",
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    text = "one two three four"
    assert Tokenizer.load(tmp_path).encode(text) == small_backend.encode(text).ids


def test_end_token_falls_back_to_the_tokenizers_own(small_backend: Backend, tmp_path: Path) -> None:
    small_backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|end|>"}}))
    assert Tokenizer.load(tmp_path).eos_token_ids == (1,)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert Tokenizer.load(tmp_path).eos_token_ids == (7,)


def test_sentencepiece_bytes(tmp_path: Path) -> None:
    vocabulary = {token: i for i, token in enumerate(["<unk>", "▁", "a", "▁a", *(f"<0x{b:02X}>" for b in range(256))])}
    backend = Backend(models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.decode(tokenizer.encode("a a你")) == "a a你"
    assert tokenizer.token_bytes(4 + 0xE4) == b"\xe4"


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "no tokenizer.json"), ("{", "not a tokenizer"), ('{"version": "1.0"}', "not a tokenizer")],
)
def test_a_directory_without_a_tokenizer_is_an_error(tmp_path: Path, content: str | None, says: str) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=says):
        Tokenizer.load(tmp_path)


def test_broken_config_names_the_file(small_backend: Backend, tmp_path: Path) -> None:
    small_backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: not a JSON object"):
        Tokenizer.load(tmp_path)


def test_dummy_weights_need_no_tokenizer_and_speak_bytes(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)
    tokenizer = Tokenizer.load(tmp_path, "dummy")
    text = "Grüße, 世界 🌍\n"
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(text.encode()) == text
    assert tokenizer.render_chat([{"role": "user", "content": "hi"}]) == "user: hi\nassistant: "
