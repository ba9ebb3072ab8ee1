"""The HTTP face: which path is what. `create_app` makes it around a `Service`, with or without Ray."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Query, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel

from qwen_ray.core.errors import InvalidRequest, UnknownModel
from qwen_ray.core.pooling import Task
from qwen_ray.metrics.exporter import CONTENT_TYPE
from qwen_ray.metrics.recorder import IngressRecorder
from qwen_ray.planner.experts import ExpertLoadFile
from qwen_ray.serving import answer_schema, chat, completions, embeddings, errors, pooling_schema, schema, scores
from qwen_ray.serving.answer import token_text
from qwen_ray.serving.audit import AuditLog
from qwen_ray.serving.call import Call
from qwen_ray.serving.dispatch import Dispatcher
from qwen_ray.serving.fleet import Fleet
from qwen_ray.serving.generation import Generator
from qwen_ray.serving.keys import KeyRing
from qwen_ray.serving.limits import OpenRequests
from qwen_ray.serving.middleware import MAX_SHOWN, OPEN_PATHS, BodyLimit, Gate, InTurn, Watch
from qwen_ray.serving.pooling import Pooler
from qwen_ray.tracing import Tracer

VERSION = version("qwen-ray")

# What a server for each task answers with.
GIVES: dict[Task, str] = {
    "generate": "text and scores: ask /v1/chat/completions, /v1/completions, /v1/score or /v1/rerank",
    "embed": "vectors and their angles: ask /v1/embeddings, /v1/score or /v1/rerank",
    "score": "scores: ask /v1/score or /v1/rerank",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """What the routes stand on. `fleet` speaks for all processes."""

    generator: Generator
    dispatcher: Dispatcher
    recorder: IngressRecorder
    fleet: Fleet
    keys: KeyRing
    open_requests: OpenRequests
    max_body_bytes: int
    audit: AuditLog | None = None
    tracer: Tracer | None = None

    def check_model(self, name: str | None, call: Call) -> None:
        """Raises UnknownModel; a request without a name means the one that is served."""
        call.model = (self.generator.model.name if name is None else name)[:MAX_SHOWN]
        if name is not None and name != self.generator.model.name:
            raise UnknownModel(name, [self.generator.model.name])

    def check_task(self, task: Task) -> None:
        """Raises InvalidRequest where the model is served for another one."""
        model = self.generator.model
        if model.task != task:
            message = f"The model `{model.name}` is served with --task {model.task} and gives {GIVES[model.task]}."
            raise InvalidRequest(message, param="model", code="unsupported_task")

    @property
    def pooler(self) -> Pooler:
        return Pooler(self.generator, self.dispatcher, self.recorder)

    def card(self) -> answer_schema.ModelCard:
        model = self.generator.model
        return answer_schema.ModelCard(
            id=model.name, created=model.created, root=model.source, max_model_len=model.max_model_len
        )


_RETRY = {"Retry-After": {"description": "Seconds; with 429 and 503.", "schema": {"type": "integer"}}}
_ERROR: dict[str, Any] = {"model": answer_schema.ErrorAnswer, "headers": _RETRY}
router = APIRouter(
    responses={
        "4XX": {**_ERROR, "description": "The request is wrong, or too much."},
        "5XX": {**_ERROR, "description": "It cannot be answered now, or something went wrong here."},
    }
)


class Api(FastAPI):
    """Its document tells of wrong requests as they are answered: with OpenAI's body, and never with 422.

    Of keys it tells where they are needed.
    """

    def openapi(self) -> dict[str, Any]:
        document = super().openapi()
        needs_key = self.state.service.keys.is_needed
        for path, operations in document["paths"].items():
            for operation in operations.values():
                operation["responses"].pop("422", None)
                if needs_key and path not in OPEN_PATHS:
                    operation["security"] = [{"key": []}]
        for name in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(name, None)
        if needs_key:
            document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        return document


def _answers(model: type[BaseModel], chunks: str) -> dict[int | str, dict[str, Any]]:
    """Of a route that streams where it is asked to."""
    events = {"schema": {"type": "string", "description": f"Events `data: …`: {chunks} objects, and [DONE]."}}
    return {200: {"model": model, "content": {"text/event-stream": events}}}


def create_app(service: Service, *, behind_serve: bool = False) -> FastAPI:
    # No interactive pages: they load their scripts from the internet.
    app = Api(title="qwen-ray", version=VERSION, docs_url=None, redoc_url=None)
    app.state.service = service
    app.include_router(router)
    app.add_middleware(BodyLimit, max_bytes=service.max_body_bytes)
    app.add_middleware(InTurn)
    app.add_middleware(Gate, keys=service.keys, open_requests=service.open_requests)
    app.add_middleware(
        Watch,
        on_response=service.recorder.http_request,
        audit=service.audit,
        tracer=service.tracer,
        behind_serve=behind_serve,
    )
    errors.install(app)
    return app


def _service(request: Request) -> Service:
    return request.app.state.service


@router.post(
    "/v1/chat/completions",
    response_model=None,
    responses=_answers(answer_schema.ChatCompletion, "chat.completion.chunk"),
)
async def chat_completions(body: schema.ChatRequest, request: Request) -> answer_schema.ChatCompletion | Response:
    """OpenAI's, with vLLM's and Qwen's further fields."""
    service = _service(request)
    service.check_model(body.model, Call.of(request.scope))
    service.check_task("generate")
    return await chat.create(body, request, service.generator, Call.of(request.scope))


@router.post("/v1/completions", response_model=None, responses=_answers(answer_schema.Completion, "text_completion"))
async def text_completions(body: schema.CompletionRequest, request: Request) -> answer_schema.Completion | Response:
    """Of texts or token ids; with a suffix, what stands between."""
    service = _service(request)
    service.check_model(body.model, Call.of(request.scope))
    service.check_task("generate")
    return await completions.create(body, request, service.generator, Call.of(request.scope))


@router.post("/v1/embeddings", response_model=None, responses={200: {"model": pooling_schema.EmbeddingList}})
async def embed(body: pooling_schema.EmbeddingRequest, request: Request) -> Response:
    """A vector for each text."""
    service = _service(request)
    service.check_model(body.model, Call.of(request.scope))
    service.check_task("embed")
    return await embeddings.create(body, request, service.pooler, Call.of(request.scope))


@router.post("/score")
@router.post("/v1/score")
async def score(body: pooling_schema.ScoreRequest, request: Request) -> pooling_schema.ScoreList:
    """Of pairs of texts."""
    service = _service(request)
    service.check_model(body.model, Call.of(request.scope))
    return await scores.score(body, request, service.pooler, Call.of(request.scope))


@router.post("/rerank")
@router.post("/v2/rerank")
@router.post("/v1/rerank")
async def rerank(body: pooling_schema.RerankRequest, request: Request) -> pooling_schema.RerankAnswer:
    """Documents by how well they answer a query."""
    service = _service(request)
    service.check_model(body.model, Call.of(request.scope))
    return await scores.rerank(body, request, service.pooler, Call.of(request.scope))


@router.get("/v1/models")
async def models(request: Request) -> answer_schema.ModelList:
    """The one that is served."""
    return answer_schema.ModelList(data=[_service(request).card()])


@router.get("/v1/models/{name:path}")
async def model(name: str, request: Request) -> answer_schema.ModelCard:
    """By its name."""
    service = _service(request)
    service.check_model(name, Call.of(request.scope))
    return service.card()


@router.post("/tokenize")
async def tokenize(body: schema.TokenizeRequest, request: Request) -> answer_schema.TokenizeAnswer:
    """Token ids of a text, or of a chat as its template writes it."""
    service = _service(request)
    service.check_model(body.model, Call.of(request.scope))
    generator = service.generator
    if body.messages is not None:
        tokens = await generator.encode_chat(body.to_conversation(body.messages))
    else:
        tokens = await generator.encode(body.prompt or "", add_special_tokens=body.add_special_tokens)
    texts = [token_text(generator.tokenizer, token) for token in tokens] if body.return_token_strs else None
    return answer_schema.TokenizeAnswer(
        count=len(tokens), max_model_len=generator.model.max_model_len, tokens=tokens, token_strs=texts
    )


@router.post("/detokenize")
async def detokenize(body: schema.DetokenizeRequest, request: Request) -> answer_schema.DetokenizeAnswer:
    """The text of token ids."""
    service = _service(request)
    service.check_model(body.model, Call.of(request.scope))
    service.generator.check_ids("tokens", body.tokens)
    return answer_schema.DetokenizeAnswer(prompt=await service.generator.decode(body.tokens))


@router.get("/tokenizer_info")
async def tokenizer_info(request: Request) -> answer_schema.TokenizerInfo:
    """For tokenizers at a distance, such as lm-eval's."""
    generator = _service(request).generator
    tokenizer = generator.tokenizer
    special = tokenizer.special_tokens
    return answer_schema.TokenizerInfo(
        vocab_size=tokenizer.vocab_size,
        model_max_length=generator.model.max_model_len,
        bos_token=special.get("bos_token"),
        eos_token=special.get("eos_token"),
        pad_token=special.get("pad_token"),
        unk_token=special.get("unk_token"),
        chat_template=tokenizer.chat_template,
    )


@router.get("/health/live")
async def live() -> dict[str, str]:
    """This process answers."""
    return {"status": "live"}


@router.get("/health")
@router.get("/health/ready")
async def ready(request: Request) -> dict[str, str]:
    """Requests would be answered now: some replica is ready and makes progress."""
    _service(request).dispatcher.check_ready()
    return {"status": "ready"}


@router.get(
    "/health/startup",
    response_model=answer_schema.Startup,
    responses={503: {"model": answer_schema.Startup, "description": "No replica is ready yet."}},
)
async def startup(request: Request) -> JSONResponse:
    """How far loading is; 200 as soon as one replica is ready."""
    statuses = _service(request).dispatcher.statuses
    is_ready = any(status.state == "ready" for status in statuses)
    names = ("replica", "state", "stage", "bytes_done", "bytes_total", "load_seconds", "error")
    replicas = [{name: getattr(status, name) for name in names} for status in statuses]
    body = {"status": "ready" if is_ready else "loading", "replicas": replicas}
    return JSONResponse(body, status_code=200 if is_ready else 503)


ProcessId = Annotated[str | None, Query(max_length=200)]
_TEXT: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}


@router.get("/metrics", response_class=Response, responses=_TEXT)
async def metrics(request: Request, ingress: ProcessId = None, replica: ProcessId = None) -> Response:
    """Of every ingress, replica and rank; or of one ingress, or of one replica with its ranks."""
    fleet = _service(request).fleet
    is_whole = ingress is None and replica is None
    text = await fleet.metrics() if is_whole else await fleet.metrics_of(ingress, replica)
    return PlainTextResponse(text, media_type=CONTENT_TYPE)


@router.get("/metrics/targets")
async def metrics_targets(request: Request) -> list[answer_schema.TargetGroup]:
    """For Prometheus' HTTP service discovery: each process a target of its own, reached as this was. Together they
    give what `/metrics` gives without parameters."""
    return [
        answer_schema.TargetGroup(
            targets=[request.url.netloc],
            labels={"__metrics_path__": "/metrics", f"__param_{kind}": name, "instance": f"{kind}/{name}"},
        )
        for kind, name in await _service(request).fleet.processes()
    ]


@router.get("/version")
async def show_version() -> dict[str, str]:
    """This server's."""
    return {"version": VERSION}


@router.get("/status")
async def status(request: Request) -> dict[str, Any]:
    """Replicas, ranks and engines, for people and scripts."""
    service = _service(request)
    return {"version": VERSION, "model": service.card().model_dump(), **await service.fleet.status()}


@router.get("/expert_load")
async def expert_load(request: Request) -> dict[str, Any]:
    """How often each expert was asked for, by layer: what `qwen-ray plan --expert-load` reads."""
    service = _service(request)
    tokens = await service.fleet.expert_load()
    num_experts = max(map(len, tokens), default=0)
    return ExpertLoadFile(model=service.card().id, num_experts=num_experts, expert_tokens=tokens).to_json()
