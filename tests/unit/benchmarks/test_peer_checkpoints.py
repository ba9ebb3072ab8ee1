"""What the servers are given: a checkpoint that transformers reads whole, and its quantized form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from benchmarks.peers import checkpoint, compressed_tensors
from benchmarks.peers.tokenizer import byte_characters, vocabulary_and_merges
from benchmarks.shapes import DENSE, MOE

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "max_window_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    "config", [{**DENSE, **SMALL, **HEADS}, {**MOE, **SMALL, **HEADS, "head_dim": 8, "moe_intermediate_size": 16}]
)
def test_names_and_shapes_are_those_that_transformers_reads(
    config: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "write_tokenizer", lambda folder: None)
    checkpoint.write(config, tmp_path / "model")
    _, told = transformers.AutoModelForCausalLM.from_pretrained(
        str(tmp_path / "model"), output_loading_info=True, dtype=torch.bfloat16
    )
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_the_same_seed_gives_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "write_tokenizer", lambda folder: None)
    read: list[dict[str, torch.Tensor]] = []
    for name in ("a", "b"):
        checkpoint.write({**DENSE, **SMALL, **HEADS}, tmp_path / name)
        read.append(load_file(tmp_path / name / "model.safetensors"))
    assert all(torch.equal(read[0][name], read[1][name]) for name in read[0])
    assert read[0]["model.embed_tokens.weight"].float().std().item() == pytest.approx(0.02, rel=0.1)


def test_the_parameters_are_those_of_the_true_shapes() -> None:
    counts = [sum(torch.Size(shape).numel() for _, shape in checkpoint.parameters(c)) for c in (DENSE, MOE)]
    assert counts == [494_032_768, 2_032_062_464]


def _unpacked(words: torch.Tensor) -> torch.Tensor:
    nibbles = (words.to(torch.int64).unsqueeze(-1) >> (4 * torch.arange(8))) & 15
    return nibbles.flatten(1) - 8


def test_quantized_weights_are_near_the_stored_ones(tmp_path: Path) -> None:
    weight = torch.empty(16, 256).normal_(generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text("{}")
    (source / "tokenizer.json").write_text("{}")
    save_file({"a.q_proj.weight": weight, "norm.weight": weight[0].clone()}, source / "model.safetensors")
    for precision, bits, most in (("int8", 8, 0.02), ("int4", 4, 0.3)):
        folder = tmp_path / precision
        compressed_tensors.write(source, folder, precision)
        stored = load_file(folder / "model.safetensors")
        scale = stored["a.q_proj.weight_scale"].float()
        if precision == "int8":
            read = stored["a.q_proj.weight"].float() * scale
        else:
            read = _unpacked(stored["a.q_proj.weight_packed"]).float() * scale.repeat_interleave(128, 1)
            assert stored["a.q_proj.weight_shape"].tolist() == [16, 256]
        assert (read - weight.float()).abs().max() < most
        assert torch.equal(stored["norm.weight"], weight[0])
        config = json.loads((folder / "config.json").read_text())["quantization_config"]
        assert config["config_groups"]["group_0"]["weights"]["num_bits"] == bits
        assert (folder / "tokenizer.json").exists()


def test_merges_are_recovered_from_ranks() -> None:
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"ab": 256, b"abc": 257, b" ab": 258}
    vocabulary, merges = vocabulary_and_merges(ranks)
    assert merges == [("a", "b"), ("ab", "c"), ("Ġ", "ab")]
    assert vocabulary["Ġab"] == 258
    assert len(vocabulary) == 259
    assert len(set(byte_characters())) == 256
