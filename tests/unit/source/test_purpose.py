"""What a checkpoint is for, by the files of sentence-transformers beside it, and by GGUF's metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from qwen_ray.core.errors import CheckpointError
from qwen_ray.source.purpose import load_purpose

OF = "sentence_transformers.models"
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": f"{OF}.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{OF}.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": f"{OF}.Normalize"},
]
LAST = {"word_embedding_dimension": 8, "pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True}
ABOUT = {"prompts": {"query": "Q:", "document": ""}, "default_prompt_name": "query"}


def write(folder: Path, modules: Any = MODULES, pooling: Any = LAST, about: Any = ABOUT) -> Path:
    (folder / "1_Pooling").mkdir()
    for name, value in (
        ("modules.json", modules),
        ("1_Pooling/config.json", pooling),
        ("config_sentence_transformers.json", about),
    ):
        if value is not None:
            (folder / name).write_text(json.dumps(value))
    return folder


def write_gguf(folder: Path, pooling_type: int | None) -> Path:
    writer = gguf.GGUFWriter(folder / "model.gguf", "qwen3")
    if pooling_type is not None:
        writer.add_uint32("qwen3.pooling_type", pooling_type)
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "model.gguf"


def test_an_embedding_model_with_its_prompts(tmp_path: Path) -> None:
    purpose = load_purpose(write(tmp_path))
    assert purpose.task == "embed"
    assert purpose.embedding.normalizes
    assert purpose.embedding.prompts == {"query": "Q:", "document": ""}
    assert purpose.embedding.default_prompt_name == "query"
    assert load_purpose(tmp_path, "embed") == purpose
    assert load_purpose(tmp_path, "generate").task == "generate"


def test_spellings_of_other_versions(tmp_path: Path) -> None:
    modules = [{**module, "type": module["type"].replace("models", "base.modules")} for module in MODULES[:2]]
    purpose = load_purpose(write(tmp_path, modules, {"pooling_mode": "lasttoken"}, None))
    assert (purpose.task, purpose.embedding.normalizes, purpose.embedding.prompts) == ("embed", False, {})


def test_without_such_files_a_model_generates_unless_told(tmp_path: Path) -> None:
    assert load_purpose(tmp_path).task == "generate"
    assert load_purpose(tmp_path, "embed").task == "embed"
    assert load_purpose(tmp_path, "embed").embedding.normalizes
    assert load_purpose(tmp_path, "score").task == "score"


def test_a_reranker_scores(tmp_path: Path) -> None:
    modules = [MODULES[0], {"path": "1_LogitScore", "type": "sentence_transformers.cross_encoder.modules.LogitScore"}]
    assert load_purpose(write(tmp_path, modules)).task == "score"
    assert load_purpose(tmp_path, "embed").task == "embed"


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"pooling": {"pooling_mode_mean_tokens": True}}, "mean_tokens; served is lasttoken"),
        ({"pooling": {**LAST, "pooling_mode_mean_tokens": True}}, "served is lasttoken"),
        ({"pooling": {}}, "by nothing"),
        ({"pooling": None}, "No such file"),
        ({"pooling": []}, "not a JSON object"),
        ({"modules": [*MODULES, {"path": "2_Dense", "type": f"{OF}.Dense"}]}, "a module Dense is not served"),
        ({"modules": {"a": 1}}, "list of objects"),
        ({"modules": 5}, "list of objects"),
        ({"about": {"prompts": {"query": 5}}}, "prompts must be texts"),
        ({"about": {"prompts": {}, "default_prompt_name": "query"}}, "no such prompt"),
    ],
)
def test_what_would_be_served_wrongly_is_refused(tmp_path: Path, files: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        load_purpose(write(tmp_path, **files))


def test_gguf_says_how_it_pools(tmp_path: Path) -> None:
    assert load_purpose(write_gguf(tmp_path, 3)).task == "embed"
    assert load_purpose(write_gguf(tmp_path, None)).task == "generate"
    assert load_purpose(write_gguf(tmp_path, 3), "generate").task == "generate"
    with pytest.raises(CheckpointError, match="pooling_type is 1"):
        load_purpose(write_gguf(tmp_path, 1))
