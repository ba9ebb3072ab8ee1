"""What only shows when nodes stand side by side: versions and clocks. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from qwen_ray.doctor.finding import Finding

WARN_SECONDS = 0.5  # deadlines and the times in logs and traces
FAIL_SECONDS = 2.0  # as long as a replica may be late with a deadline


def compare_versions(versions: Mapping[str, Mapping[str, str]]) -> list[Finding]:
    """`versions`: by node, then by package. Every node must have what most have."""
    versions = {node: have for node, have in versions.items() if have}  # others could not be asked, and that is said
    findings: list[Finding] = []
    most = {
        package: Counter(have.get(package, "missing") for have in versions.values()).most_common(1)[0][0]
        for package in sorted({package for have in versions.values() for package in have})
    }
    for node, have in versions.items():
        other = [
            f"{package} {have.get(package, 'missing')} in place of {usual}"
            for package, usual in most.items()
            if have.get(package, "missing") != usual
        ]
        missing = [package for package, found in have.items() if found == "missing"]
        if other or missing:
            message = ", ".join(other) or f"{', '.join(missing)}: not installed"
            advice = "Install the same versions on all nodes (one image, or `pip install -c constraints.txt`)."
            findings.append(Finding(check="versions", verdict="fail", message=message, advice=advice, node=node))
    if not findings and versions:
        same = ", ".join(f"{package} {found}" for package, found in most.items())
        findings.append(Finding(check="versions", verdict="ok", message=same))
    return findings


def compare_clocks(ahead: Mapping[str, tuple[float, float]]) -> list[Finding]:
    """`ahead`: by node, seconds that its clock is ahead of ours, and how uncertain that is."""
    findings: list[Finding] = []
    for node, (seconds, uncertainty) in ahead.items():
        off = abs(seconds) - uncertainty
        if off > WARN_SECONDS:
            message = f"{abs(seconds):.2f} s {'ahead' if seconds > 0 else 'behind'}"
            advice = "Set its clock (timedatectl set-ntp true, or chrony)."
            verdict = "fail" if off > FAIL_SECONDS else "warn"
            findings.append(Finding(check="clock", verdict=verdict, message=message, advice=advice, node=node))
    if not findings:
        shown = f"{len(ahead)} nodes within {WARN_SECONDS} s" if len(ahead) > 1 else "one node"
        findings.append(Finding(check="clock", verdict="ok", message=shown))
    return findings
