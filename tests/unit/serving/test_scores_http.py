"""/v1/score and /v1/rerank over real HTTP, with ranks whose logits and vectors are simple."""

from __future__ import annotations

import json
import math
import random
from array import array
from collections.abc import Awaitable, Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from qwen_ray.core.pooling import Pooling
from qwen_ray.serving import pooling
from qwen_ray.serving.routes import create_app
from qwen_ray.text.tokenizer import Tokenizer
from tests.unit.serving.conftest import pooled

YES, NO = 260, 261
DOCUMENTS = ["Paris is its capital.", "Bananas are yellow!", "Lyon?"]
QUERY = "capital of France"
Start = Callable[..., Awaitable[Any]]
# Qwen3-Reranker's documentation, written out.
PROMPT = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    "<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}"
    "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
)
INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"


@pytest.fixture(scope="session")
def answering_tokenizer(tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """One with tokens for yes and no."""
    path = tmp_path_factory.mktemp("answering")
    backend = tokenizers.Tokenizer.from_file(str(tokenizer_path / "tokenizer.json"))
    backend.add_tokens(["yes", "no"])
    backend.save(str(path / "tokenizer.json"))
    return Tokenizer.load(path)


@pytest.fixture
async def judge(answering_tokenizer: Tokenizer, start_server: Start) -> Any:
    """A model that generates can score."""
    return await start_server(tokenizer=answering_tokenizer)


@pytest.fixture
async def embedder(answering_tokenizer: Tokenizer, start_server: Start) -> Any:
    return await start_server(tokenizer=answering_tokenizer, about={"task": "embed", "hidden_size": 4})


async def ask(server: Any, path: str, status: int = 200, **body: Any) -> dict[str, Any]:
    response = await server.client.post(path, json=body)
    assert response.status_code == status, response.text
    return response.json() if status == 200 else response.json()["error"]


def logits(tokenizer: Tokenizer, query: str, document: str, instruction: str = INSTRUCTION) -> tuple[float, float]:
    ids = tokenizer.encode(PROMPT.format(instruction=instruction, query=query, document=document), False)
    yes, no = array("f", pooled(ids, Pooling(token_ids=(YES, NO))))
    return yes, no


def likelihood(yes: float, no: float) -> float:
    return math.exp(yes) / (math.exp(yes) + math.exp(no))


def prompts(server: Any) -> list[str]:
    requests = sorted(server.replicas[0].requests, key=lambda one: int(one.request_id.split("-")[-1].split("#")[0]))
    return [server.tokenizer.decode(one.prompt_token_ids, skip_special_tokens=False) for one in requests]


async def test_scores_are_the_likelihood_of_yes(judge: Any) -> None:
    for path in ("/v1/score", "/score"):
        judge.replicas[0].requests.clear()
        answer = await ask(judge, path, model="tiny", text_1=QUERY, text_2=DOCUMENTS)
        assert prompts(judge) == [PROMPT.format(instruction=INSTRUCTION, query=QUERY, document=d) for d in DOCUMENTS]
        assert (answer["object"], answer["model"]) == ("list", "tiny")
        assert answer["id"].startswith("score-")
        assert [(item["object"], item["index"]) for item in answer["data"]] == [("score", i) for i in range(3)]
        expected = [likelihood(*logits(judge.tokenizer, QUERY, document)) for document in DOCUMENTS]
        assert [item["score"] for item in answer["data"]] == pytest.approx(expected, abs=1e-9)
        num_tokens = sum(len(judge.tokenizer.encode(prompt, False)) for prompt in prompts(judge))
        assert answer["usage"] == {"prompt_tokens": num_tokens, "total_tokens": num_tokens}


async def test_sides_have_several_names_and_go_in_pairs(embedder: Any) -> None:
    for first, second in product(("text_1", "queries", "data_1"), ("text_2", "documents", "items", "data_2")):
        many: dict[str, Any] = {first: ["a", "b"], second: ["ac", "d"]}
        each: list[dict[str, Any]] = [{first: "a", second: {"text": "ac"}}, {first: "b", second: {"text": "d"}}]
        one_each = await ask(embedder, "/v1/score", **many)
        singles = [await ask(embedder, "/v1/score", **body) for body in each]
        assert [item["score"] for item in one_each["data"]] == [answer["data"][0]["score"] for answer in singles]
        assert len({item["score"] for item in one_each["data"]}) == 2


async def test_documents_come_in_the_order_of_their_scores(judge: Any) -> None:
    scores = [likelihood(*logits(judge.tokenizer, QUERY, document)) for document in DOCUMENTS]
    order = sorted(range(3), key=lambda i: -scores[i])
    for path in ("/v1/rerank", "/rerank", "/v2/rerank"):
        answer = await ask(judge, path, model="tiny", query=QUERY, documents=[*DOCUMENTS[:2], {"text": DOCUMENTS[2]}])
        assert answer["id"].startswith("rerank-")
        assert [result["index"] for result in answer["results"]] == order
        for result in answer["results"]:
            assert result["relevance_score"] == pytest.approx(scores[result["index"]], abs=1e-9)
            assert result["document"] == {"text": DOCUMENTS[result["index"]]}
    assert set(answer["usage"]) == {"prompt_tokens", "total_tokens"}


async def test_top_n_and_documents_only_where_they_are_wanted(judge: Any) -> None:
    whole = await ask(judge, "/v1/rerank", query=QUERY, documents=DOCUMENTS)
    for top_n, count in ((1, 1), (2, 2), (0, 3), (None, 3), (9, 3)):
        answer = await ask(judge, "/v1/rerank", query=QUERY, documents=DOCUMENTS, top_n=top_n)
        assert answer["results"] == whole["results"][:count]
        assert answer["usage"] == whole["usage"]
    answer = await ask(judge, "/v1/rerank", query=QUERY, documents=DOCUMENTS, return_documents=False)
    assert all("document" not in result for result in answer["results"])


async def test_an_instruction_takes_the_place_of_the_default(judge: Any) -> None:
    await ask(judge, "/v1/rerank", query=QUERY, documents=["d"], instruction="Find fruit")
    await ask(judge, "/v1/score", text_1=QUERY, text_2="d", instruction="Find fruit")
    assert prompts(judge) == [PROMPT.format(instruction="Find fruit", query=QUERY, document="d")] * 2


async def test_without_activation_scores_are_differences_of_logits(judge: Any) -> None:
    answer = await ask(judge, "/v1/score", text_1=QUERY, text_2=DOCUMENTS, use_activation=False)
    pairs = [logits(judge.tokenizer, QUERY, document) for document in DOCUMENTS]
    assert [item["score"] for item in answer["data"]] == [yes - no for yes, no in pairs]


async def test_what_is_cut_is_the_pair_and_not_the_question(judge: Any) -> None:
    document = "abcdefghij" * 100
    assert (await ask(judge, "/v1/rerank", 400, query="q", documents=[document]))["code"] == "context_length_exceeded"
    own = len(judge.tokenizer.encode(PROMPT, False)) - len(
        "<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}"
    )
    pair = f"<Instruct>: i\n<Query>: q\n<Document>: {document}"
    for given, kept in (
        ({"truncate_prompt_tokens": -1}, pair[: 400 - own]),
        ({"truncate_prompt_tokens": own + 40}, pair[:40]),
        ({"truncate_prompt_tokens": own + 40, "truncation_side": "left"}, pair[-40:]),
    ):
        judge.replicas[0].requests.clear()
        await ask(judge, "/v1/rerank", query="q", documents=[document], instruction="i", **given)
        (prompt,) = prompts(judge)
        before, behind = PROMPT.split("<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}")
        assert prompt == before + kept + behind
    error = await ask(judge, "/v1/score", 400, text_1="q", text_2="d", truncate_prompt_tokens=own)
    assert error["param"] == "truncate_prompt_tokens"


async def test_of_a_model_that_embeds_scores_are_cosines(embedder: Any) -> None:
    def vector(text: str) -> array[float]:
        return array("f", pooled(embedder.tokenizer.encode(text), Pooling()))

    def cosine(a: str, b: str) -> float:
        dot = sum(x * y for x, y in zip(vector(a), vector(b), strict=True))
        return dot / math.hypot(*vector(a)) / math.hypot(*vector(b))

    answer = await ask(embedder, "/v1/score", text_1=QUERY, text_2=DOCUMENTS)
    expected = [cosine(QUERY, document) for document in DOCUMENTS]
    assert [item["score"] for item in answer["data"]] == pytest.approx(expected, abs=1e-6)
    # The query is computed once.
    num_tokens = len(QUERY) + sum(map(len, DOCUMENTS))
    assert answer["usage"]["prompt_tokens"] == num_tokens
    ranked = await ask(embedder, "/v1/rerank", query=QUERY, documents=DOCUMENTS, instruction="i")
    for result in ranked["results"]:
        with_instruction = cosine(f"Instruct: i\nQuery:{QUERY}", DOCUMENTS[result["index"]])
        assert result["relevance_score"] == pytest.approx(with_instruction, abs=1e-6)
    assert (await ask(embedder, "/v1/score", 400, text_1="a", text_2="b", use_activation=True))["param"] == (
        "use_activation"
    )


async def test_wrong_requests_name_their_field(embedder: Any) -> None:
    table: list[tuple[str, dict[str, Any], str | None]] = [
        ("/v1/rerank", {"query": "q"}, "documents"),
        ("/v1/rerank", {"documents": ["d"]}, "query"),
        ("/v1/rerank", {"query": "q", "documents": []}, "documents"),
        ("/v1/rerank", {"query": "q", "documents": [1]}, "documents"),
        ("/v1/rerank", {"query": "q", "documents": [{"text": "d", "title": "t"}]}, "documents"),
        ("/v1/rerank", {"query": "q", "documents": ["d"] * 2049}, "documents"),
        ("/v1/rerank", {"query": ["q"], "documents": ["d"]}, "query"),
        ("/v1/rerank", {"query": "q", "documents": ["d"], "top_n": -1}, "top_n"),
        ("/v1/rerank", {"query": "q", "documents": ["d"], "rank_fields": ["text"]}, "rank_fields"),
        ("/v1/rerank", {"query": "q", "documents": ["d"], "max_tokens_per_doc": 5}, "max_tokens_per_doc"),
        ("/v1/score", {"text_1": "a"}, None),
        ("/v1/score", {"text_1": "a", "queries": "b", "text_2": "c"}, None),
        ("/v1/score", {"text_1": ["a", "b"], "text_2": ["c"]}, None),
        ("/v1/score", {"text_1": ["a", "b"], "text_2": ["c", "d", "e"]}, None),
        ("/v1/score", {"text_1": "a", "text_2": "b", "padding": "max_length"}, "padding"),
    ]
    for path, body, param in table:
        assert (await ask(embedder, path, 400, **body))["param"] == param, body


async def test_a_query_that_is_repeated_counts_each_time(judge: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pooling, "MAX_CHARACTERS", 100)
    assert (await ask(judge, "/v1/rerank", 413, query="q" * 60, documents=["a", "b"]))["param"] == "documents"


async def test_who_only_scores_generates_nothing(answering_tokenizer: Tokenizer, start_server: Start) -> None:
    server = await start_server(tokenizer=answering_tokenizer, about={"task": "score"})
    error = await ask(server, "/v1/completions", 400, prompt="x")
    assert error["code"] == "unsupported_task"
    assert "/v1/rerank" in error["message"]
    answer = await ask(server, "/v1/score", text_1=QUERY, text_2="d")
    assert answer["data"][0]["score"] == pytest.approx(likelihood(*logits(server.tokenizer, QUERY, "d")), abs=1e-9)
    assert (await ask(server, "/v1/embeddings", 400, input="x"))["code"] == "unsupported_task"


async def test_without_a_token_for_yes_there_are_no_scores(server: Any) -> None:
    error = await ask(server, "/v1/score", 400, text_1="a", text_2="b")
    assert (error["code"], error["param"]) == ("unsupported_task", "model")


async def test_any_body(embedder: Any) -> None:
    models = create_app(embedder.service).openapi()["components"]["schemas"]
    routes: dict[str, tuple[str, dict[str, Any]]] = {
        "/v1/embeddings": ("EmbeddingRequest", {"input": "a"}),
        "/v1/score": ("ScoreRequest", {"text_1": "a", "text_2": ["b", "c"]}),
        "/v1/rerank": ("RerankRequest", {"query": "a", "documents": ["b", {"text": "c"}]}),
    }
    values: list[Any] = [
        None,
        True,
        0,
        1,
        -1,
        3,
        2**63,
        0.5,
        "",
        "a",
        "\ud800",
        [],
        {},
        ["a"],
        [1],
        [[1]],
        [[]],
        "left",
    ]
    dice = random.Random(2)
    statuses: list[int] = []
    for _ in range(150):
        path = dice.choice(list(routes))
        model, valid = routes[path]
        fields = dice.sample(sorted(set(models[model]["properties"]) - {"timeout"}), k=dice.choice((1, 1, 2)))
        body = {**valid, **{name: dice.choice(values) for name in fields}}
        response = await embedder.client.post(
            path, content=json.dumps(body), headers={"Content-Type": "application/json"}
        )
        statuses.append(response.status_code)
        assert response.status_code in (200, 400, 404), (path, body, response.text)
        assert response.status_code == 200 or response.json()["error"]["message"], body
    assert min(statuses.count(200), statuses.count(400)) > 10, statuses
    await embedder.until(embedder.is_idle)


async def test_null_is_as_good_as_nothing_and_the_document_tells_all(embedder: Any) -> None:
    document = create_app(embedder.service).openapi()
    models = document["components"]["schemas"]
    for path, model, needed, answer in (
        ("/v1/embeddings", "EmbeddingRequest", {"input": "a"}, "EmbeddingList"),
        ("/v1/score", "ScoreRequest", {"text_1": "a", "text_2": "b"}, "ScoreList"),
        ("/v1/rerank", "RerankRequest", {"query": "a", "documents": ["b"]}, "RerankAnswer"),
    ):
        optional = set(models[model]["properties"]) - set(needed)
        for name in optional:
            assert {"type": "null"} in models[model]["properties"][name].get("anyOf", []), name
        given: dict[str, Any] = dict(needed)
        nothing: dict[str, Any] = dict.fromkeys(optional)
        plain = await ask(embedder, path, **given)
        nulls = await ask(embedder, path, **given, **nothing)
        assert {**nulls, "id": 0, "created": 0} == {**plain, "id": 0, "created": 0}
        content = document["paths"][path]["post"]["responses"]["200"]["content"]["application/json"]
        assert content["schema"] == {"$ref": f"#/components/schemas/{answer}"}
