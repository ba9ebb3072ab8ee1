"""A random Qwen2 of single bytes with Qwen3's chat template: thinking, tools, and room for a prompt. Not a test."""

from __future__ import annotations

import json
from pathlib import Path

from tiny_model import write_tiny_model
from transformers import Qwen2Config, Qwen2ForCausalLM

TEMPLATE = Path(__file__).parents[1] / "unit" / "text" / "qwen3_chat_template.jinja"


def write_served_model(path: Path) -> Path:
    """All bytes are about as likely, and so is the end: what a grammar lets go on ends soon."""
    write_tiny_model(path)
    config = json.loads((path / "config.json").read_text()) | {"max_position_embeddings": 16_384}
    model = Qwen2ForCausalLM(Qwen2Config(**config))
    for parameter in model.parameters():
        parameter.data *= 0.3
    model.save_pretrained(path)
    (path / "chat_template.jinja").write_text(TEMPLATE.read_text())
    return path
