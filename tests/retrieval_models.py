"""Tiny random checkpoints as Qwen3-Embedding and Qwen3-Reranker are published, and what transformers makes of them.

Not a test.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import tokenizers
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM, Qwen3Model

END = "<|endoftext|>"
SPECIAL = (END, "<|im_start|>", "<|im_end|>")
PLAIN = ("<think>", "</think>", "yes", "no")
INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
# The documentation of Qwen3-Reranker, written out.
BEFORE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
PAIR = "<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}"
BEHIND = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


def write_embedder(path: Path) -> Path:
    """Without a head, so without `model.` before its tensors' names; a token goes behind each text."""
    config = _config(tie_word_embeddings=False)
    _save(Qwen3Model(config), path)
    _tokenizer(path, processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 256)]))
    of = "sentence_transformers.models"
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    listed = [{"idx": i, "name": str(i), "path": p, "type": f"{of}.{kind}"} for i, (p, kind) in enumerate(modules)]
    (path / "modules.json").write_text(json.dumps(listed))
    (path / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": config.hidden_size, "include_prompt": True}
    modes = {f"pooling_mode_{mode}": mode == "lasttoken" for mode in ("cls_token", "mean_tokens", "lasttoken")}
    (path / "1_Pooling" / "config.json").write_text(json.dumps({**pooling, **modes}))
    prompts = {"query": f"Instruct: {INSTRUCTION}\nQuery:", "document": ""}
    about = {"prompts": prompts, "default_prompt_name": None, "similarity_fn_name": "cosine"}
    (path / "config_sentence_transformers.json").write_text(json.dumps(about))
    return path


def write_reranker(path: Path) -> Path:
    _save(Qwen3ForCausalLM(_config(tie_word_embeddings=True)), path)
    _tokenizer(path, None)
    return path


def token_ids(path: Path, text: str) -> list[int]:
    return tokenizers.Tokenizer.from_file(str(path / "tokenizer.json")).encode(text).ids


@torch.inference_mode()
def vectors(path: Path, prompts: Sequence[Sequence[int]], dimensions: int | None = None) -> torch.Tensor:
    """[prompts, dimensions] of length 1: the last position's."""
    model = Qwen3Model.from_pretrained(path, dtype=torch.float32)
    last = [model(torch.tensor([list(prompt)])).last_hidden_state[0, -1, :dimensions] for prompt in prompts]
    return torch.nn.functional.normalize(torch.stack(last), dim=-1)


def pair_ids(path: Path, query: str, document: str, instruction: str = INSTRUCTION) -> list[int]:
    pair = PAIR.format(instruction=instruction, query=query, document=document)
    return [token for text in (BEFORE, pair, BEHIND) for token in token_ids(path, text)]


@torch.inference_mode()
def scores(path: Path, prompts: Sequence[Sequence[int]]) -> list[float]:
    """How likely yes is, of yes and no."""
    model = Qwen3ForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = [token_ids(path, word)[0] for word in ("no", "yes")]
    logits = [model(torch.tensor([list(prompt)])).logits[0, -1, ids] for prompt in prompts]
    return [torch.log_softmax(pair, dim=-1)[1].exp().item() for pair in logits]


def _config(*, tie_word_embeddings: bool) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=272,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=1024,
        initializer_range=0.2,
        tie_word_embeddings=tie_word_embeddings,
        eos_token_id=256,
        bos_token_id=None,
    )


def _save(model: PreTrainedModel, path: Path) -> None:
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(path)


def _tokenizer(path: Path, post_processor: processors.PostProcessor | None) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in PLAIN])
    if post_processor is not None:
        backend.post_processor = post_processor
    backend.save(str(path / "tokenizer.json"))
