"""Every wish of the settings reaches the planner."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from qwen_ray.config import load_settings
from qwen_ray.core.errors import PlanRefused, SettingsError
from qwen_ray.core.hardware import Hardware
from qwen_ray.core.packed_format import PackedFormat
from qwen_ray.planner.candidate import PlanRequest
from qwen_ray.planner.family import lookup
from qwen_ray.planner.search import plan
from qwen_ray.sizing import plan_request


def asked(
    model: str, flags: dict[str, object], *, only_plan: bool = False, hardware: str = "1xcpu-256G"
) -> PlanRequest:
    settings = load_settings(None, {"model": model, **flags}, {})
    config = lookup(model)
    assert config is not None
    return plan_request(settings, settings.models[0], config, Hardware.parse(hardware), dp=1, only_plan=only_plan)


def test_wishes_about_experts_are_passed_on(tmp_path: Path) -> None:
    file = tmp_path / "load.json"
    tokens = [[float(i)] * 128 for i in range(48)]
    file.write_text(json.dumps({"model": "m", "num_experts": 128, "expert_tokens": tokens}))
    flags = {"ep": 2, "dp-attention": 2, "num-redundant-experts": 2, "expert-load": str(file)}
    request = asked("Qwen/Qwen3-30B-A3B", {**flags, "enable-eplb": True, "eplb-interval": 5})
    assert (request.ep, request.dp_attention, request.num_redundant_experts) == (2, 2, 2)
    assert request.expert_load == tuple(map(tuple, tokens))
    spec = plan(request).require().replica_spec(name="m", path="/m")
    assert spec.eplb_interval == 5
    assert (spec.plan.ep, spec.plan.dp_attention, spec.engine.dp_attention) == (2, 2, 2)
    assert asked("Qwen/Qwen3-30B-A3B", {}).eplb_interval is None


def test_a_load_that_is_no_json_is_named(tmp_path: Path) -> None:
    file = tmp_path / "load.json"
    file.write_text("{")
    with pytest.raises(SettingsError, match=r"load\.json: is not JSON"):
        asked("Qwen/Qwen3-30B-A3B", {"expert-load": str(file)})


def test_quantization_reaches_the_ranks() -> None:
    request = asked("Qwen/Qwen2.5-0.5B-Instruct", {"quantization": "int8", "dtype": "float32"})
    assert (request.weight_dtype, request.compute_dtype) == ("int8+float32", "float32")
    spec = plan(request).require().replica_spec(name="m", path="/m")
    assert (spec.quantization, spec.dtype) == ("int8", "float32")
    plain = plan(asked("Qwen/Qwen2.5-0.5B-Instruct", {"dtype": "float32"})).require()
    assert plain.replica_spec(name="m", path="/m").fingerprint != spec.fingerprint


def test_deterministic_is_for_one_gpu_or_any_cpus() -> None:
    for hardware, degrees in (("1xcpu-256G", {"tp": 2}), ("1xH100", {}), ("2xcpu-64G", {"pp": 2})):
        request = asked("Qwen/Qwen2.5-7B-Instruct", {"deterministic": True, **degrees}, hardware=hardware)
        assert plan(request).require().replica_spec(name="m", path="/m").deterministic
    assert not plan(asked("demo", {})).require().replica_spec(name="m", path="/m").deterministic
    for degrees in ({"tp": 2}, {"pp": 2}):
        request = asked("Qwen/Qwen2.5-7B-Instruct", {"deterministic": True, **degrees}, hardware="2xH100")
        with pytest.raises(PlanRefused, match="deterministic on GPUs is for one rank: 2 > 1"):
            plan(request).require()


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_gpus_hold_weights_in_few_bits(quantization: str) -> None:
    """32 GB of weights on a GPU of 24."""
    request = asked("Qwen/Qwen3-14B", {"quantization": quantization, "max-model-len": 4096}, hardware="1xRTX4090-24G")
    assert request.weight_dtype == f"{quantization}+bfloat16"
    spec = plan(request).require().replica_spec(name="m", path="/m")
    assert (spec.device, spec.quantization, spec.dtype) == ("cuda", quantization, "bfloat16")


@pytest.mark.parametrize("hardware", ["1xH100-80G", "1xcpu-64G"])
def test_quantization_that_nothing_computes_is_refused(hardware: str) -> None:
    with pytest.raises(SettingsError, match=r"models\.0\.quantization: int4 and dtype fp8 exclude each other"):
        asked("Qwen/Qwen3-8B", {"quantization": "int4", "dtype": "fp8"}, only_plan=True, hardware=hardware)


@pytest.mark.parametrize(
    ("packed", "hardware", "expected"),
    [
        (PackedFormat(method="awq", bits=4, group=128), "1xcpu-64G", ("int4", "bfloat16")),
        (PackedFormat(method="gptq", bits=4), "1xcpu-64G", ("int4", "bfloat16")),
        (PackedFormat(method="gptq", bits=4, group=16), "1xcpu-64G", ("none", None)),
        (PackedFormat(method="gptq", bits=4, group=128, in_order=False), "1xcpu-64G", ("none", None)),
        (PackedFormat(method="gptq", bits=8, group=128), "1xcpu-64G", ("none", None)),
        (PackedFormat(method="awq", bits=4, group=128), "1xH100-80G", ("int4", None)),
        (PackedFormat(method="gptq", bits=4, group=128, in_order=False), "1xH100-80G", ("none", None)),
        (None, "1xcpu-64G", ("none", None)),
    ],
)
def test_4_bits_of_a_checkpoint_stay_where_they_can(
    packed: PackedFormat | None, hardware: str, expected: tuple[str, str | None]
) -> None:
    config = lookup("Qwen/Qwen2.5-0.5B-Instruct")
    assert config is not None
    config = replace(config, packed=packed, dtype="float16")
    settings = load_settings(None, {"model": "m"}, {})
    request = plan_request(settings, settings.models[0], config, Hardware.parse(hardware))
    assert (request.quantization, request.dtype) == expected


def test_fp8_is_only_planned_with() -> None:
    assert asked("Qwen/Qwen3-30B-A3B", {"dtype": "fp8"}, only_plan=True).weight_dtype == "fp8"
    with pytest.raises(SettingsError, match="fp8"):
        asked("Qwen/Qwen3-30B-A3B", {"dtype": "fp8"})


@pytest.mark.parametrize("flag", ["num-redundant-experts", "enable-eplb", "expert-load"])
def test_experts_of_a_dense_model_cannot_be_asked_for(flag: str) -> None:
    with pytest.raises(SettingsError, match=r"models\.0\.experts\."):
        asked("Qwen/Qwen3-8B", {flag: "1"})
