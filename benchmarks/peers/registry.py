"""The servers that are compared, by the name they have on the command line and in the table."""

from __future__ import annotations

from benchmarks.peers.llama_cpp import LlamaCpp
from benchmarks.peers.openvino import OpenVino
from benchmarks.peers.peer import Peer
from benchmarks.peers.qwen_ray import QwenRay
from benchmarks.peers.transformers import Transformers
from benchmarks.peers.vllm_cpu import VllmCpu

# Ours first; the others are what ours is held against, but for variants of ours.
OURS = "qwen-ray"
PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        QwenRay(),
        QwenRay("qwen-ray-tp2", "--tp", "2"),
        LlamaCpp(),
        VllmCpu(),
        OpenVino(),
        Transformers("transformers", "continuous"),
        Transformers("transformers-generate", "static"),
    )
}


def is_ours(name: str) -> bool:
    return name.startswith(OURS)
