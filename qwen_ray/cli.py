"""The command line: parse, load settings, call one thing.

Knows names, help texts and exit codes. What a command does stands in `commands/`, imported when it runs: `--help` and
`plan` start without torch and Ray.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from qwen_ray.commands.console import out, show_error
from qwen_ray.commands.options import ALL_FLAGS, BATCH_FLAGS, ENGINE_FLAGS, MODEL_FLAGS, ModelArgument, with_settings
from qwen_ray.config import API_KEY_VARIABLE, Settings
from qwen_ray.core.errors import PlanRefused, QwenRayError, SettingsError
from qwen_ray.core.hardware import Hardware
from qwen_ray.core.request import SamplingParams
from qwen_ray.machine import running_ray

app = typer.Typer(
    name="qwen-ray",
    help="Serve Qwen-family models on a Ray cluster, with an OpenAI-compatible endpoint.",
    epilog="Start with [bold]qwen-ray serve[/] (a small built-in model), then [bold]qwen-ray chat --url "
    "http://127.0.0.1:8000[/]. Every flag of [bold]serve[/] is also an environment variable ([bold]--max-model-len"
    "[/] is QWEN_RAY_MAX_MODEL_LEN) and a key of the settings file ([bold]-f settings.yaml[/]). Exit codes: 0 done, "
    "1 failed, 2 wrong settings, 3 model not found, 4 model files wrong, 5 the plan does not fit, 130 interrupted.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON.")]
UrlOption = Annotated[
    str | None,
    typer.Option("--url", metavar="URL", help="A running server; without it the model runs in this process."),
]
ApiKeyOption = Annotated[
    str | None,
    typer.Option("--api-key", metavar="KEY", envvar=API_KEY_VARIABLE, help="Sent to the server as a bearer token."),
]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", metavar="N", min=1, help="Longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option("--temperature", metavar="X", help="0: always the likeliest token.")]
TopP = Annotated[float, typer.Option("--top-p", metavar="X", help="Sample from this share of probability.")]
Seed = Annotated[int | None, typer.Option("--seed", metavar="N", help="Same seed, same answer.")]


@app.command()
@with_settings(*ALL_FLAGS)
def serve(*, settings: Settings, model: ModelArgument = None) -> None:
    """Serve a model over HTTP until Ctrl-C.

    Fetches the model if needed, checks that it fits, starts Ray (or joins the cluster at --address) and an
    OpenAI-compatible endpoint.

      qwen-ray serve
      qwen-ray serve demo --tp 2 --port 9000
      qwen-ray serve Qwen/Qwen2.5-0.5B-Instruct --dtype bfloat16 --max-model-len 32k
      qwen-ray serve Qwen/Qwen3-30B-A3B --ep 2 --enable-eplb
      qwen-ray serve -f settings.yaml
    """
    from qwen_ray.commands.serve import run_serve

    run_serve(settings)


@app.command()
@with_settings(*MODEL_FLAGS, *ENGINE_FLAGS, "cache-dir", "address")
def plan(
    *,
    settings: Settings,
    model: ModelArgument = None,
    hardware: Annotated[
        str | None,
        typer.Option(
            "--hardware",
            metavar="SPEC",
            help="For example 8xH100-80G or 2x8xH100-80G. Without it: the Ray cluster at --address, else this machine.",
        ),
    ] = None,
    context: Annotated[
        str | None, typer.Option("--context", metavar="TOKENS", help="Context to plan for, such as 32k.")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option("--concurrency", metavar="N", min=1, help="Requests at once to plan for.")
    ] = None,
    form: Annotated[
        Literal["text", "json", "helm-values"] | None,
        typer.Option("--format", help="helm-values: the plan and its pods as values of the chart helm/qwen-ray."),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Show how a model would be divided, what it needs and what it would do; nothing is started.

    Exit code 5, and the inequality that failed, when it does not fit.

      qwen-ray plan Qwen/Qwen2.5-72B-Instruct --hardware 8xH100-80G
      qwen-ray plan Qwen/Qwen3-235B-A22B --hardware 2x8xH100-80G --context 32k --concurrency 64 --json
      qwen-ray plan Qwen/Qwen3-30B-A3B --hardware 8xH100-80G --ep 8 --expert-load load.json --num-redundant-experts 8
      qwen-ray plan Qwen/Qwen2.5-72B-Instruct --hardware 8xH100-80G --format helm-values > values.yaml
      qwen-ray plan demo --tp 2
    """
    from qwen_ray.commands.plan import run_plan

    if as_json and form not in (None, "json"):
        raise SettingsError(f"--json and --format {form} exclude each other.", field="format")
    found = Hardware.parse(hardware) if hardware else None
    if found is None and (address := settings.ray_address or running_ray()):
        from qwen_ray.serving.launch import cluster_hardware

        found = cluster_hardware(address)
    shown = "json" if as_json else form or "text"
    run_plan(settings, hardware=found, context=context, concurrency=concurrency, form=shown)


@app.command()
@with_settings(*MODEL_FLAGS, *ENGINE_FLAGS, "cache-dir")
def generate(
    *,
    settings: Settings,
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads it from stdin.")],
    model: Annotated[str | None, typer.Option("--model", "-m", metavar="MODEL", help="Model; default: demo.")] = None,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    url: UrlOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """Continue a text, without starting a server.

    qwen-ray generate "The capital of France is" --max-tokens 20 --temperature 0
    qwen-ray generate "Once upon a time" -m Qwen/Qwen2.5-0.5B
    """
    from qwen_ray.commands.offline import run_generate

    sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    run_generate(settings, sys.stdin.read() if prompt == "-" else prompt, sampling, url=url, api_key=api_key)


@app.command()
@with_settings(*MODEL_FLAGS, *ENGINE_FLAGS, "cache-dir")
def chat(
    *,
    settings: Settings,
    model: ModelArgument = None,
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="System message.")] = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.95,
    seed: Seed = None,
    url: UrlOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """Talk to a model in the terminal; an empty line or Ctrl-D ends it.

    qwen-ray chat
    qwen-ray chat --url http://127.0.0.1:8000
    """
    from qwen_ray.commands.offline import run_chat

    sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    run_chat(settings, system, sampling, url=url, api_key=api_key)


@app.command()
@with_settings(*BATCH_FLAGS)
def batch(
    *,
    settings: Settings,
    requests: Annotated[Path, typer.Argument(metavar="INPUT", help="Requests in OpenAI's batch format (JSONL).")],
    answers: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Where the answers go, as they are done.")],
    model: Annotated[str | None, typer.Option("--model", "-m", metavar="MODEL", help="Model; default: demo.")] = None,
    concurrency: Annotated[
        int, typer.Option("--concurrency", metavar="N", min=1, help="Copies of the model that answer.")
    ] = 1,
) -> None:
    """Answer a file of requests without a server; started again after any end, it goes on where it was.

    Every line of INPUT has custom_id, method (POST), url (/v1/chat/completions, /v1/completions) and body; every
    custom_id gets one line of OUTPUT, in the order in which they are done.

      qwen-ray batch requests.jsonl answers.jsonl
      qwen-ray batch requests.jsonl answers.jsonl -m Qwen/Qwen2.5-7B-Instruct --tp 2 --concurrency 4
    """
    from qwen_ray.commands.batch import run_batch

    run_batch(settings, requests, answers, concurrency)


@app.command()
def bench(
    url: Annotated[str, typer.Option("--url", metavar="URL", help="The server's address.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option("--model", help="Default: the first that it lists.")] = None,
    num_requests: Annotated[int, typer.Option("--num-requests", "-n", min=1, help="Requests in all.")] = 64,
    concurrency: Annotated[int, typer.Option("--concurrency", "-c", min=1, help="Requests open at once.")] = 8,
    request_rate: Annotated[
        float | None,
        typer.Option("--request-rate", min=0.001, help="Requests per second (Poisson), in place of --concurrency."),
    ] = None,
    input_len: Annotated[int, typer.Option("--input-len", min=1, help="Prompt tokens.")] = 128,
    output_len: Annotated[int, typer.Option("--output-len", min=1, help="Output tokens.")] = 64,
    shared_prefix_len: Annotated[
        int, typer.Option("--shared-prefix-len", min=0, help="Prompt tokens that all requests share.")
    ] = 0,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos/--no-ignore-eos", help="Always --output-len tokens.")
    ] = True,
    vocab_size: Annotated[int, typer.Option("--vocab-size", min=1001, help="Prompts use ids below this.")] = 30_000,
    seed: Annotated[int, typer.Option("--seed", help="Of prompts and arrivals.")] = 0,
    api_key: ApiKeyOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Load an OpenAI endpoint (any server's) and print latencies and throughput.

    qwen-ray bench --concurrency 32 --input-len 128 --output-len 64
    qwen-ray bench --request-rate 4 --num-requests 200 --json > run.json
    """
    from qwen_ray.commands.bench import run_bench
    from qwen_ray.commands.load import LoadSpec, served_model

    url = url.rstrip("/").removesuffix("/v1")
    spec = LoadSpec(
        url=url,
        model=model or served_model(url, api_key),
        num_requests=num_requests,
        concurrency=concurrency,
        request_rate=request_rate,
        input_len=input_len,
        output_len=output_len,
        shared_prefix_len=shared_prefix_len,
        ignore_eos=ignore_eos,
        vocab_size=vocab_size,
        seed=seed,
        api_key=api_key,
    )
    run_bench(spec, as_json=as_json)


@app.command()
@with_settings("revision", "cache-dir")
def pull(*, settings: Settings, model: ModelArgument = None) -> None:
    """Fetch a model into the cache; a second call does nothing.

    qwen-ray pull demo
    qwen-ray pull Qwen/Qwen2.5-0.5B-Instruct
    """
    from qwen_ray.commands.pull import run_pull

    run_pull(settings)


@app.command()
def status(
    url: Annotated[str, typer.Option("--url", metavar="URL", help="The server's address.")] = "http://127.0.0.1:8000",
    as_json: JsonFlag = False,
    expert_load: Annotated[
        Path | None,
        typer.Option("--expert-load", metavar="FILE", help="Write how often each expert was asked for to FILE."),
    ] = None,
    api_key: ApiKeyOption = None,
) -> None:
    """Show what a running server is made of: replicas, ranks, memory, KV use.

    qwen-ray status
    qwen-ray status --json | jq '.replicas[0].ranks'
    qwen-ray status --expert-load load.json && qwen-ray plan MODEL --expert-load load.json
    """
    from qwen_ray.commands.status import run_status

    run_status(url.rstrip("/"), as_json=as_json, expert_load=expert_load, api_key=api_key)


@app.command()
@with_settings(*MODEL_FLAGS, *ENGINE_FLAGS, "host", "port", "cache-dir", "address")
def doctor(*, settings: Settings, model: ModelArgument = None, as_json: JsonFlag = False) -> None:
    """Look for what stands in the way of serving, on this machine or on the Ray cluster at --address.

    Versions, GPUs, the network between ranks, shared memory, ports, disk, clocks, kernels, HAProxy, and whether the
    model fits. Each line says what to do. Exit code 1 when something failed; what is only a warning is none.

      qwen-ray doctor
      qwen-ray doctor Qwen/Qwen2.5-7B-Instruct --json
      qwen-ray doctor Qwen/Qwen3-30B-A3B --address 10.0.0.1:6379
    """
    from qwen_ray.commands.doctor import run_doctor

    if not run_doctor(settings, as_json=as_json):
        raise typer.Exit(1)


@app.command()
def key(
    name: Annotated[str | None, typer.Option("--name", metavar="NAME", help="Its name in logs and messages.")] = None,
    from_stdin: Annotated[bool, typer.Option("--stdin", help="Hash the key on stdin; make none.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Make an API key and the hash of it that a server is told.

    qwen-ray key --name team-a
    echo "$OLD_KEY" | qwen-ray key --stdin --name team-a >> keys.yaml
    """
    from qwen_ray.commands.key import run_key

    run_key(name, sys.stdin.readline().strip() if from_stdin else None, as_json=as_json)


@app.command()
def version() -> None:
    """Print the version."""
    from qwen_ray import __version__

    out.print(__version__)


def main(arguments: list[str] | None = None) -> None:
    """Entry point; ends the process with an exit code. Errors of our tree are one message, never a traceback."""
    try:
        app(arguments)
    except QwenRayError as error:
        show_error(str(error))
        if isinstance(error, PlanRefused) and error.inequality and error.inequality not in str(error):
            show_error(error.inequality)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)


if __name__ == "__main__":
    main()
