"""Hypothesis strategies for tests that are not state machines.

    @given(story=strategies.stories(), settings=strategies.settings())
    def test_my_agent_survives(story, settings):
        with simulated_world(**settings) as sim:
            agent = MyAgent(sim.manager)
            for step in story.told(sim):
                agent.look()

What they give are plain values whose `repr` can be pasted; nothing happens before a test tells, arranges or arms them.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from attrs import field, frozen
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from gpu_fsm.errors import GPUFSMError
from gpu_fsm.simulation import KINDS, VLM
from gpu_fsm.testing.simulated import OTHER, Simulation

MODES = ("idle", "recording", "autopilot")
FAULTS = tuple((op, kind) for op, kinds in sorted(KINDS.items()) for kind in sorted(kinds) if kind != "gpu_lost")
"""Every (operation, kind) that heals."""


def modes() -> SearchStrategy[str]:
    """The modes that can be asked for, by name."""
    return st.sampled_from(MODES)


def worlds() -> SearchStrategy[dict[str, Any]]:
    """Keyword arguments of `simulated_world` that describe the machine: card, driver, Ollama, how fast things are."""
    return st.fixed_dictionaries(
        {},
        optional={
            "card_mib": st.sampled_from((8192.0, 6400.0, 12288.0, 24576.0)),
            "gpu": st.sampled_from((True, True, False)),
            "clip": st.sampled_from((True, True, False)),
            "tells_holders": st.booleans(),
            "version": st.sampled_from(("0.32.15", "0.24.0")),
            "vlm_load_s": st.floats(0.1, 60.0),
            "reclaim_s": st.floats(0.0, 4.0),
            "generate_s": st.floats(0.01, 30.0),
        },
    )


def settings() -> SearchStrategy[dict[str, Any]]:
    """Keyword arguments of `simulated_world` that are settings of the manager: policies, and times within reason."""
    return st.fixed_dictionaries(
        {},
        optional={
            "on_shortage": st.sampled_from(("degrade", "refuse")),
            "on_partial_offload": st.sampled_from(("reload", "accept", "degrade")),
            "on_close": st.sampled_from(("release", "leave")),
            "idle_timeout_s": st.floats(1.0, 3600.0),
            "keep_alive_margin_s": st.floats(1.0, 600.0),
            "check_interval_s": st.floats(1.0, 120.0),
            "drain_timeout_s": st.floats(0.0, 60.0),
            "vlm_load_retries": st.integers(0, 3),
            "unload_deadline_s": st.floats(1.0, 60.0),
            "settle_timeout_s": st.floats(5.0, 20.0),
            "recover_cap_s": st.floats(2.0, 600.0),
            "stable_s": st.floats(0.0, 120.0),
            "reassert_limit": st.integers(0, 5),
            "reserve_mib": st.floats(128.0, 1024.0),
        },
    )


# --- placements ---


@frozen(kw_only=True)
class Placement:
    """What is where before a story begins."""

    clip: Literal["cpu", "gpu"] = "cpu"
    vlm: Literal["out", "ours", "theirs"] = "out"
    """`theirs`: another client has loaded it, for good."""
    neighbour_mib: float = 0.0
    ollama_up: bool = True

    def arrange(self, simulation: Simulation) -> None:
        """Bring it about, as far as there is room."""
        if self.clip == "gpu":
            with contextlib.suppress(GPUFSMError):
                simulation.manager.migrate_clip_to_gpu()
        if self.vlm == "ours":
            with contextlib.suppress(GPUFSMError):
                simulation.manager.ensure_vlm_loaded()
        elif self.vlm == "theirs":
            simulation.ollama.foreign_load(simulation.world.vlm.name, keep_alive=-1)
            simulation.drive_for(2 * simulation.world.vlm.load_s)
        simulation.neighbour_takes(self.neighbour_mib)
        if not self.ollama_up:
            simulation.ollama.stop()


def placements() -> SearchStrategy[Placement]:
    """Where CLIP and the VLM are, what a neighbour holds, whether Ollama runs."""
    return st.builds(
        Placement,
        clip=st.sampled_from(("cpu", "gpu")),
        vlm=st.sampled_from(("out", "ours", "theirs")),
        neighbour_mib=st.sampled_from((0.0, 500.0, 2000.0, 4000.0, 99999.0)),
        ollama_up=st.sampled_from((True, True, True, False)),
    )


# --- what a server may say ---


@frozen(kw_only=True)
class ServerAnswer:
    """One HTTP answer, whole, as bytes."""

    status: int
    content_type: str
    body: bytes

    def arm(self, simulation: Simulation, op: str, times: float | None = 1) -> None:
        """Have Ollama give it to the next `times` calls of `op` (`ollama.load`, `ollama.ps` ...)."""
        simulation.faults.arm(
            op, "html", times=times, status=self.status, body=self.body, content_type=self.content_type
        )


_NUMBERS = st.one_of(
    st.integers(-(10**40), 10**40), st.floats(), st.sampled_from((float("nan"), float("inf"), -1, 0, 2**63, "7"))
)
_WORDS = st.one_of(st.text(max_size=20), st.sampled_from((VLM, "sim-vlm", "", "\x1b[31mred", "a\nb")))
_JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), _NUMBERS, _WORDS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(_WORDS, inner, max_size=4)),
    max_leaves=12,
)
_ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "name": _WORDS,
        "model": _WORDS,
        "size": _NUMBERS,
        "size_vram": _NUMBERS,
        "expires_at": st.one_of(
            _WORDS, st.just("0001-01-01T00:00:00Z"), st.just("2318-01-01T00:00:00.123456789-07:00")
        ),
        "digest": _WORDS,
        "details": _JSON,
    },
)
_DOCUMENTS = st.one_of(
    st.fixed_dictionaries({"models": st.one_of(st.lists(_ENTRIES, max_size=5), _JSON)}),
    st.fixed_dictionaries({"error": st.one_of(_WORDS, _JSON)}),
    st.fixed_dictionaries({"done": _JSON, "response": _JSON, "model": _WORDS}),
    _JSON,
)
_ODD = st.sampled_from(
    (
        b"",
        b"<html><body>502 Bad Gateway</body></html>",
        b"[" * 100_000,
        b'{"models": [',
        b'{"models": null}',
        b"\xff\xfe\x00",
        b"\xef\xbb\xbf{}",
        b'{"a": 1}{"b": 2}\n',
        b" " * 70_000,
    )
)


def server_answers() -> SearchStrategy[ServerAnswer]:
    """What a server, a proxy or something else on that port may answer: well-formed or not, plausible or absurd."""
    whole = _DOCUMENTS.map(lambda value: json.dumps(value).encode())
    cut = st.tuples(whole, st.integers(0, 40)).map(lambda pair: pair[0][: -pair[1] or None])
    return st.builds(
        ServerAnswer,
        status=st.sampled_from((200, 200, 200, 204, 400, 401, 404, 429, 500, 502, 503)),
        content_type=st.sampled_from(("application/json", "application/x-ndjson", "text/html", "")),
        body=st.one_of(whole, whole, cut, _ODD, st.binary(max_size=64)),
    )


# --- stories ---


@frozen
class Step:
    """One call on a `Simulation`, such as `Step("manager.set_execution_mode", ("recording",))`."""

    call: str
    """Dotted name, beginning at the simulation."""
    arguments: tuple[Any, ...] = ()
    options: Mapping[str, Any] = field(factory=dict)

    def take(self, simulation: Simulation) -> GPUFSMError | None:
        """Make the call; returns the error that the manager answered with, if it did."""
        target: Any = simulation
        for name in self.call.split("."):
            target = getattr(target, name)
        try:
            target(*self.arguments, **self.options)
        except GPUFSMError as error:
            return error
        return None

    def __str__(self) -> str:
        said = [repr(value) for value in self.arguments] + [f"{name}={value!r}" for name, value in self.options.items()]
        return f"sim.{self.call}({', '.join(said)})"


@frozen
class Story:
    """What happens, in order.  Its `str` is a program."""

    steps: tuple[Step, ...]

    def told(self, simulation: Simulation) -> Iterator[Step]:
        """Take the steps one by one; each is given out when it has been taken."""
        for step in self.steps:
            step.take(simulation)
            yield step

    def tell(self, simulation: Simulation) -> None:
        """Take all steps."""
        for step in self.steps:
            step.take(simulation)

    def __str__(self) -> str:
        lines = [
            "from contextlib import suppress",
            "",
            "from gpu_fsm.errors import GPUFSMError",
            "from gpu_fsm.testing import simulated_world",
            "",
            "with simulated_world() as sim:",
        ]
        for step in self.steps:
            lines += ["    with suppress(GPUFSMError):", f"        {step}"]
        return "\n".join([*lines, *(["    pass"] if not self.steps else []), ""])


def _call(name: str, *arguments: SearchStrategy[Any], **options: SearchStrategy[Any]) -> SearchStrategy[Step]:
    return st.builds(Step, st.just(name), st.tuples(*arguments), st.fixed_dictionaries(options))


def steps() -> SearchStrategy[Step]:
    """One thing that the agent, another program or fate does."""
    times = st.sampled_from((1, 2, 5, None))
    arms = st.tuples(st.sampled_from(FAULTS), times).map(
        lambda drawn: Step("faults.arm", drawn[0], {"times": drawn[1]}),
    )
    return st.one_of(
        _call("manager.set_execution_mode", modes(), preempt=st.booleans()),
        _call("manager.set_execution_mode", modes()),
        _call("manager.ensure_vlm_loaded"),
        _call("manager.ensure_vlm_unloaded"),
        _call("manager.migrate_clip_to_gpu"),
        _call("manager.migrate_clip_to_cpu"),
        _call("generate"),
        _call("encode", st.just("a login form")),
        _call("drive_for", st.sampled_from((0.1, 5.0, 60.0, 700.0))),
        _call("neighbour_takes", st.sampled_from((300.0, 2000.0, 99999.0))),
        _call("neighbour_leaves"),
        arms,
        _call("faults.heal"),
        _call("ollama.stop", kill=st.booleans()),
        _call("ollama.start"),
        _call("ollama.foreign_load", st.just(OTHER)),
        _call("ollama.foreign_unload", st.just(VLM)),
    )


def stories(*, min_steps: int = 1, max_steps: int = 20) -> SearchStrategy[Story]:
    """Steps in any order."""
    return st.lists(steps(), min_size=min_steps, max_size=max_steps).map(lambda taken: Story(tuple(taken)))


__all__ = [
    "Placement",
    "ServerAnswer",
    "Step",
    "Story",
    "modes",
    "placements",
    "server_answers",
    "settings",
    "steps",
    "stories",
    "worlds",
]
