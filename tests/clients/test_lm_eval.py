"""lm-eval with tasks of its own, made here: a generation, and log-likelihoods that equal transformers'."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MODEL
from environments import environment
from programs_run import run
from tokenizers import Tokenizer
from transformers import Qwen2ForCausalLM

NUM_ITEMS = 50  # of two choices each
TOLERANCE = 1e-3

LIKELIHOOD = """\
task: local_likelihood
dataset_path: json
dataset_kwargs: {{data_files: {data}}}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
target_delimiter: " "
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
GENERATION = """\
task: local_generation
dataset_path: json
dataset_kwargs: {{data_files: {data}}}
test_split: train
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 8, do_sample: false, temperature: 0}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    dice = random.Random(0)
    words = ["the", "sea", "is", "blue", "and", "wide;", "what", "Grüße", "世界", "(or", "more)", "do", "you", "know?"]
    with (folder / "data.jsonl").open("w") as file:
        for number in range(NUM_ITEMS):
            question = " ".join(dice.choices(words, k=dice.randint(1, 12)))
            choices = [" ".join(dice.choices(words, k=dice.randint(1, 4))) for _ in range(2)]
            file.write(json.dumps({"question": f"{number} {question}", "choices": choices}) + "\n")
    for name, text in (("likelihood", LIKELIHOOD), ("generation", GENERATION)):
        (folder / f"{name}.yaml").write_text(text.format(data=folder / "data.jsonl"))
    return folder


def evaluate(url: str, tasks: Path, task: str, output: Path) -> list[dict[str, Any]]:
    """One sample for each item (and, of likelihoods, its two choices)."""
    arguments = f"model={MODEL},base_url={url}/v1/completions,tokenizer_backend=remote,num_concurrent=4,max_length=4000"
    run(
        str(environment("lm-eval") / "bin" / "lm_eval"),
        *("--model", "local-completions", "--model_args", arguments),
        *("--tasks", task, "--include_path", str(tasks), "--output_path", str(output), "--log_samples"),
    )
    (samples,) = output.rglob(f"samples_{task}_*.jsonl")
    return [json.loads(line) for line in samples.read_text().splitlines()]


def test_loglikelihoods_equal_transformers(url: str, model_path: Path, tasks: Path, tmp_path: Path) -> None:
    samples = evaluate(url, tasks, "local_likelihood", tmp_path)
    model = Qwen2ForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    tokenizer = Tokenizer.from_file(str(model_path / "tokenizer.json"))
    compared = 0
    for sample in samples:
        for (context, continuation), ((loglikelihood, is_greedy),) in zip(pairs(sample), sample["resps"], strict=True):
            ids = tokenizer.encode(context + continuation).ids
            num_context = len(tokenizer.encode(context).ids)
            with torch.inference_mode():
                logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            expected = sum(float(logprobs[at - 1, ids[at]]) for at in range(num_context, len(ids)))
            all_likeliest = all(int(logprobs[at - 1].argmax()) == ids[at] for at in range(num_context, len(ids)))
            assert float(loglikelihood) == pytest.approx(expected, abs=TOLERANCE)
            assert str(is_greedy) == str(all_likeliest)
            compared += 1
    assert compared == 2 * NUM_ITEMS


def pairs(sample: dict[str, Any]) -> list[tuple[str, str]]:
    return [(arguments["arg_0"], arguments["arg_1"]) for _, arguments in sorted(sample["arguments"].items())]


def test_generations(url: str, tasks: Path, tmp_path: Path) -> None:
    samples = evaluate(url, tasks, "local_generation", tmp_path)
    assert len(samples) == NUM_ITEMS
    assert all(isinstance(sample["resps"][0][0], str) and "\n" not in sample["resps"][0][0] for sample in samples)
    assert any(sample["resps"][0][0] for sample in samples)
