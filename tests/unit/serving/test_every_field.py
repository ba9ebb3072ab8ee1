"""Every field of every request has a test over HTTP that fails where it is ignored. `ELSEWHERE` says which.

A field that is not in the table, or a test that is not there, fails.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from qwen_ray.serving.pooling_schema import EmbeddingRequest, RerankRequest, ScoreRequest
from qwen_ray.serving.routes import create_app
from qwen_ray.serving.schema import ChatRequest, CompletionRequest
from tests.unit.serving.test_seen_fields_http import CASES, CHAT, COMPLETIONS

SEEN = "seen_fields_http:test_a_field_is_seen_in_the_answer_and_in_the_stream"
PATHS = {
    "ChatRequest": CHAT,
    "CompletionRequest": COMPLETIONS,
    "EmbeddingRequest": "/v1/embeddings",
    "ScoreRequest": "/v1/score",
    "RerankRequest": "/v1/rerank",
    "TokenizeRequest": "/tokenize",
    "DetokenizeRequest": "/detokenize",
}
BOTH = ("ChatRequest", "CompletionRequest")
# Of models: fields, and the test that fails where they are ignored. What is in `CASES` stands there alone.
ELSEWHERE: list[tuple[tuple[str, ...], str, str]] = [
    (tuple(PATHS), "model", "every_field:test_another_model_is_not_here"),
    (
        BOTH,
        "response_format structured_outputs guided_json guided_regex guided_choice guided_grammar",
        "grammar_http:test_every_field",
    ),
    (("ResponseFormat",), "type json_schema", "grammar_http:test_every_field"),
    (("JsonSchemaFormat",), "name description schema strict", "grammar_http:test_every_field"),
    (("StructuredOutputs",), "json regex choice grammar json_object", "grammar_http:test_every_field"),
    (BOTH, "stream", "seen_fields_http:test_a_field_is_seen_in_the_answer_and_in_the_stream"),
    (BOTH, "stream_options", "seen_fields_http:test_usage_comes_with_the_stream_where_it_is_asked_for"),
    (("StreamOptions",), "include_usage", "seen_fields_http:test_usage_comes_with_the_stream_where_it_is_asked_for"),
    (("StreamOptions",), "include_obfuscation", "fields_http:test_events_are_not_padded"),
    (BOTH, "priority", "seen_fields_http:test_whose_turn_it_is"),
    (BOTH, "timeout", "seen_fields_http:test_the_time_that_a_request_gives_itself"),
    (BOTH, "user metadata", "fields_http:test_what_says_nothing_of_the_answer_is_taken"),
    (
        ("ChatRequest",),
        "safety_identifier prompt_cache_key prompt_cache_retention",
        "fields_http:test_what_says_nothing_of_the_answer_is_taken",
    ),
    (("ChatRequest",), "service_tier", "fields_http:test_there_is_one_tier"),
    (("ChatRequest", "TokenizeRequest"), "messages", "chat_http:test_messages_in_parts_and_the_developer_role"),
    (("Message",), "role content", "chat_http:test_messages_in_parts_and_the_developer_role"),
    (("TextPart",), "type text", "chat_http:test_messages_in_parts_and_the_developer_role"),
    (("Message",), "name tool_call_id", "seen_fields_http:test_names_and_ids_of_messages_reach_the_template"),
    (
        ("Message",),
        "refusal annotations audio function_call",
        "seen_fields_http:test_fields_of_messages_that_no_template_knows_are_checked",
    ),
    (("Message",), "reasoning reasoning_content", "thinking_http:test_reasoning_in_the_history_reaches_the_template"),
    (("Message",), "prefix partial", "fields_http:test_the_last_message_goes_on"),
    (("Message",), "tool_calls", "tools_http:test_what_the_model_is_told"),
    (("Call",), "id type function index", "tools_http:test_what_the_model_is_told"),
    (("CalledFunction",), "name arguments", "tools_http:test_what_the_model_is_told"),
    (("ChatRequest", "TokenizeRequest"), "tools", "tools_http:test_what_the_model_is_told"),
    (("Tool",), "type function", "tools_http:test_what_the_model_is_told"),
    (("Function",), "name description parameters", "tools_http:test_what_the_model_is_told"),
    (("Function",), "strict", "tools_http:test_ranks_hear_what_an_answer_may_be"),
    (("ChatRequest",), "tool_choice", "tools_http:test_ranks_hear_what_an_answer_may_be"),
    (("NamedTool",), "type function", "tools_http:test_ranks_hear_what_an_answer_may_be"),
    (("NamedFunction",), "name", "tools_http:test_ranks_hear_what_an_answer_may_be"),
    (("ChatRequest",), "parallel_tool_calls", "tools_http:test_one_call_and_no_more"),
    (("ChatRequest",), "add_generation_prompt", "fields_http:test_add_generation_prompt"),
    (("TokenizeRequest",), "add_generation_prompt", "thinking_http:test_reasoning_in_the_history_reaches_the_template"),
    (("ChatRequest", "TokenizeRequest"), "continue_final_message", "fields_http:test_the_last_message_goes_on"),
    (
        ("ChatRequest",),
        "chat_template_kwargs enable_thinking",
        "thinking_http:test_the_template_hears_of_it_by_either_name",
    ),
    (("TokenizeRequest",), "chat_template_kwargs", "fields_http:test_prompts_that_cannot_be"),
    (("ChatRequest",), "thinking_budget", "thinking_http:test_the_ranks_are_told_the_budget"),
    (("ChatRequest",), "include_reasoning", "thinking_http:test_reasoning_can_be_left_out"),
    (("CompletionRequest",), "prompt", "completions_http:test_every_form_of_prompt"),
    (("CompletionRequest",), "suffix", "fill_in_http:test_the_prompt_has_the_suffix_before_the_gap"),
    (
        ("CompletionRequest", "TokenizeRequest"),
        "add_special_tokens",
        "seen_fields_http:test_special_tokens_of_the_tokenizer_s_own",
    ),
    (("TokenizeRequest",), "prompt return_token_strs", "completions_http:test_tokens_and_back"),
    (("DetokenizeRequest",), "tokens", "completions_http:test_tokens_and_back"),
    (("EmbeddingRequest",), "input", "embeddings_http:test_every_form_of_input"),
    (("EmbeddingRequest",), "dimensions", "embeddings_http:test_dimensions_are_the_first_and_of_length_1"),
    (("EmbeddingRequest",), "encoding_format", "embeddings_http:test_base64_is_the_same_as_float32"),
    (("EmbeddingRequest",), "instruction", "embeddings_http:test_an_instruction_goes_before_each_text"),
    (("EmbeddingRequest",), "prompt_name", "embeddings_http:test_a_prompt_of_the_checkpoint_goes_before_each_text"),
    (("EmbeddingRequest",), "add_special_tokens", "embeddings_http:test_special_tokens_are_the_model_s_unless_told"),
    (("EmbeddingRequest",), "use_activation", "embeddings_http:test_without_activation_vectors_are_as_they_are"),
    (
        ("EmbeddingRequest",),
        "truncate_prompt_tokens truncation_side",
        "embeddings_http:test_what_is_too_long_is_refused_or_cut",
    ),
    (("EmbeddingRequest",), "priority timeout", "embeddings_http:test_priority_timeout_and_key_travel_with_each_input"),
    (("EmbeddingRequest",), "user", "embeddings_http:test_wrong_requests_name_their_field"),
    (
        ("ScoreRequest",),
        "text_1 text_2 queries documents items data_1 data_2",
        "scores_http:test_sides_have_several_names_and_go_in_pairs",
    ),
    (("Text",), "text", "scores_http:test_sides_have_several_names_and_go_in_pairs"),
    (("RerankRequest",), "query documents", "scores_http:test_documents_come_in_the_order_of_their_scores"),
    (("RerankRequest",), "top_n return_documents", "scores_http:test_top_n_and_documents_only_where_they_are_wanted"),
    (
        ("ScoreRequest", "RerankRequest"),
        "instruction",
        "scores_http:test_an_instruction_takes_the_place_of_the_default",
    ),
    (("ScoreRequest", "RerankRequest"), "priority timeout user", "seen_fields_http:test_what_scores_have_in_common"),
    (("ScoreRequest", "RerankRequest"), "use_activation", "seen_fields_http:test_what_scores_have_in_common"),
    (
        ("ScoreRequest", "RerankRequest"),
        "truncate_prompt_tokens truncation_side",
        "seen_fields_http:test_what_scores_have_in_common",
    ),
]


def named(server: Any) -> set[tuple[str, str]]:
    """All fields of all bodies, and of what bodies are made of, as (model, field)."""
    schemas = create_app(server.service).openapi()["components"]["schemas"]
    found: set[str] = set()
    left = set(PATHS)
    while left:
        found |= left
        left = {
            name for one in left for name in re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(schemas[one]))
        }
        left -= found
    return {(name.removesuffix("-Input"), key) for name in found for key in schemas[name].get("properties", {})}


def test_every_field_is_in_the_table(server: Any) -> None:
    models = {CHAT: "ChatRequest", COMPLETIONS: "CompletionRequest"}
    covered = {(models[path], case.name) for case in CASES for path in case.paths}
    for names, keys, _ in ELSEWHERE:
        entries = {(name, key) for name in names for key in keys.split()}
        assert not covered & entries
        covered |= entries
    assert named(server) == covered


@pytest.mark.parametrize("name", sorted({SEEN, *(test for _, _, test in ELSEWHERE)}))
def test_the_tests_are_there(name: str) -> None:
    file, test = name.split(":")
    text = Path(__file__).with_name(f"test_{file}.py").read_text()
    assert f"async def {test}(" in text


def test_every_route_with_a_body_is_in_the_table(server: Any) -> None:
    bodies: set[str] = set()
    for path in create_app(server.service).openapi()["paths"].values():
        for operation in path.values():
            if "requestBody" in operation:
                bodies.add(operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)[1])
    assert bodies == set(PATHS)


async def test_another_model_is_not_here(server: Any) -> None:
    needed: dict[str, dict[str, Any]] = {
        CHAT: {"messages": [{"role": "user", "content": "x"}]},
        COMPLETIONS: {"prompt": "x"},
        "/v1/embeddings": {"input": "x"},
        "/v1/score": {"text_1": "x", "text_2": "x"},
        "/v1/rerank": {"query": "x", "documents": ["x"]},
        "/tokenize": {"prompt": "x"},
        "/detokenize": {"tokens": [1]},
    }
    assert set(needed) == set(PATHS.values())
    for path, body in needed.items():
        for model in ("other", "tiny"):
            error = (await server.client.post(path, json={**body, "model": model})).json().get("error", {})
            assert (error.get("code") == "model_not_found") == (model == "other"), path


@pytest.mark.parametrize("model", [ChatRequest, CompletionRequest, EmbeddingRequest, ScoreRequest, RerankRequest])
async def test_what_is_not_built_says_so(server: Any, model: Any) -> None:
    for name, defaults in model.not_built.items():
        response = await server.client.post(PATHS[model.__name__], json={name: {"x": 1}})
        error = response.json()["error"]
        assert (response.status_code, error["param"], error["code"]) == (400, name, "unsupported_parameter")
        for value in (None, *defaults):
            error = (await server.client.post(PATHS[model.__name__], json={name: value})).json()["error"]
            assert error["param"] != name
