"""Who thinks, how a prompt says so, and what of an answer was thought: Qwen3's template over tokens of single bytes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qwen_ray.core.errors import InvalidRequest
from qwen_ray.core.request import GenerateRequest, SamplingParams, TokenDelta
from qwen_ray.text.choice import Choice
from qwen_ray.text.tokenizer import Tokenizer
from qwen_ray.text.vocabulary import Vocabulary

QWEN3 = Path(__file__).with_name("qwen3_chat_template.jinja").read_text()
# As Qwen3-*-Thinking-2507 and QwQ end it.
ALWAYS = QWEN3.replace(
    "    {%- if enable_thinking is defined and enable_thinking is false %}\n"
    "        {{- '<think>\\n\\n</think>\\n\\n' }}\n    {%- endif %}\n",
    "    {{- '<think>\\n' }}\n",
)
QWEN25 = Path(__file__).with_name("qwen25_chat_template.jinja").read_text()
USER: dict[str, Any] = {"role": "user", "content": "Why? /think"}
THOUGHT: dict[str, Any] = {"role": "assistant", "content": "So.", "reasoning_content": "Hm,\n\nbecause."}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
CALLED: dict[str, Any] = {"role": "assistant", "content": "", "reasoning_content": "Ask f.", "tool_calls": [CALL]}
HISTORIES: dict[str, list[dict[str, Any]]] = {
    "one": [USER],
    "thought before": [USER, THOUGHT, USER],
    "thought last": [USER, THOUGHT],
    "tags in content": [USER, {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nSo."}, USER],
    "tools": [USER, CALLED, {"role": "tool", "content": "2"}],
}
END = 257


def backend(*, knows_tags: bool = True, special: bool = False) -> tokenizers.Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(text, special=True) for text in ("<|im_start|>", "<|im_end|>")])
    if knows_tags:
        made.add_tokens([AddedToken(text, special=special, normalized=False) for text in ("<think>", "</think>")])
    return made


def tokenizer(template: str = QWEN3, **options: bool) -> Tokenizer:
    vocabulary = Vocabulary(
        backend=backend(**options), eos_token_ids=(END,), chat_templates={"default": template}, special_tokens={}
    )
    return Tokenizer(vocabulary)


def starts_open(model: Tokenizer, messages: list[dict[str, Any]], **variables: Any) -> bool:
    prompt = model.encode(model.render_chat(messages, **variables), add_special_tokens=False)
    thinking = model.thinking_after(prompt)
    assert thinking is not None
    return thinking.starts_open


@pytest.mark.parametrize("messages", HISTORIES.values(), ids=HISTORIES)
@pytest.mark.parametrize("variables", [{}, {"enable_thinking": True}, {"enable_thinking": False}], ids=str)
def test_renders_as_transformers(messages: list[dict[str, Any]], variables: dict[str, Any]) -> None:
    reference: Any = PreTrainedTokenizerFast(tokenizer_object=backend(), chat_template=QWEN3)
    theirs = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **variables)
    ours = tokenizer().render_chat(messages, **variables)
    assert ours == theirs
    assert ours.endswith("<think>\n\n</think>\n\n") == (variables == {"enable_thinking": False})
    assert "Why? /think" in ours
    assert ("Hm" in ours) == (messages is HISTORIES["thought last"])
    assert ("Ask f." in ours) == (messages is HISTORIES["tools"])


def test_the_prompt_says_whether_thinking_has_begun() -> None:
    assert starts_open(tokenizer(ALWAYS), [USER])
    assert not starts_open(tokenizer(), [USER])
    assert not starts_open(tokenizer(), [USER], enable_thinking=False)
    said = {"role": "user", "content": "What does <think> mean? <think>"}
    assert not starts_open(tokenizer(), [said])
    assert not starts_open(tokenizer(), [{**said, "content": "<think>\n"}], add_generation_prompt=False)


@pytest.mark.parametrize(
    "model", [tokenizer(QWEN25), tokenizer(knows_tags=False), tokenizer("")], ids=["template", "vocabulary", "neither"]
)
def test_a_model_that_does_not_think(model: Tokenizer) -> None:
    assert model.thinking is None
    assert model.with_thinking(SamplingParams(), [1]) == SamplingParams()
    with pytest.raises(InvalidRequest, match="thinking_budget is 5, but this model does not think") as caught:
        model.with_thinking(SamplingParams(thinking_budget=5), [1])
    assert caught.value.param == "thinking_budget"
    text = "a <think>b</think> c"
    assert answer(model, text)[:2] == ("", text)


def answer(model: Tokenizer, text: str, *, size: int = 1, opened: bool = False, **params: Any) -> tuple[str, str, int]:
    """(reasoning, content, reasoning tokens) of `text` as an answer that comes `size` tokens at a time."""
    prompt = tuple(model.encode("Why?" + "<think>\n" * opened))
    sampling = model.with_thinking(SamplingParams(**params), prompt)
    request = GenerateRequest(request_id="r", prompt_token_ids=prompt, sampling=sampling, seed=1)
    choice = Choice(0, request, sampling.stop, model, splits_thinking=True)
    tokens = [*model.encode(text), END]
    pieces = [tuple(tokens[i : i + size]) for i in range(0, len(tokens), size)]
    deltas = [TokenDelta(request_id="r", token_ids=piece) for piece in pieces]
    deltas[-1] = replace(deltas[-1], finish_reason="stop", stop_token_id=END)
    reasoning = content = ""
    for delta in deltas:
        piece = choice.push(delta)
        reasoning, content = reasoning + piece.reasoning, content + piece.text
        if choice.finish_reason is not None:
            break
    return reasoning, content, choice.num_reasoning_tokens


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_answers_in_any_pieces(size: int) -> None:
    model = tokenizer()
    assert answer(model, "<think>\nHm 世.\n</think>\n\nSo 界.", size=size) == ("Hm 世.", "So 界.", 11)
    assert answer(model, "\nHm\n</think>\n\nSo", size=size, opened=True) == ("Hm", "So", 5)
    assert answer(model, "Hm", size=size, opened=True) == ("Hm", "", 3)  # it ends there, and that is a token too
    assert answer(model, "So", size=size) == ("", "So", 0)


def test_stop_strings_hold_in_both_and_may_be_tags() -> None:
    model = tokenizer()
    assert answer(model, "<think>a.b</think>c", stop=(".",)) == ("a", "", 3)
    assert answer(model, "<think>ab</think>c", stop=("</think>",)) == ("ab", "", 4)
    assert answer(model, "<think>ab</think>c.d", stop=(".",))[1] == "c"


def test_tags_are_seen_though_a_checkpoint_calls_them_special() -> None:
    assert answer(tokenizer(special=True), "<think>a</think>b") == ("a", "b", 3)


def test_without_splitting_everything_is_text() -> None:
    model = tokenizer()
    request = GenerateRequest(
        request_id="r", prompt_token_ids=(1,), sampling=model.with_thinking(SamplingParams(), (1,)), seed=1
    )
    choice = Choice(0, request, (), model)
    delta = TokenDelta(request_id="r", token_ids=tuple(model.encode("<think>a</think>b")), finish_reason="length")
    assert choice.push(delta).text == "<think>a</think>b"
    assert choice.num_reasoning_tokens == 0


def test_what_is_split_and_sent_back_is_the_prompt_that_the_model_wrote() -> None:
    model = tokenizer()
    text = "<think>\nHm.\n\nYes.\n</think>\n\nSo.\n"
    reasoning, content, _ = answer(model, text)
    said = {"role": "assistant", "content": content, "reasoning_content": reasoning}
    again = model.render_chat([USER, said], add_generation_prompt=False)
    assert again == model.render_chat([USER]) + text + "<|im_end|>\n"


def test_the_ending_of_a_spent_budget_ends_the_block() -> None:
    model = tokenizer()
    thinking = model.thinking
    assert thinking is not None
    assert thinking.ending.count(thinking.end_id) == 1
    text = "<think>Hm" + model.decode(thinking.ending) + "So."
    reasoning, content, _ = answer(model, text)
    assert reasoning.startswith("Hm\n\nConsidering the limited time by the user")
    assert content == "So."
