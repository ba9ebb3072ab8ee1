"""Fill-in-the-middle: exactly the tokens of Qwen2.5-Coder's documentation."""

from __future__ import annotations

from qwen_ray.text.tokenizer import Tokenizer

BEFORE = "def quicksort(arr):\n    if len(arr) <= 1:\n        return arr\n    pivot = arr[len(arr) // 2]\n    "
AFTER = "\n    middle = [x for x in arr if x == pivot]\n    return quicksort(left) + middle + quicksort(right)"


def test_the_prompt_is_that_of_the_documentation(qwen: Tokenizer) -> None:
    fill_in = qwen.fill_in
    assert fill_in is not None
    prompt = fill_in.prompt(qwen.encode(BEFORE), qwen.encode(AFTER))
    assert prompt == qwen.encode(f"<|fim_prefix|>{BEFORE}<|fim_suffix|>{AFTER}<|fim_middle|>")
    assert (prompt[0], prompt[-1]) == (151659, 151660)
    assert prompt.count(151661) == 1


def test_what_ends_an_answer(qwen: Tokenizer) -> None:
    assert qwen.fill_in is not None
    assert set(qwen.fill_in.end_ids) == {151643, 151645, *range(151659, 151665)}


def test_a_vocabulary_without_the_tokens(small: Tokenizer) -> None:
    assert small.fill_in is None
