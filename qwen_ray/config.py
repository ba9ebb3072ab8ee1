"""Settings: what the user asks for. The only module that reads the environment.

A wish can come from four places; the later wins: defaults, a YAML file (`-f`), environment variables, flags. Every
flag of `qwen-ray serve` stands in `OPTIONS` beside the key it sets; its environment variable is the flag in capitals
behind `QWEN_RAY_` (`--max-model-len` is `QWEN_RAY_MAX_MODEL_LEN`). The same file is what the Serve config carries.

Settings are frozen, and an unknown key is a SettingsError that names it. What is decided from them (which rank holds
what, how many blocks) are the planner's types in `core/plan.py`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from qwen_ray.api_keys import ApiKey, check_distinct
from qwen_ray.core.errors import SettingsError
from qwen_ray.core.logs import LogConfig, LogFormat
from qwen_ray.core.model_config import Quantization
from qwen_ray.core.plan import CPU_ENVIRONMENT

ENV_PREFIX = "QWEN_RAY_"
API_KEY_VARIABLE = ENV_PREFIX + "API_KEY"

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def parse_bytes(value: Any) -> Any:
    """Bytes from `4GiB`, `500M`, `1.5 GB` or a number; anything else is left for pydantic to refuse."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?\s*", value, re.IGNORECASE)
    if match is None:
        raise ValueError(f"{value!r} is not a size such as 4GiB or 500MB")
    return int(float(match[1]) * _UNITS[(match[2] or "").upper()])


def parse_tokens(value: Any) -> Any:
    """A token count from `32k` (32,768), `1m` or a number."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+)\s*([km])?\s*", value, re.IGNORECASE)
    if match is None:
        raise ValueError(f"{value!r} is not a number of tokens such as 32768 or 32k")
    return int(match[1]) * {"": 1, "k": 1024, "m": 1024**2}[(match[2] or "").lower()]


Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(ge=1)]
Tokens = Annotated[int, BeforeValidator(parse_tokens), Field(ge=1)]
HomePath = Annotated[Path, AfterValidator(Path.expanduser)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PlanSettings(Section):
    """Degrees of one replica; what is left out is searched."""

    tp: int | None = Field(default=None, ge=1, description="tensor-parallel ranks")
    pp: int | None = Field(default=None, ge=1, description="pipeline stages")
    ep: int | None = Field(default=None, ge=1, description="expert-parallel ranks of a stage")
    dp_attention: int | None = Field(
        default=None,
        ge=1,
        description="copies of the attention in a stage, each for sequences of its own, that share its experts",
    )


class ExpertSettings(Section):
    """Of a model with experts: how their load is evened out over the expert ranks."""

    num_redundant_experts: int = Field(default=0, ge=0, description="second copies of the hottest experts, of a layer")
    enable_eplb: bool = Field(default=False, description="move experts between ranks while serving, as their load asks")
    eplb_interval: float = Field(default=60.0, gt=0, description="seconds between two re-balancings")
    load: HomePath | None = Field(default=None, description="expert load (JSON) that the first placement is made for")

    @property
    def rebalance_seconds(self) -> float | None:
        """Between two re-balancings; None: never."""
        return self.eplb_interval if self.enable_eplb else None


class ReplicaSettings(Section):
    """How many copies of the model Ray Serve keeps."""

    min: int = Field(default=1, ge=1)
    max: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> ReplicaSettings:
        if self.max < self.min:
            raise ValueError(f"max ({self.max}) must be at least min ({self.min})")
        return self


class SloSettings(Section):
    """What the planner aims for, in seconds."""

    ttft: float | None = Field(default=None, gt=0, description="time to first token")
    tpot: float | None = Field(default=None, gt=0, description="time per output token")


class ModelSettings(Section):
    name: str = Field(
        default="", description="name that clients send; by default the source, or the last part of its path"
    )
    source: str = Field(
        default="demo", min_length=1, description="demo, a directory, a .gguf file, or a Hugging Face id"
    )
    revision: str | None = Field(default=None, description="branch, tag or commit of a Hugging Face id")
    task: Literal["auto", "generate", "embed", "score"] = Field(
        default="auto",
        description="what it is served for: tokens, vectors, or scores of pairs of texts; auto: what its files say",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16", "fp8"] = Field(
        default="auto", description="of the computation; fp8 (weights) can be planned with, not served"
    )
    quantization: Literal["auto"] | Quantization = Field(
        default="auto",
        description="of weights: int8 (each row) or int4 (each 32 of a row), rounded as they are read; none; auto: 4 "
        "bits that the checkpoint has stay so where they can be computed with",
    )
    load_format: Literal["auto", "safetensors", "gguf", "dummy"] = "auto"
    plan: Literal["auto"] | PlanSettings = "auto"
    experts: ExpertSettings = ExpertSettings()
    max_model_len: Tokens | None = Field(default=None, description="longest prompt and output together, in tokens")
    replicas: ReplicaSettings = ReplicaSettings()
    slo: SloSettings = SloSettings()

    @model_validator(mode="before")
    @classmethod
    def _named_after_its_source(cls, data: Any) -> Any:
        if isinstance(data, dict) and not data.get("name"):
            source = str(data.get("source") or "demo")
            is_file = source.endswith(".gguf")
            return {
                **data,
                "name": Path(source).stem
                if is_file
                else Path(source).resolve().name
                if Path(source).is_dir()
                else source,
            }
        return data


class HttpSettings(Section):
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    num_ingress: int = Field(default=1, ge=1, description="ingress replicas")
    max_body_bytes: Bytes = Field(default=8 * 2**20, description="largest request body; above it 413")
    max_open_requests: int = Field(
        default=2048, ge=1, description="requests that one ingress has open at once; one more gets 429"
    )
    queue_timeout: float = Field(
        default=120.0, gt=0, description="seconds that a request waits while no replica is ready; then 503"
    )
    drain_timeout: float = Field(
        default=600.0, ge=0, description="seconds that what is being removed goes on with the answers it has begun"
    )
    api_keys: Annotated[tuple[ApiKey, ...], AfterValidator(check_distinct)] = Field(
        default=(), description="key that clients must send; its hash is kept. Others can see flags: rather a variable"
    )
    api_keys_file: HomePath | None = Field(
        default=None, description="more keys (YAML, JSON, or lines `HASH NAME`), read again whenever it changes"
    )
    ssl_certfile: HomePath | None = Field(default=None, description="certificate chain (PEM); HTTPS in place of HTTP")
    ssl_keyfile: HomePath | None = Field(default=None, description="private key of the certificate (PEM)")

    @model_validator(mode="after")
    def _certificate_and_key(self) -> HttpSettings:
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ValueError("ssl_certfile and ssl_keyfile go together")
        return self


class EngineSettings(Section):
    block_size: int = Field(default=16, ge=1, le=256, description="tokens of one KV block")
    max_num_seqs: int = Field(default=64, ge=1, description="sequences running at once")
    max_num_batched_tokens: Tokens = Field(default=2048, description="tokens of one step")
    max_num_waiting: int = Field(default=1024, ge=1, description="sequences in the queue; one more gets 429")
    light_tenant_slowdown: float = Field(
        default=1.5, ge=1, description="times as long as alone that others may make the steps of a key that asks little"
    )
    enable_prefix_caching: bool = True
    kv_cache_memory: Bytes | None = Field(default=None, description="KV cache of one rank; by default from free memory")
    standby_ranks: bool = Field(
        default=True, description="keep a process ready to take a rank's place, 0.3 GB for each stage (CPU only)"
    )
    deterministic: bool = Field(
        default=False,
        description="a token's bits depend on no other request: other products, slower ones, on GPUs and CPUs with AMX",
    )
    gpu_memory_utilization: float = Field(
        default=0.9, gt=0, le=1, description="part of a device's memory that may be used"
    )


class ObservabilitySettings(Section):
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: LogFormat = Field(default="text", description="of log lines: for people, or a JSON object each")
    log_requests: bool = Field(default=False, description="log prompts and answers")
    otlp_endpoint: str | None = Field(
        default=None,
        pattern=r"^https?://[^\s/?#]+(/\S*)?$",
        description="OpenTelemetry collector (OTLP over HTTP, such as http://127.0.0.1:4318) that gets traces",
    )
    trace_sample_rate: float = Field(
        default=1.0, ge=0, le=1, description="share of requests that are traced, where the client has not decided"
    )
    ray_dashboard: bool = Field(default=False, description="start Ray's dashboard with a local Ray")
    audit_log: HomePath | None = Field(default=None, description="file with a JSON line for every request, appended to")
    audit_contents: bool = Field(default=False, description="prompts and answers in the audit log")
    price_per_hour: float | None = Field(
        default=None, gt=0, description="of one replica, in your currency: a metric, for what tokens cost"
    )
    audit_max_bytes: Bytes = Field(default=100 * 2**20, description="of the audit log, then FILE.1 to FILE.9 are kept")

    @property
    def logs(self) -> LogConfig:
        return LogConfig(level=self.log_level, format=self.log_format)


class Settings(Section):
    """All that can be asked for."""

    models: tuple[ModelSettings, ...] = Field(default=(ModelSettings(source="demo"),), min_length=1)
    http: HttpSettings = HttpSettings()
    engine: EngineSettings = EngineSettings()
    observability: ObservabilitySettings = ObservabilitySettings()
    cache_dir: HomePath = Path("~/.cache/qwen-ray").expanduser()
    ray_address: str | None = Field(
        default=None, description="of a running Ray cluster; by default one is started here"
    )
    node_timeout: float = Field(
        default=0.0,
        ge=0,
        description="seconds to wait for nodes that are still to join the cluster; above 0 only the fewest replicas "
        "must fit at the start, and more wait for nodes of their own",
    )

    @classmethod
    def from_dict(cls, data: Any, *, origin: str = "settings") -> Settings:
        """Raises SettingsError naming the key, the value and what would be right."""
        try:
            return cls.model_validate(data if data is not None else {})
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"] if part != "PlanSettings")
            message = first["msg"].removeprefix("Value error, ")
            if first["type"] == "extra_forbidden":
                message = "unknown key"
            # Somebody may have written a key where its hash belongs.
            is_silent = first["type"] in ("extra_forbidden", "missing") or field.startswith("http.api_keys")
            got = "" if is_silent else f" (got {first['input']!r})"
            raise SettingsError(f"{origin}: {field or 'top level'}: {message}{got}.", field=field) from error

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` reads it back."""
        return self.model_dump(mode="json")


# Flag of `qwen-ray serve` -> the key that it sets. `models.0` is the one model of the command line.
OPTIONS: dict[str, str] = {
    "model": "models.0.source",
    "served-model-name": "models.0.name",
    "revision": "models.0.revision",
    "task": "models.0.task",
    "dtype": "models.0.dtype",
    "quantization": "models.0.quantization",
    "load-format": "models.0.load_format",
    "tp": "models.0.plan.tp",
    "pp": "models.0.plan.pp",
    "ep": "models.0.plan.ep",
    "dp-attention": "models.0.plan.dp_attention",
    "num-redundant-experts": "models.0.experts.num_redundant_experts",
    "enable-eplb": "models.0.experts.enable_eplb",
    "eplb-interval": "models.0.experts.eplb_interval",
    "expert-load": "models.0.experts.load",
    "max-model-len": "models.0.max_model_len",
    "min-replicas": "models.0.replicas.min",
    "max-replicas": "models.0.replicas.max",
    "slo-ttft": "models.0.slo.ttft",
    "slo-tpot": "models.0.slo.tpot",
    "host": "http.host",
    "port": "http.port",
    "num-ingress": "http.num_ingress",
    "max-body-bytes": "http.max_body_bytes",
    "max-open-requests": "http.max_open_requests",
    "queue-timeout": "http.queue_timeout",
    "drain-timeout": "http.drain_timeout",
    "api-key": "http.api_keys",
    "api-keys-file": "http.api_keys_file",
    "ssl-certfile": "http.ssl_certfile",
    "ssl-keyfile": "http.ssl_keyfile",
    "block-size": "engine.block_size",
    "max-num-seqs": "engine.max_num_seqs",
    "max-num-batched-tokens": "engine.max_num_batched_tokens",
    "max-num-waiting": "engine.max_num_waiting",
    "light-tenant-slowdown": "engine.light_tenant_slowdown",
    "enable-prefix-caching": "engine.enable_prefix_caching",
    "standby-ranks": "engine.standby_ranks",
    "deterministic": "engine.deterministic",
    "kv-cache-memory": "engine.kv_cache_memory",
    "gpu-memory-utilization": "engine.gpu_memory_utilization",
    "log-level": "observability.log_level",
    "log-format": "observability.log_format",
    "log-requests": "observability.log_requests",
    "otlp-traces-endpoint": "observability.otlp_endpoint",
    "trace-sample-rate": "observability.trace_sample_rate",
    "ray-dashboard": "observability.ray_dashboard",
    "audit-log": "observability.audit_log",
    "audit-contents": "observability.audit_contents",
    "audit-max-bytes": "observability.audit_max_bytes",
    "price-per-hour": "observability.price_per_hour",
    "cache-dir": "cache_dir",
    "address": "ray_address",
    "node-timeout": "node_timeout",
}


def load_settings(
    file: Path | None = None, flags: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None
) -> Settings:
    """Defaults, then `file`, then the environment, then `flags` (names as in OPTIONS; None means not given)."""
    environ = os.environ if environ is None else environ
    data = _read_yaml(file) if file else {}
    by_variable = {ENV_PREFIX + flag.replace("-", "_").upper(): flag for flag in OPTIONS}
    for variable, value in environ.items():
        if variable == API_KEY_VARIABLE:
            _assign(data, OPTIONS["api-key"], [ApiKey.of(value)], origin=variable)
        elif variable in by_variable:
            _assign(data, OPTIONS[by_variable[variable]], yaml.safe_load(value), origin=variable)
    for flag, value in (flags or {}).items():
        if value is not None:
            _assign(data, OPTIONS[flag], [ApiKey.of(value)] if flag == "api-key" else value, origin=f"--{flag}")
    return Settings.from_dict(data, origin=str(file) if file else "settings")


def take_cpu_environment() -> None:
    """For a model in this process, before torch is imported: it and OpenMP read their variables once.

    What ranks are told (`core/plan.py`, with figures). What the user has set stays.
    """
    for variable, value in CPU_ENVIRONMENT.items():
        if variable != "GOMP_SPINCOUNT" or "OMP_WAIT_POLICY" not in os.environ:
            os.environ.setdefault(variable, value)


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"{file}: cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{file}: is not YAML: {error}.") from error
    if data is not None and not isinstance(data, dict):
        raise SettingsError(f"{file}: must hold keys such as `models:`, got {type(data).__name__}.")
    return data or {}


def _assign(data: dict[str, Any], key: str, value: Any, *, origin: str) -> None:
    """Set a dotted key in nested dicts and lists, making what is missing; `auto` gives way to a mapping."""
    *path, last = key.split(".")
    at: Any = data
    for i, part in enumerate(path):
        if isinstance(at, list):
            if len(at) > 1:
                raise SettingsError(f"{origin} sets {key}, but the settings file has {len(at)} models.", field=key)
            at = at[int(part)]
            continue
        below = at.get(part)
        if not isinstance(below, dict | list):
            below = [{}] if path[i + 1 : i + 2] == ["0"] else {}
            at[part] = below
        at = below
    at[last] = value
