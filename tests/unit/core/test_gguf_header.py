from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from qwen_ray.core.errors import CheckpointError
from qwen_ray.core.gguf_header import read_gguf_header


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_bool("a.bool", True)
    writer.add_int8("a.int8", -3)
    writer.add_uint64("a.uint64", 2**40)
    writer.add_float32("a.float", 0.5)
    writer.add_float64("a.double", 1e300)
    writer.add_string("a.string", "naïve 你好")
    writer.add_array("a.strings", ["x", "", "é"])
    writer.add_array("a.ints", [1, -2, 3])
    writer.add_array("a.floats", [0.25, 4.0])
    writer.add_uint32("tokenizer.ggml.eos_token_id", 7)
    writer.add_uint32("tokenizer.ggml.eot_token_id", 9)
    writer.add_uint32("tokenizer.ggml.eom_token_id", 7)
    writer.add_tensor("first.weight", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("second.weight", np.arange(5, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_metadata_is_what_was_written(path: Path) -> None:
    metadata = read_gguf_header(path).metadata
    assert metadata["general.architecture"] == "llama"
    assert {key: value for key, value in metadata.items() if key.startswith("a.")} == {
        "a.bool": True,
        "a.int8": -3,
        "a.uint64": 2**40,
        "a.float": 0.5,
        "a.double": 1e300,
        "a.string": "naïve 你好",
        "a.strings": ["x", "", "é"],
        "a.ints": [1, -2, 3],
        "a.floats": [0.25, 4.0],
    }
    assert read_gguf_header(path).eos_token_ids == (7, 9)


def test_tensors_lie_where_the_library_finds_them(path: Path) -> None:
    ours = read_gguf_header(path).tensors
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert ours.keys() == theirs.keys()
    assert {name: tensor.start for name, tensor in ours.items()} == {n: t.data_offset for n, t in theirs.items()}
    assert {name: tensor.type for name, tensor in ours.items()} == {n: int(t.tensor_type) for n, t in theirs.items()}
    assert ours["first.weight"].shape == (2, 3)
    first = np.frombuffer(path.read_bytes(), np.float32, count=6, offset=ours["first.weight"].start)
    assert first.tolist() == [0, 1, 2, 3, 4, 5]


def test_a_file_cut_off_anywhere_in_its_header_is_an_error(path: Path, tmp_path: Path) -> None:
    whole = path.read_bytes()
    header = read_gguf_header(path)
    end = max(whole.rfind(name.encode()) for name in header.tensors) + len("second.weight")
    cut = tmp_path / "cut.gguf"
    for length in range(0, end, 7):
        cut.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"cut\.gguf: not a readable GGUF file"):
            read_gguf_header(cut)


@pytest.mark.parametrize(
    ("start", "replacement", "says"),
    [
        (0, b"GGML", "does not begin with 'GGUF'"),
        (4, b"\x01\x00\x00\x00", "version 1"),
        (4, b"\x00\x00\x00\x03", "version 50331648"),
        (16, b"\xff" * 8, "not a readable"),
        (24, b"\xff" * 8, "runs over the end"),
    ],
)
def test_damage_is_an_error(path: Path, start: int, replacement: bytes, says: str) -> None:
    data = bytearray(path.read_bytes())
    data[start : start + len(replacement)] = replacement
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=says):
        read_gguf_header(path)


def test_no_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        read_gguf_header(tmp_path / "none.gguf")
