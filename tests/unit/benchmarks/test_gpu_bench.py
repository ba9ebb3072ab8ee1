"""The GPU benchmark without a GPU: its arithmetic, its table, and the whole of it with tiny models on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, replace
from multiprocessing import Pipe
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_rows import COLUMNS, Kept, Row, head_line, line
from benchmarks.gpu_work import StepWork, decode_work, experts_touched, prefill_operations
from qwen_ray.core.stats import StepStats
from qwen_ray.planner.family import FAMILY

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
DENSE, MOE = FAMILY["qwen2.5-7b"], FAMILY["qwen3-30b-a3b"]
DEVICE = {"device": "a chip", "torch": "2"}
MEASURED = {"read_bandwidth": 1e12, "date": "2026-01-01"}


def test_a_decode_reads_what_a_token_passes_through() -> None:
    embedding = DENSE.vocab_size * DENSE.hidden_size
    work = decode_work(DENSE, "bfloat16", 1, 0)
    assert work.num_bytes == pytest.approx(2 * (DENSE.num_parameters - embedding), rel=1e-6)
    assert work.operations == pytest.approx(work.num_bytes, rel=1e-6)
    kv = decode_work(DENSE, "bfloat16", 1, 1000).num_bytes - work.num_bytes
    assert kv == 1000 * 28 * 2 * 4 * 128 * 2  # layers, keys and values, heads, numbers of a head, bytes


def test_alone_a_token_reads_its_own_experts_and_many_read_all() -> None:
    embedding, moe = MOE.vocab_size * MOE.hidden_size, MOE.moe
    assert moe is not None
    one, many = (decode_work(MOE, "bfloat16", n, 0).num_bytes for n in (1, 10_000))
    assert one == pytest.approx(2 * (MOE.num_active_parameters - embedding), rel=1e-6)
    assert many == pytest.approx(2 * (MOE.num_parameters - embedding), rel=1e-6)
    assert experts_touched(MOE, 1) == pytest.approx(moe.num_experts_per_tok)
    assert experts_touched(MOE, 2) == pytest.approx(8 + 8 * (1 - 8 / 128))
    assert experts_touched(DENSE, 5) == 0


def test_four_bits_are_read_with_their_scales_and_computed_as_any() -> None:
    plain, packed = (decode_work(DENSE, dtype, 1, 10) for dtype in ("bfloat16", "int4+bfloat16"))
    layers = sum(map(DENSE.num_layer_parameters, range(28)))
    head = DENSE.vocab_size * DENSE.hidden_size
    assert packed.num_bytes == pytest.approx(layers * (5 / 8) + head + 10 * 28 * 2 * 4 * 128 * 2, rel=0.01)
    assert packed.operations == plain.operations


def test_a_prefill_computes_layers_for_all_and_logits_for_the_last() -> None:
    layers = sum(MOE.num_layer_parameters(i, active=True) for i in range(48))
    head = MOE.vocab_size * MOE.hidden_size
    pairs = 100 * 101 / 2  # a token looks back on itself and all before
    expected = 2 * 100 * layers + 2 * head + 2 * 2 * pairs * 48 * 32 * 128
    assert prefill_operations(MOE, 1, 100) == pytest.approx(expected, rel=1e-6)
    assert prefill_operations(MOE, 3, 100) == 3 * prefill_operations(MOE, 1, 100)


def test_fractions_are_those_of_what_was_measured() -> None:
    work = StepWork(num_bytes=3e9, operations=5e12)
    assert work.bandwidth_fraction(2e-3, 3e12) == pytest.approx(0.5)
    assert work.rate_fraction(10e-3, 1e15) == pytest.approx(0.5)


def test_a_line_has_every_column_in_its_place() -> None:
    row = Row(
        model="m", what="decode", tokens_per_second=1234.56, step_seconds=0.0125, bandwidth_fraction=0.5, note="x"
    )
    fields = [column.field for column in COLUMNS]
    assert len(head_line().split()) > len(fields)
    text, start = line(row), 0
    for column in COLUMNS[:-1]:
        cell = text[start : start + abs(column.width)]
        expected = {"tokens_per_second": "1,234.6", "step_seconds": "12.50", "bandwidth_fraction": "50.0"}
        assert cell.strip() == expected.get(column.field, getattr(row, column.field) or "")
        start += abs(column.width) + 1
    assert text[start:] == "x"


def test_a_run_of_some_models_leaves_the_rows_of_others(tmp_path: Path) -> None:
    path = tmp_path / "results" / "gpu.json"
    first = Kept(path=path)
    first.begin(DEVICE, MEASURED)
    for model in ("a", "b"):
        first.add(Row(model=model, what="decode", tokens_per_second=10.0))
    second = Kept(path=path)
    second.begin(DEVICE, MEASURED | {"date": "2026-01-02"})
    second.forget("a")
    second.add(Row(model="a", what="decode", tokens_per_second=20.0))
    kept = json.loads(path.read_text())
    assert [(row["model"], row["tokens_per_second"]) for row in kept["rows"]] == [("b", 10.0), ("a", 20.0)]
    assert [row["more"]["date"] for row in kept["rows"]] == ["2026-01-01", "2026-01-02"]
    other = Kept(path=path)
    other.begin(DEVICE | {"torch": "3"}, MEASURED)
    assert other.rows == []


def test_the_other_servers_row_has_the_ratio(tmp_path: Path) -> None:
    kept = Kept(path=tmp_path / "gpu.json")
    kept.begin(DEVICE, MEASURED)
    peer = Row(model="transformers:a", what="decode", tokens_per_second=4.0)
    assert "ratio" not in kept.add(peer).more
    kept.add(Row(model="a", what="decode", tokens_per_second=10.0))
    assert kept.add(peer).more["ratio"] == 2.5


def test_what_runs_at_the_same_time_keeps_the_device_busy_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from gpu_device import device_time

    found = device_time([("b", 10.0, 14.0), ("a", 0.0, 8.0), ("a", 2.0, 4.0), ("b", 12.0, 16.0)])
    assert found.busy_seconds == pytest.approx(14e-6)
    assert found.num_kernels == 4
    assert found.kernels == pytest.approx({"a": 10e-6, "b": 8e-6})


def test_steps_are_profiled_behind_those_that_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from gpu_device import CpuDevice, DeviceTime, Limits
    from gpu_measure import ModelBench
    from gpu_models import CPU_SIZES, fit

    class Profile:
        def __init__(self) -> None:
            self.seen = 0

        def start(self) -> None:
            self.seen = num_steps

        def stop(self) -> DeviceTime:
            return DeviceTime(busy_seconds=1e-9 * (num_steps - self.seen), num_kernels=6, kernels={"k": 1e-9})

    class Profiled(CpuDevice):
        def profile(self) -> Profile:  # type: ignore[override]
            return Profile()

    num_steps = 0
    device, sizes = Profiled(), replace(CPU_SIZES, num_profiled=2)
    fitted = fit("tiny", sizes, "cpu", 2**33)
    assert fitted is not None
    bench = ModelBench(fitted, sizes, device, Limits(copy_bandwidth=1e9, read_bandwidth=1e9, product_rate=1e9))
    stepped = bench._bench._stepped

    def counted(stats: StepStats) -> None:
        nonlocal num_steps
        num_steps += 1
        stepped(stats)

    monkeypatch.setattr(bench._bench._engine, "_on_step", counted)
    try:
        row = bench.decode(4)
        assert row.more["num_timed"] == sizes.num_timed
        assert row.busy_seconds == pytest.approx(1e-9)  # two steps were seen
        assert row.note == "3 kernels"
        assert row.step_seconds == pytest.approx(row.busy_seconds + row.host_seconds + row.between_seconds, rel=0.5)
        # The middle of the timed steps: each of four sequences has its prompt and what it was given before.
        assert row.more["num_kv_tokens"] >= 4 * sizes.context
        prefill = bench.prefill()
        assert prefill.busy_seconds is not None
    finally:
        bench.close()


def test_what_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from gpu_models import CUDA_SIZES, fit

    batches = {
        name: fitted.batches if (fitted := fit(name, CUDA_SIZES, "cuda", 85 * 10**9)) else ()
        for name in ("qwen3-8b", "qwen3-30b-a3b", "qwen2.5-72b-int4")
    }
    assert batches == {"qwen3-8b": (1, 64, 256), "qwen3-30b-a3b": (1, 64), "qwen2.5-72b-int4": (1, 64)}
    assert fit("qwen2.5-72b-int4", CUDA_SIZES, "cuda", 40 * 10**9) is None


@pytest.mark.parametrize("name", ["tiny-moe", "tiny-int4"])
def test_a_model_has_all_its_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from gpu_device import CpuDevice, Limits
    from gpu_measure import measure_model
    from gpu_models import CPU_SIZES

    limits = Limits(copy_bandwidth=1e9, read_bandwidth=1e9, product_rate=1e9)
    _check_rows([Row(**asdict(row)) for row in measure_model(name, CPU_SIZES, CpuDevice(), limits)])


def _check_rows(rows: list[Row]) -> None:
    own = {row.what: row for row in rows}
    decodes = ["decode 1 x 32", "decode 4 x 32"]
    assert list(own) == [decodes[0], "prefill 2 x 64", decodes[1], "tokens at 1, 4", "the first again", "memory"]
    for row in (own[what] for what in decodes):
        figures = (row.tokens_per_second, row.bandwidth_fraction, row.rate_fraction, row.between_seconds)
        assert all(figure and figure > 0 for figure in figures)
        assert row.more["num_timed"] == len(row.more["step_seconds"]) > 0
    assert own["prefill 2 x 64"].rate_fraction
    assert own["tokens at 1, 4"].more["num_equal"] == own["tokens at 1, 4"].more["num_compared"] > 5
    assert own["the first again"].note == "the same tokens"
    memory = own["memory"].more
    assert memory["planned"]["weights"] == memory["weights_bytes"]
    assert memory["peak_bytes"] > memory["weights_bytes"] > 0


def test_the_command_prints_one_table_and_keeps_it(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    models = ("tiny", "transformers:tiny")
    command = [sys.executable, BENCHMARKS / "gpu.py", "--device", "cpu", "--models", ",".join(models)]
    done = subprocess.run([*command, "--output", output], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    kept = json.loads(output.read_text())
    assert kept["device"]["torch"] == torch.__version__
    assert min(kept["device"][name] for name in ("copy_bandwidth", "read_bandwidth", "product_rate")) > 0
    rows = [Row(**row) for row in kept["rows"]]
    printed = done.stdout.splitlines()
    assert printed[2] == head_line()
    assert printed[3:-1] == [line(row) for row in rows]
    assert tuple(dict.fromkeys(row.model for row in rows)) == models
    _check_rows([row for row in rows if row.model == "tiny"])
    peers = [row for row in rows if row.model == "transformers:tiny"]
    assert [row.what for row in peers] == ["decode 1 x 32", "prefill 2 x 64"]
    assert all(row.more["ratio"] > 0 for row in peers)


def test_what_fails_and_what_comes_too_late_has_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu
    from gpu_device import Limits

    limits = Limits(copy_bandwidth=1e9, read_bandwidth=1e9, product_rate=1e9)
    (late,) = gpu.answers("tiny", "cpu", limits, time.monotonic())
    assert asdict(late)["note"] == "the time is over"

    def fails(*_: object) -> None:
        raise RuntimeError("no memory\nand more")

    monkeypatch.setattr(gpu, "measure_model", fails)
    receiving, sending = Pipe(duplex=False)
    threads = torch.get_num_threads()
    gpu.measure(sending, "tiny", "cpu", limits)
    torch.set_num_threads(threads)
    assert asdict(receiving.recv())["note"] == "failed: RuntimeError: no memory"


def test_a_name_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    monkeypatch.setattr(sys, "argv", ["gpu.py", "--models", "tiny,gpt"])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "no such model: gpt" in capsys.readouterr().err
