"""All checks of a machine, or of a cluster, as one list of findings. What to ask comes from the commands."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

from qwen_ray.cluster.everywhere import Everywhere
from qwen_ray.core.errors import QwenRayError
from qwen_ray.core.hardware import Hardware
from qwen_ray.doctor import network, probe
from qwen_ray.doctor.checks import Question
from qwen_ray.doctor.compare import compare_clocks, compare_versions
from qwen_ray.doctor.finding import Finding, guarded
from qwen_ray.doctor.reach import MEETING_SECONDS, START_SECONDS, Meeting, Met, attend, free_port

TASK_SECONDS = 30.0  # for a worker of Ray's to start on a node
NETWORK_SECONDS = 400.0
CLOCK_TRIES = 3

Watch = Callable[[str], None]  # told what is being looked at


def examine_machine(question: Question, num_gpus: int, watch: Watch) -> list[Finding]:
    """This one, with so many GPUs."""
    watch("this machine")
    report = probe.examine(question)
    watch("the network")
    met = guarded("network", NETWORK_SECONDS, partial(network.own_network, num_gpus))
    return [*report.findings, *compare_versions({"": report.versions}), *met]


def examine_cluster(address: str, question: Question, watch: Watch) -> tuple[list[Finding], Hardware | None]:
    """Of the Ray cluster there: findings, and what it is made of; None where it cannot be joined."""
    watch(f"the Ray cluster at {address}")
    try:
        nodes = Everywhere(address)
    except QwenRayError as error:
        advice = "Look whether it runs (ray status), and whether Ray's version here is its version."
        return [Finding(check="cluster", verdict="fail", message=str(error), advice=advice)], None
    try:
        return _examine_nodes(nodes, question, watch), nodes.hardware()
    finally:
        nodes.close()


def _examine_nodes(nodes: Everywhere, question: Question, watch: Watch) -> list[Finding]:
    """`question.port` is asked of the head alone: the proxy stands there."""
    findings: list[Finding] = []
    reports: dict[str, probe.NodeReport] = {}
    watch(f"{len(nodes.names)} nodes")

    def look(name: str) -> list[Finding]:
        asked = question if name == nodes.names[0] else replace(question, port=None)
        report = reports[name] = nodes.run(name, TASK_SECONDS + probe.PROBE_SECONDS, probe.examine, asked)
        return [replace(finding, node=name) for finding in report.findings]

    with ThreadPoolExecutor(16) as beside:
        seconds = TASK_SECONDS + probe.PROBE_SECONDS + 5
        for name, found in zip(
            nodes.names,
            beside.map(lambda name: guarded("node", seconds, partial(look, name)), nodes.names),
            strict=True,
        ):
            findings += [replace(finding, node=name) for finding in found]
    findings += compare_versions({"": probe.versions()} | {name: r.versions for name, r in reports.items()})
    watch("clocks")
    findings += guarded("clock", TASK_SECONDS * len(nodes.names), partial(_clocks, nodes, list(reports)))
    watch("the network")
    findings += guarded("network", NETWORK_SECONDS + 60 * len(reports), partial(_network, nodes, list(reports)))
    return findings


def _clocks(nodes: Everywhere, names: Sequence[str]) -> list[Finding]:
    return compare_clocks({name: _ahead(nodes, name) for name in names})


def _ahead(nodes: Everywhere, name: str) -> tuple[float, float]:
    """Seconds that the node's clock is ahead of ours, and half of the time that asking took: the best of some tries."""
    tries: list[tuple[float, float]] = []
    for _ in range(CLOCK_TRIES):
        begun = time.time()
        its = nodes.run(name, TASK_SECONDS, probe.now)
        ended = time.time()
        tries.append((its - (begun + ended) / 2, (ended - begun) / 2))
    return min(tries, key=lambda one: one[1])


def _network(nodes: Everywhere, names: Sequence[str]) -> list[Finding]:
    if len(names) < 2:
        only = names[0] if names else "none"
        return [Finding(check="network", verdict="ok", message=f"no other node that answers to reach ({only})")]
    by_address = {nodes.addresses[name]: name for name in names}
    if len(by_address) < len(names):
        return [Finding(check="network", verdict="ok", message="all nodes are on this machine")]

    def port(address: str) -> int:
        return nodes.run(by_address[address], TASK_SECONDS, free_port, address)

    def ask(address: str, meetings: Sequence[Meeting]) -> list[Met]:
        seconds = TASK_SECONDS + START_SECONDS + 2 * MEETING_SECONDS * len(meetings)
        try:
            return nodes.run(by_address[address], seconds, attend, meetings)
        except QwenRayError as error:
            return [Met(error=str(error))] * len(meetings)

    gpus = {nodes.addresses[name]: nodes.num_gpus[name] for name in names}
    return network.between(list(by_address), port, ask, gpus)
