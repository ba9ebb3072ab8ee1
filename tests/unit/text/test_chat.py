from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from qwen_ray.core.errors import CheckpointError, InvalidRequest
from qwen_ray.text.chat import ChatTemplate, Conversation
from qwen_ray.text.tokenizer import Tokenizer

DEMO_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather in <a city> & more, 天气",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
CALL = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "北京 <b>"}}}
CHATS: dict[str, list[dict[str, Any]]] = {
    "user": [{"role": "user", "content": "What's <|im_end|> the capital of France?"}],
    "system": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi\n "}],
    "turns": [
        {"role": "user", "content": "hi", "name": None},
        {"role": "assistant", "content": "  hello  "},
        {"role": "user", "content": "你好"},
    ],
}
TOOL_CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    {"role": "tool", "tool_call_id": "c2", "content": "rain"},
]


@pytest.fixture(scope="module")
def reference(small_backend: Backend) -> Any:
    return PreTrainedTokenizerFast(
        tokenizer_object=Backend.from_str(small_backend.to_str()),
        bos_token="<|begin|>",
        eos_token="<|im_end|>",
        extra_special_tokens=["<|im_start|>"],
        chat_template=Path(__file__).with_name("qwen25_chat_template.jinja").read_text(),
    )


@pytest.fixture(scope="module")
def tokenizer(reference: Any, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Ours, from the directory that transformers writes."""
    folder = tmp_path_factory.mktemp("saved")
    reference.save_pretrained(folder)
    return Tokenizer.load(folder)


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS)
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["plain", "tools"])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_qwen_as_transformers(
    tokenizer: Tokenizer, reference: Any, chat: list[dict[str, Any]], tools: Any, add_generation_prompt: bool
) -> None:
    ours = tokenizer.render_chat(chat, tools, add_generation_prompt)
    theirs = {"tools": tools, "add_generation_prompt": add_generation_prompt}
    assert ours == reference.apply_chat_template(chat, tokenize=False, **theirs)
    ids = reference.apply_chat_template(chat, **theirs)["input_ids"]
    assert tokenizer.encode(ours, add_special_tokens=False) == ids


def test_tool_calls_as_transformers_whether_arguments_are_an_object_or_a_string(
    tokenizer: Tokenizer, reference: Any
) -> None:
    theirs = reference.apply_chat_template(TOOL_CHAT, tools=TOOLS, tokenize=False, add_generation_prompt=True)
    assert tokenizer.render_chat(TOOL_CHAT, TOOLS) == theirs
    assert '{"city": "北京 <b>"}' in theirs
    text_call = {**CALL, "function": {"name": "get_weather", "arguments": '{"city": "北京 <b>"}'}}
    chat = [TOOL_CHAT[0], {**TOOL_CHAT[1], "tool_calls": [text_call, text_call]}, *TOOL_CHAT[2:]]
    assert tokenizer.render_chat(chat, TOOLS) == theirs
    assert chat[1]["tool_calls"] == [text_call, text_call]


@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS)
def test_demo_as_transformers(reference: Any, chat: list[dict[str, Any]]) -> None:
    theirs = reference.apply_chat_template(
        chat, chat_template=DEMO_TEMPLATE, tokenize=False, add_generation_prompt=True
    )
    assert ChatTemplate({"default": DEMO_TEMPLATE}, {}).render(chat) == theirs


def test_what_templates_may_use_renders_as_in_transformers(reference: Any) -> None:
    template = """
    {%- for m in messages %}
        {%- if loop.index > 2 %}{% break %}{% endif %}
        {% generation %}
    {{ m.content | tojson(indent=2) }}
        {% endgeneration %}
    {%- endfor %}
    {%- set ns = namespace(x=1) %}{% set ns.x = 2 %}{{ ns.x }}{{ eos_token }}{{ flag }}
    {{ strftime_now("%Y") | length }}
    """
    ours = ChatTemplate({"default": template}, {"eos_token": "<|im_end|>"})
    theirs = reference.apply_chat_template(CHATS["turns"], chat_template=template, tokenize=False, flag=True)
    assert ours.render(CHATS["turns"], add_generation_prompt=False, flag=True) == theirs


def test_the_last_message_stays_open(tokenizer: Tokenizer) -> None:
    said = [*user("hi"), {"role": "assistant", "content": " So <|im_end|> I \n"}]
    whole = tokenizer.render_chat(said, add_generation_prompt=False)
    opened = tokenizer.render_chat(said, add_generation_prompt=False, continue_final_message=True)
    assert opened.endswith("assistant\n So <|im_end|> I \n")
    assert whole == opened + "<|im_end|>\n"
    hidden = ChatTemplate({"default": "{{ messages[0].content }}"}, {})
    with pytest.raises(InvalidRequest, match="does not show the last message"):
        hidden.render(said, continue_final_message=True)


def test_how_much_work_a_conversation_is() -> None:
    short = Conversation(messages=user("hi"))
    assert short.num_characters < 10
    assert Conversation(messages=user("x" * 5000)).num_characters > 5000
    assert Conversation(messages=user("hi"), tools=TOOLS).num_characters > 2**16  # nobody has counted its description
    assert Conversation(messages=TOOL_CHAT).num_characters > 2**17


def test_content_parts_become_text(tokenizer: Tokenizer) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert tokenizer.render_chat(user(parts)) == tokenizer.render_chat(user("one\ntwo"))


def test_reasoning_goes_by_either_name() -> None:
    template = ChatTemplate({"default": "{{ messages[0].reasoning_content }}"}, {})
    assert template.render([{"role": "assistant", "reasoning": "hm"}]) == "hm"


def test_a_template_of_its_own_for_tools() -> None:
    template = ChatTemplate({"default": "plain", "tool_use": "tools"}, {})
    assert [template.render(user("x")), template.render(user("x"), tools=TOOLS)] == ["plain", "tools"]


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "must not be empty"),
        (user([{"type": "image_url", "image_url": {"url": "x"}}]), r"messages\[0\]\.content\[0\]: type 'image_url'"),
        (user(["x"]), "type 'str'"),
        (user([{"type": "text"}]), "text must be a string"),
        (user(5), "refuses these messages"),
        ([{"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]}], r"messages\[0\]\.tool_calls"),
        ([{"role": "assistant", "tool_calls": ["x"]}], r"messages\[0\]\.tool_calls"),
    ],
)
def test_wrong_messages_are_invalid_requests(tokenizer: Tokenizer, messages: Any, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says) as caught:
        tokenizer.render_chat(messages)
    assert caught.value.param == "messages"


def test_a_templates_own_refusal_is_an_invalid_request() -> None:
    template = ChatTemplate({"default": "{{ raise_exception('roles must alternate') }}"}, {})
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        template.render(user("x"))


def test_templates_cannot_reach_the_interpreter() -> None:
    template = ChatTemplate({"default": "{{ messages.__class__.__mro__[1].__subclasses__() }}"}, {})
    with pytest.raises(InvalidRequest, match="unsafe"):
        template.render(user("x"))


def test_a_model_without_a_template_says_so() -> None:
    with pytest.raises(InvalidRequest, match="no chat template"):
        ChatTemplate({}, {}).render(user("x"))


def test_a_template_that_does_not_compile_is_the_checkpoints_fault() -> None:
    with pytest.raises(CheckpointError, match="chat template 'default'"):
        ChatTemplate({"default": "{% for %}"}, {})
