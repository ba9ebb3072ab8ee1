"""The offline door, on a tiny model with random weights: what goes in, what comes out, what is left behind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from qwen_ray import LLM, Grammar, SamplingParams, Settings
from qwen_ray.core.errors import ContextLengthExceeded, InvalidRequest, RequestFailed, SettingsError

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    "{% if enable_thinking is true %}<think>{% elif enable_thinking is false %}<think></think>{% endif %}"
)


def write_model(folder: Path, **more: int) -> Path:
    """A Qwen2 with one token for each byte, and two for thinking."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in ("<think>", "</think>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    config = {
        "model_type": "qwen2",
        "vocab_size": 258,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "torch_dtype": "float32",
        **more,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    path = write_model(tmp_path_factory.mktemp("model"))
    options = {"kv_cache_memory": "1MiB", "max_num_seqs": 4, "max_num_batched_tokens": 64, "max_num_waiting": 4}
    with LLM(str(path), load_format="dummy", **options) as made:
        yield made
        assert made.stats()[0].num_used_blocks == 0


def test_an_answer_follows_a_grammar(tmp_path: Path) -> None:
    path = write_model(tmp_path, eos_token_id=187)
    with LLM(str(path), load_format="dummy", kv_cache_memory="1MiB", max_num_seqs=4) as llm:
        params = [
            SamplingParams(seed=seed, max_tokens=20, grammar=Grammar(kind="regex", text=text))
            for seed, text in enumerate(["[0-9]{3}", "(ab){2,3}"])
        ]
        for output, pattern in zip(llm.generate(["x", "y"], params), ["[0-9]{3}", "(ab){2,3}"], strict=True):
            assert re.fullmatch(pattern, output.outputs[0].text)
            assert output.outputs[0].finish_reason == "stop"
        with pytest.raises(InvalidRequest, match="unclosed group"):
            llm.generate("x", SamplingParams(grammar=Grammar(kind="regex", text="(")))
        chat = llm.chat([{"role": "user", "content": "x"}], params[0], enable_thinking=False)
        assert re.fullmatch("[0-9]{3}", chat[0].outputs[0].text)


def test_a_grammar_needs_a_token_to_end_with(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="no token to end"):
        llm.generate("x", SamplingParams(grammar=Grammar(kind="json_object")))


def test_answers_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    prompts = ["abc", "Hello, world", "x" * 40]
    outputs = llm.generate(prompts, GREEDY)
    assert [output.prompt for output in outputs] == prompts
    assert [len(output.outputs[0].token_ids) for output in outputs] == [12] * 3
    for output in outputs:
        (answer,) = output.outputs
        assert answer.text == llm.tokenizer.decode(answer.token_ids)
        assert (answer.finish_reason, answer.stop_reason) == ("length", None)
        assert output.prompt_token_ids == tuple(llm.tokenizer.encode(output.prompt or ""))
        assert llm.generate(output.prompt or "", GREEDY)[0].outputs == output.outputs


def test_prompts_may_be_ids(llm: LLM) -> None:
    ids = llm.tokenizer.encode("abc")
    expected = llm.generate("abc", GREEDY)[0].outputs
    assert llm.generate(ids, GREEDY)[0].outputs == expected
    assert llm.generate([ids, "abc"], GREEDY)[0].prompt is None


def test_more_prompts_than_the_queue_holds(llm: LLM) -> None:
    outputs = llm.generate([f"prompt {i}" for i in range(13)], SamplingParams(max_tokens=3, n=2, ignore_eos=True))
    assert [len(answer.token_ids) for output in outputs for answer in output.outputs] == [3] * 26


def test_choices_differ_and_a_seed_repeats_them(llm: LLM) -> None:
    sampling = SamplingParams(n=3, seed=7, max_tokens=10, ignore_eos=True)
    (first,), (second,) = llm.generate("abc", sampling), llm.generate("abc", sampling)
    assert first.outputs == second.outputs
    assert [answer.index for answer in first.outputs] == [0, 1, 2]
    assert len({answer.token_ids for answer in first.outputs}) == 3


def test_a_stop_string_ends_the_text_before_it(llm: LLM) -> None:
    text = llm.generate("stop here", GREEDY)[0].outputs[0].text
    stop = text[4:6]
    (answer,) = llm.generate("stop here", SamplingParams(temperature=0, ignore_eos=True, stop=(stop,)))[0].outputs
    assert answer.text == text[: text.index(stop)]
    assert (answer.finish_reason, answer.stop_reason) == ("stop", stop)


def test_each_prompt_may_have_its_own_sampling(llm: LLM) -> None:
    many = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (1, 5)]
    assert [len(output.outputs[0].token_ids) for output in llm.generate(["a", "b"], many)] == [1, 5]
    with pytest.raises(InvalidRequest, match="1 prompts, but 2"):
        llm.generate(["a"], many)


def test_logprobs_of_output_and_prompt(llm: LLM) -> None:
    sampling = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logprobs=2, prompt_logprobs=1)
    (output,) = llm.generate("abcde", sampling)
    (answer,) = output.outputs
    assert [entry.token_id for entry in answer.logprobs] == list(answer.token_ids)
    assert all(entry.top[0] == (entry.token_id, entry.logprob) and len(entry.top) == 2 for entry in answer.logprobs)
    assert [entry.token_id for entry in output.prompt_logprobs] == list(output.prompt_token_ids[1:])


def test_chat_renders_the_template(llm: LLM) -> None:
    messages = [{"role": "user", "content": "hi"}]
    (output,) = llm.chat(messages, GREEDY)
    assert output.prompt == "<user>hi<a>"
    assert output.outputs == llm.generate("<user>hi<a>", GREEDY)[0].outputs
    assert [one.prompt for one in llm.chat([messages, messages], GREEDY)] == ["<user>hi<a>"] * 2


def test_a_stream_says_the_same_and_may_be_left(llm: LLM) -> None:
    whole = llm.generate("abc", GREEDY)[0].outputs[0].text
    assert "".join(llm.stream("abc", GREEDY)) == whole
    messages = [{"role": "user", "content": "hi"}]
    assert "".join(llm.stream(messages, GREEDY)) == llm.chat(messages, GREEDY)[0].outputs[0].text
    stream = llm.stream("abc", SamplingParams(max_tokens=100, ignore_eos=True))
    next(stream)
    stream.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert llm.generate("abc", GREEDY)[0].outputs[0].text == whole
    assert llm.stats()[0].num_running == 0


def test_thinking_stands_apart_in_a_chat_and_ends_with_its_budget(llm: LLM) -> None:
    messages = [{"role": "user", "content": "hi"}]
    sampling = SamplingParams(temperature=0, max_tokens=130, ignore_eos=True, thinking_budget=0)
    (output,) = llm.chat(messages, sampling, enable_thinking=True)
    (answer,) = output.outputs
    assert answer.reasoning.startswith("Considering the limited time")
    assert answer.text
    (alone,) = llm.generate(output.prompt or "", sampling)[0].outputs
    assert alone.token_ids == answer.token_ids
    assert alone.text == llm.tokenizer.decode(answer.token_ids)
    (answer,) = llm.chat(messages, GREEDY, enable_thinking=False)[0].outputs
    assert (answer.reasoning, answer.text) == ("", llm.tokenizer.decode(answer.token_ids))


def test_a_prompt_that_is_too_long_ends_the_call_and_nothing_else(llm: LLM) -> None:
    with pytest.raises(ContextLengthExceeded):
        llm.generate(["fine", "x" * 300], GREEDY)
    assert len(llm.generate("fine", GREEDY)) == 1
    assert llm.stats()[0].num_running == 0


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quantized_weights_are_few_and_answers_ignore_their_batch(
    tmp_path: Path, dtype: str, quantization: str
) -> None:
    path = write_model(tmp_path, hidden_size=128, intermediate_size=320)
    seen: list[tuple[int, int]] = []
    options = {"dtype": dtype, "quantization": quantization, "kv_cache_memory": "1MiB", "max_num_seqs": 4}
    prompts = ["abc", "Hello, world", "x" * 40]
    with LLM(str(path), load_format="dummy", on_progress=lambda what, *part: seen.append(part), **options) as llm:
        together = [output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY)]
        assert [llm.generate(prompt, GREEDY)[0].outputs[0].token_ids for prompt in prompts] == together
        held = llm.stats()[1].weights_bytes
    done, total = seen[-1]
    assert done == total
    itemsize = {"float32": 4, "bfloat16": 2}[dtype]
    assert held < total / itemsize * (1.1 if quantization == "int8" else 1.0)


def test_closed_is_closed(tmp_path: Path) -> None:
    llm = LLM(str(write_model(tmp_path)), load_format="dummy", kv_cache_memory="1MiB", max_num_seqs=2)
    llm.close()
    llm.close()
    with pytest.raises(RequestFailed):
        llm.generate("abc")


def test_spinning_is_bounded_unless_the_user_says_otherwise() -> None:
    script = "import os, qwen_ray; qwen_ray.LLM; print(os.environ.get('GOMP_SPINCOUNT'))"
    for given, expected in ({}, "20000"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None"), ({"GOMP_SPINCOUNT": "7"}, "7"):
        unset = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
        environment = {name: value for name, value in os.environ.items() if name not in unset} | given
        done = subprocess.run([sys.executable, "-c", script], env=environment, check=True, capture_output=True)
        assert done.stdout.decode().strip() == expected


def test_options_are_settings() -> None:
    with pytest.raises(SettingsError, match="colour"):
        LLM("demo", colour="red")
    with pytest.raises(SettingsError, match="dtype"):
        LLM("demo", dtype="int3")
    with pytest.raises(SettingsError, match="either"):
        LLM("demo", settings=Settings())
