"""The reference agent: it records screens with the VLM and then recognises them with CLIP.

Three parts that know nothing of each other: `UIDetector` asks the VLM what a screen is, `FusionEngine` remembers the
embeddings of labelled screens, `ExecutionLoop` drives the manager's modes and decides which of the two a screen needs.
None of them touches the card: whatever they need they lease from the manager, and a "no" is an answer to work with.

`screens` is where screens come from, `doors` what the agent needs of a manager, `stopping` how signals end it.
"""

from __future__ import annotations

from gpu_fsm.agent.detector import UNKNOWN_LABEL, Classification, UIDetector
from gpu_fsm.agent.doors import CLIPSession, Manager, VLMSession
from gpu_fsm.agent.loop import ExecutionLoop, Step
from gpu_fsm.agent.memory import (
    ExactIndex,
    FusionEngine,
    Limits,
    Match,
    ScreenMemoryError,
    VectorIndex,
    Verdict,
    Weights,
    probe_image,
)
from gpu_fsm.agent.screens import Screen, ScreenLost, find_screens, frames, live, load_screens
from gpu_fsm.agent.stopping import Stopped, Stopper

__all__ = [
    "UNKNOWN_LABEL",
    "CLIPSession",
    "Classification",
    "ExactIndex",
    "ExecutionLoop",
    "FusionEngine",
    "Limits",
    "Manager",
    "Match",
    "Screen",
    "ScreenLost",
    "ScreenMemoryError",
    "Step",
    "Stopped",
    "Stopper",
    "UIDetector",
    "VLMSession",
    "VectorIndex",
    "Verdict",
    "Weights",
    "find_screens",
    "frames",
    "live",
    "load_screens",
    "probe_image",
]
