"""Replay the recordings of a real Ollama 0.32.15 against the simulated one, and account for every recorded field.

A recording is a tree; every leaf of it is compared exactly, compared within a bound (moments), compared by its type
(what no two servers share), or stands on the ignore list with a reason.  What is in none of these is *left out*, and
that is a failure, as is any difference.  Requests go out at their recorded moments, in virtual time.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any

from attrs import define, field, frozen

from gpu_fsm.errors import ConfigError
from gpu_fsm.ollama import canonical_name
from gpu_fsm.settings import parse_ollama_host
from gpu_fsm.simulation import Exchange, SimulatedClock, SimulatedModel, SimulatedOllama
from gpu_fsm.simulation.wire import Refusal, dumps, short_name

RECORDINGS = Path(__file__).resolve().parent.parent / "data" / "ollama"

NOT_COMPARED: dict[str, str] = {
    "t": "the moment of the recording; requests go out at it",
    "total_ms": "a measured time",
    "sent_ms": "a measured time",
    "polls": "how often the recorder came round",
    "max_latency_ms": "a measured time",
    "cold_ms": "a measured time; its order with warm_ms is compared",
    "warm_ms": "a measured time",
    "unload_ack_ms": "a measured time",
    "gone_from_ps_ms": "a measured time",
    "polls_still_listed": "a race of the recorder's poll with the unload",
    "ppid": "the server's process number",
    "state": "whether the process happened to run or to wait",
}
"""Leaves that have no counterpart, by their last name, and why."""

TYPE_ONLY: dict[str, str] = {
    "total_duration": "a measured time",
    "load_duration": "a measured time",
    "prompt_eval_duration": "a measured time",
    "eval_duration": "a measured time",
    "prompt_eval_count": "the model's own tokens",
    "context": "the model's own tokens",
    "response": "the model's own words (exact where empty)",
    "modified_at": "when the file was put on the disk",
    "created": "when the file was put on the disk",
    "modelfile": "names a folder of the recorded machine",
}
"""Leaves of which the presence and the type are compared, and why not more."""

MOMENTS = ("created_at", "expires_at")
"""Compared within `NEAR_S`, since the replay keeps the recorded moments."""
NEAR_S = 4.0
"""The recorded 1 GB loads took from 1.3 to 6.5 s; the replayed ones take 1.75."""
LOAD_MS = 200.0
"""An answer that took longer waited for a load; the others took 13 ms at most, 30 after a failed load."""

HOSTS = {("s01_basics", "[15]"): "evil.example"}
"""The recorder sent a foreign Host header here; the recording does not hold request headers."""

OTHER_HOSTS: dict[str, str] = {
    ":5": "an empty host is dialled as this machine, by us and by Ollama's own client",
    ":": "an empty host is dialled as this machine, by us and by Ollama's own client",
    "ftp://x": "refused with a ConfigError: Ollama speaks HTTP",
    "HTTP://x": "a scheme is read without regard to case; Ollama's port 11434 is kept",
}
"""Values of OLLAMA_HOST that this package reads otherwise on purpose."""

TINY: dict[str, Any] = {
    "size_mib": 7906262 / 2**20,
    "disk_mib": 1614565 / 2**20,
    "load_s": 0.25,
    "capabilities": ("completion",),
    "family": "llama",
    "parameter_size": "402K",
    "quantization": "unknown",
    "trained_context": 2048,
    "kv_bytes_per_token": 2048,
    "layers": 2,
    "width": 128,
    "heads": 4,
    "kv_heads": 4,
    "feed_forward": 256,
    "vocabulary": 286,
}


def models() -> list[SimulatedModel]:
    """The four models that the recorded server had, oldest first."""
    return [
        SimulatedModel(
            name="tiny-a", digest="f3231584d73b8674fcacd0fa8f6bad320c5c2846285540104c54e6232e5a6377", **TINY
        ),
        SimulatedModel(
            name="tiny-b", digest="a2764b26b3c25124844b38eb064fe8330698e131f203ba93f74e92aefc190c4c", **TINY
        ),
        SimulatedModel(
            name="oom-d",
            digest="2f458eb733f7812a6343267797cf94b6ea4e83c37c9e5b2300e4e515b1ac45f9",
            **TINY | {"trained_context": 100_000_000},
        ),
        SimulatedModel(
            name="big-c",
            digest="29c93995c3310eb49458765aa475c41c2d52f00f9ce501cec5f531653392eb2b",
            **TINY
            | {
                "size_mib": 1231489596 / 2**20,
                "disk_mib": 1009196776 / 2**20,
                "load_s": 1.75,
                "parameter_size": "252.29M",
                "width": 1024,
            },
        ),
    ]


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf with its path; an empty list or object is one."""
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from leaves(value, f"{path}.{key}" if path else key)
    elif isinstance(tree, list) and tree:
        for number, value in enumerate(tree):
            yield from leaves(value, f"{path}[{number}]")
    else:
        yield path, tree


def last_name(path: str) -> str:
    """The name that a leaf's rule goes by: list indices say nothing."""
    return re.sub(r"(\[\d+\])+$", "", path).rpartition(".")[2]


@define
class Tally:
    """What was compared in one scenario, and what is wrong."""

    scenario: str
    requests: int = 0
    exact: int = 0
    near: int = 0
    typed: int = 0
    ignored: Counter[str] = field(factory=Counter)
    problems: list[str] = field(factory=list)

    def line(self) -> str:
        """One row of the table."""
        counts = f"{self.requests:8} {self.exact:6} {self.near:6} {self.typed:6} {sum(self.ignored.values()):8}"
        return f"{self.scenario:<36}{counts} {len(self.problems):9}"


HEAD = f"{'scenario':<36}{'requests':>8} {'exact':>6} {'near':>6} {'typed':>6} {'ignored':>8} {'problems':>9}"


@define(eq=False)
class Sent:
    """A request under way."""

    exchange: Exchange
    sent_at: float
    answered_at: float | None = None

    @property
    def body(self) -> bytes:
        return b"".join(self.exchange.chunks)


@frozen
class Change:
    """What a poller saw new."""

    answered_at: float
    models: list[dict[str, Any]]
    processes: tuple[int, ...]


class Replay:
    """One scenario: the recording, a fresh server, and the comparison."""

    def __init__(self, name: str, recording: Any, server: Callable[..., SimulatedOllama] = SimulatedOllama) -> None:
        self.name = name
        self.recording = recording
        self.tally = Tally(name)
        self.all = dict(leaves(recording))
        self.seen: set[str] = set()
        self.start = min((v for path, v in self.all.items() if last_name(path) == "t"), default=0.0)
        self.clock = SimulatedClock()
        self.server = server(
            models(),
            clock=self.clock,
            generate_s=0.012,
            unload_s=0.003,
            epoch_s=self.start,
            responder=lambda *_: "la la la la la la la la la la la la",
        )
        self.pids: dict[int, int] = {}

    # -- the recording

    def at(self, path: str) -> Any:
        """The recorded value at a path."""
        value = self.recording
        for name, number in re.findall(r"([^.\[\]]+)|\[(\d+)\]", path):
            value = value[name] if name else value[int(number)]
        return value

    # -- acting

    def send(self, path: str) -> Sent:
        """Send the recorded request of this path at its recorded moment, or now if that has passed."""
        recorded = self.at(path)
        moment = recorded["t"] - self.start
        if moment > self.clock.monotonic():
            self.clock.advance_to(moment)
        request = recorded["request"]
        body = request["body"]
        data = b"" if body is None else body.encode() if isinstance(body, str) else dumps(body)
        self.mark(f"{path}.request")
        self.tally.requests += 1
        host = HOSTS.get((self.name, path), "127.0.0.1:11434")
        return self.submit(Exchange(request["method"], request["path"], data, {"Host": host}))

    def do(self, **body: Any) -> Sent:
        """Send a request that the recording does not hold: what the recorder did between two scenes."""
        return self.submit(Exchange("POST", "/api/generate", dumps(body)))

    def submit(self, exchange: Exchange) -> Sent:
        sent = Sent(exchange, self.clock.monotonic())

        def wake() -> None:
            if exchange.closed and sent.answered_at is None:
                sent.answered_at = self.clock.monotonic()

        exchange.wake = wake
        self.server.submit(exchange)
        return sent

    def finish(self, sent: Sent) -> Sent:
        """Wait for the end of an answer."""
        self.clock.run_until(lambda: sent.exchange.closed, self.clock.monotonic() + 60.0)
        return sent

    def step(self, path: str) -> None:
        """One recorded request, alone."""
        self.answer(path, self.finish(self.send(path)))

    def poll(self, seconds: float) -> list[Change]:
        """Start asking `/api/ps` every 5 ms, for so long; the list fills as the clock moves."""
        changes: list[Change] = []
        until = self.clock.monotonic() + seconds

        def ask() -> None:
            sent = Sent(Exchange("GET", "/api/ps"), self.clock.monotonic())

            def wake() -> None:
                if not sent.exchange.closed:
                    return
                kept = ("name", "expires_at", "size", "size_vram")
                found = [{key: model[key] for key in kept} for model in json.loads(sent.body)["models"]]
                if not changes or [m["name"] for m in found] != [m["name"] for m in changes[-1].models]:
                    changes.append(Change(self.clock.monotonic(), found, self.server.processes()))
                if self.clock.monotonic() < until:
                    self.clock.after(0.005, ask)

            sent.exchange.wake = wake
            self.server.submit(sent.exchange)

        ask()
        return changes

    # -- comparing

    def mark(self, path: str) -> None:
        """Everything under this path was used to make the request."""
        for leaf in self.all:
            if leaf == path or leaf.startswith((path + ".", path + "[")):
                self.seen.add(leaf)

    def wrong(self, path: str, recorded: Any, simulated: Any) -> None:
        self.tally.problems.append(f"{self.name} {path}: recorded {recorded!r}, simulated {simulated!r}"[:400])

    def answer(self, path: str, sent: Sent) -> None:
        """Compare a whole answer: status, reason, headers, body, and whether it waited for a load."""
        recorded, exchange = self.at(path), sent.exchange
        self.response(f"{path}.response", recorded["response"], exchange, sent.body)
        self.waited(f"{path}.headers_ms", sent)

    def waited(self, path: str, sent: Sent) -> None:
        recorded_ms, ms = self.at(path), ((sent.answered_at or 1e9) - sent.sent_at) * 1e3
        self.seen.add(path)
        self.tally.near += 1
        if (recorded_ms > LOAD_MS) != (ms > LOAD_MS):
            self.wrong(path, recorded_ms, ms)

    def response(self, path: str, recorded: Mapping[str, Any], exchange: Exchange, body: bytes) -> None:
        status = exchange.status or 0
        self.same(f"{path}.status", recorded["status"], status)
        if "reason" in recorded:
            self.same(f"{path}.reason", recorded["reason"], HTTPStatus(status).phrase)
        before = self.tally.near + self.tally.typed
        if "body" in recorded:
            self.same(f"{path}.body", recorded["body"], _parsed(body))
        elif "tail" in recorded:
            self.same(f"{path}.tail", json.loads(recorded["tail"]), _parsed(body))
            self.seen.add(f"{path}.tail")
        else:
            self.same(f"{path}.body_text", recorded["body_text"], body.decode())
        headers = dict(exchange.headers)
        if self.tally.near + self.tally.typed > before or exchange.method == "HEAD":
            # The body's times have more or fewer digits than the recorded ones: then its own length is the right one.
            if recorded["headers"].get("Content-Length") and not (exchange.method == "HEAD" and exchange.length):
                if headers.get("Content-Length") != str(len(body)):
                    self.wrong(f"{path}.headers.Content-Length", len(body), headers.get("Content-Length"))
                headers["Content-Length"] = recorded["headers"]["Content-Length"]
            elif exchange.method == "HEAD":
                whole = self.finish(self.submit(Exchange("GET", exchange.path))) if exchange.status == 200 else None
                if whole is not None and headers.get("Content-Length") != str(len(whole.body)):
                    self.wrong(f"{path}.headers.Content-Length", len(whole.body), headers.get("Content-Length"))
                headers["Content-Length"] = recorded["headers"]["Content-Length"]
        self.same(f"{path}.headers", recorded["headers"], headers)

    def same(self, path: str, recorded: Any, simulated: Any) -> None:
        """Compare two trees, leaf by leaf, each by its rule."""
        name = last_name(path)
        if isinstance(recorded, dict) and isinstance(simulated, dict) and recorded:
            if set(recorded) != set(simulated):
                self.wrong(path, sorted(recorded), sorted(simulated))
            for key in recorded:
                if key in simulated:
                    self.same(f"{path}.{key}", recorded[key], simulated[key])
            return
        if isinstance(recorded, list) and isinstance(simulated, list) and recorded:
            if name == "models":
                recorded, simulated = self.aligned(path, recorded, simulated)
            if len(recorded) != len(simulated) and name not in TYPE_ONLY:
                self.wrong(path, f"{len(recorded)} entries", f"{len(simulated)} entries")
            for number, value in enumerate(recorded):
                other = simulated[min(number, len(simulated) - 1)] if name in TYPE_ONLY and simulated else None
                if name not in TYPE_ONLY and number < len(simulated):
                    other = simulated[number]
                self.same(f"{path}[{number}]", value, other)
            return
        self.seen.add(path)
        if name in TYPE_ONLY and not (name == "response" and recorded == ""):
            self.tally.typed += 1
            if type(recorded) is not type(simulated):
                self.wrong(path, recorded, simulated)
        elif name in MOMENTS:
            self.tally.near += 1
            if not isinstance(simulated, str) or abs(_seconds(recorded) - _seconds(simulated)) > NEAR_S:
                self.wrong(path, recorded, simulated)
        else:
            self.tally.exact += 1
            if type(recorded) is not type(simulated) or recorded != simulated:
                self.wrong(path, recorded, simulated)

    def aligned(self, path: str, recorded: list[Any], simulated: list[Any]) -> tuple[list[Any], list[Any]]:
        """Lists of `/api/ps` are sorted by whole seconds of expiry; what expires in one second comes in any order."""
        if not all("expires_at" in m for m in [*recorded, *simulated]):
            return recorded, simulated
        seconds = [int(_seconds(model["expires_at"])) for model in simulated]
        if seconds != sorted(seconds, reverse=True):
            self.wrong(path, "longest first", seconds)
        by_name = {model["name"]: model for model in simulated}
        found = [by_name.pop(model["name"], {}) for model in recorded]
        return recorded, [*found, *by_name.values()]

    def processes(self, path: str, numbers: tuple[int, ...]) -> None:
        """Compare how many runners there were and which of them are the same as before.  Both count upwards."""
        recorded = self.at(path)
        pids = sorted(entry[0] if isinstance(entry, list) else entry["pid"] for entry in recorded)
        if len(pids) != len(numbers):
            self.wrong(path, pids, numbers)
        for pid, number in zip(pids, sorted(numbers), strict=False):
            known = self.pids.setdefault(pid, number)
            if known != number or list(self.pids.values()).count(number) > 1:
                self.wrong(path, f"runner {pid} (so far {known})", number)
        if not recorded:
            self.seen.add(path)
        for number, entry in enumerate(recorded):
            pid_at = "[0]" if isinstance(entry, list) else ".pid"
            self.seen.add(f"{path}[{number}]{pid_at}")
            if isinstance(entry, list):
                self.seen.add(f"{path}[{number}][1]")
                self.tally.ignored[NOT_COMPARED["state"]] += 1
        self.tally.exact += max(1, len(recorded))

    def changes(self, path: str, changes: list[Change], start: float, moments: Mapping[str, float]) -> None:
        """Compare a poller's list of changes, and the order of its changes with the answers around them."""
        recorded = self.at(path)["changes"]
        if len(recorded) != len(changes):
            self.wrong(path, [c["models"] for c in recorded], [c.models for c in changes])
        then, now = [], []
        for number, (old, new) in enumerate(zip(recorded, changes, strict=False)):
            place = f"{path}.changes[{number}]"
            self.same(f"{place}.models", old["models"], new.models)
            self.processes(f"{place}.runner_procs", new.processes)
            self.seen.add(f"{place}.answered_ms")
            self.tally.near += 1
            then.append((old["answered_ms"], f"change {number}"))
            now.append(((new.answered_at - start) * 1e3, f"change {number}"))
        for label, moment in moments.items():
            self.seen.add(label)
            self.tally.near += 1
            then.append((self.at(label), label))
            now.append(((moment - start) * 1e3, label))
        if [label for _, label in sorted(then)] != [label for _, label in sorted(now)]:
            self.wrong(f"{path} (order of events)", sorted(then), sorted(now))

    def account(self) -> Tally:
        """Look for what was left out."""
        for path in self.all:
            if path in self.seen:
                continue
            reason = NOT_COMPARED.get(last_name(path))
            if reason is None:
                self.tally.problems.append(f"{self.name} {path}: left out")
            else:
                self.tally.ignored[reason] += 1
        return self.tally


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return body.decode("utf-8", "replace")


def _seconds(stamp: str) -> float:
    return datetime.fromisoformat(stamp).timestamp()


# --- the scenarios ---------------------------------------------------------------------------------------------------


def _in_a_row(replay: Replay) -> None:
    for number in range(len(replay.recording)):
        replay.step(f"[{number}]")


def _load_ps_unload(replay: Replay) -> None:
    for number in range(7):
        replay.step(f"[{number}]")
    unload, start = replay.at("[7]"), 0.0
    start = max(replay.clock.monotonic(), unload["t"] - replay.start - replay.at("[8].unload_sent_ms") / 1e3)
    replay.clock.advance_to(start)
    changes = replay.poll(1.0)
    sent = replay.finish(replay.send("[7]"))
    replay.answer("[7]", sent)
    replay.clock.advance(1.0)
    moments = {"[8].unload_sent_ms": sent.sent_at, "[8].unload_answered_ms": sent.answered_at or 0.0}
    replay.changes("[8].poll", changes, start, moments)
    for number in (9, 10):
        replay.step(f"[{number}]")


def _keep_alive_forms(replay: Replay) -> None:
    for number, item in enumerate(replay.recording):
        replay.same(f"[{number}].keep_alive", item["keep_alive"], item["load"]["request"]["body"]["keep_alive"])
        replay.step(f"[{number}].load")
        replay.step(f"[{number}].ps_after_150ms")
        replay.finish(replay.do(model="tiny-a", keep_alive=0))


def _big_load(replay: Replay) -> None:
    replay.start -= replay.at("load_sent_ms") / 1e3
    replay.server.epoch_s = replay.start
    changes = replay.poll(2.6)
    load = replay.finish(replay.send("load"))
    replay.answer("load", load)
    unload = replay.finish(replay.send("unload"))
    replay.answer("unload", unload)
    replay.clock.advance(1.0)
    moments = {
        "load_sent_ms": load.sent_at,
        "load_answered_ms": load.answered_at or 0.0,
        "unload_sent_ms": unload.sent_at,
        "unload_answered_ms": unload.answered_at or 0.0,
    }
    replay.changes("poll", changes, 0.0, moments)


def _concurrent_loads(replay: Replay) -> None:
    group = [(f"8x_tiny_a[{i}]", replay.send(f"8x_tiny_a[{i}]")) for i in range(8)]
    for path, sent in group:
        replay.answer(path, replay.finish(sent))
    if len({sent.answered_at for _, sent in group}) > 1:
        replay.wrong("8x_tiny_a", "one runner answers all", [sent.answered_at for _, sent in group])
    replay.step("ps1")
    replay.processes("procs1", replay.server.processes())
    replay.finish(replay.do(model="tiny-a", keep_alive=0))
    # They were sent within 1.3 ms, and the second got into the scheduler's queue before the first.
    order = (1, 0, 3, 2)
    mixed = [(f"mixed[{i}]", replay.send(f"mixed[{i}]")) for i in order]
    for path, sent in mixed:
        replay.answer(path, replay.finish(sent))
    recorded = sorted(replay.at("mixed"), key=lambda one: one["t"] + one["headers_ms"] / 1e3)
    kind = [one["request"]["body"]["model"] for one in recorded]
    came = [json.loads(s.exchange.body)["model"] for _, s in sorted(mixed, key=lambda pair: pair[1].answered_at or 0.0)]
    if kind != came:
        replay.wrong("mixed (order of answers)", kind, came)
    replay.step("ps2")
    replay.processes("procs2", replay.server.processes())


def _killed_runner(replay: Replay) -> None:
    server, clock = replay.server, replay.clock
    clock.advance_to(0.0)
    replay.finish(replay.do(model="tiny-a", keep_alive=-1))
    replay.processes("procs_before", server.processes())
    server.kill_runner()
    replay.step("ps_500ms_after_kill")
    replay.step("ps_3s_after_kill")
    replay.processes("procs_after", server.processes())
    replay.step("load_after_kill")
    replay.processes("procs_after_load", server.processes())
    replay.step("ps_after_load")
    server.kill_runner()
    replay.step("unload_after_kill")
    replay.step("ps_after_unload")
    for stream in (True, False):
        moment = replay.at(f"ps_after_{stream}")["t"] - replay.start
        clock.advance_to(max(clock.monotonic(), moment - 2.5))
        replay.finish(replay.do(model="big-c", keep_alive=-1))
        # Behind another prompt, so that it dies before the first byte.
        replay.do(model="big-c", prompt="x", keep_alive=-1)
        sent = replay.do(model="big-c", prompt="x", keep_alive=-1, stream=stream)
        clock.after(0.005, lambda: server.kill_runner("big-c"))
        replay.finish(sent)
        path = f"kill_during_generation_stream_{stream}"
        replay.tally.requests += 1
        replay.response(path, replay.at(path), sent.exchange, sent.body)
        replay.step(f"ps_after_{stream}")
    replay.finish(replay.do(model="big-c", keep_alive=0))
    sent = replay.send("kill_during_load.load")
    clock.advance(0.3)
    replay.processes("kill_during_load.procs", server.processes())
    server.kill_runner()
    replay.answer("kill_during_load.load", replay.finish(sent))
    replay.step("kill_during_load.ps")


def _options_that_reload(replay: Replay) -> None:
    for number, item in enumerate(replay.recording):
        replay.mark(f"[{number}].step")
        replay.step(f"[{number}].req")
        replay.step(f"[{number}].ps")
        replay.processes(f"[{number}].procs", replay.server.processes())
        if not item["procs"]:
            replay.wrong(f"[{number}].procs", "a runner", [])


def _timing(replay: Replay) -> None:
    for name, rounds in replay.recording.items():
        for number, recorded in enumerate(rounds):
            replay.tally.requests += 3
            cold = replay.finish(replay.do(model=name, keep_alive=-1))
            warm = replay.finish(replay.do(model=name, keep_alive=-1))
            took = [(s.answered_at or 0.0) - s.sent_at for s in (cold, warm)]
            replay.tally.near += 1
            if (recorded["cold_ms"] > 100 * recorded["warm_ms"]) != (took[0] > 100 * took[1]):
                replay.wrong(f"{name}[{number}]", [recorded["cold_ms"], recorded["warm_ms"]], took)
            replay.finish(replay.do(model=name, keep_alive=0))
            changes = replay.poll(0.3)
            replay.clock.advance(0.4)
            if changes[-1].models:
                replay.wrong(f"{name}[{number}]", "gone", changes[-1].models)
            replay.processes(f"{name}[{number}].procs_at_gone", changes[-1].processes)


def _expiry(replay: Replay) -> None:
    start = replay.clock.monotonic()
    load = replay.send("load_1s")
    changes = replay.poll(1.9)
    replay.answer("load_1s", replay.finish(load))
    replay.clock.advance_to(start + 2.0)
    replay.changes("poll_1s", changes, start, {})
    start = replay.at("prompt_keepalive0.t") - replay.start - 0.005
    replay.clock.advance_to(start)
    changes = replay.poll(0.6)
    prompt = replay.finish(replay.send("prompt_keepalive0"))
    replay.answer("prompt_keepalive0", prompt)
    replay.clock.advance(0.6)
    replay.changes("poll_prompt0", changes, start, {})


SCENARIOS: dict[str, Callable[[Replay], None]] = {
    "s01_basics": _in_a_row,
    "s02_load_ps_unload": _load_ps_unload,
    "s03_chat": _in_a_row,
    "s04_errors": _in_a_row,
    "s05_keep_alive_forms": _keep_alive_forms,
    "s06_embed": _in_a_row,
    "s07_big_load_poll_unload": _big_load,
    "s08_concurrent_loads": _concurrent_loads,
    "s12_kill_runner": _killed_runner,
    "s16_options_reload": _options_that_reload,
    "s20_load_timing": _timing,
    "s24_expiry_and_prompt_keepalive0": _expiry,
}


def replay(name: str, server: Callable[..., SimulatedOllama] = SimulatedOllama) -> Tally:
    """Replay one recording; `server` makes the simulated one."""
    recording = json.loads((RECORDINGS / f"{name}.json").read_text(encoding="utf-8"))
    one = Replay(name, recording, server)
    SCENARIOS[name](one)
    return one.account()


def addresses_and_names() -> Tally:
    """What Ollama made of values of OLLAMA_HOST and of model names, against our readings of the same."""
    tally = Tally("host-and-name-parsing")
    for line in (RECORDINGS / "host-and-name-parsing.txt").read_text(encoding="utf-8").splitlines():
        if host := re.fullmatch(r'OLLAMA_HOST="(.*)"\s+server/client URL (\S+)\s+connectable (\S+)', line):
            text, _, wanted = host.groups()
            tally.requests += 1
            try:
                ours = parse_ollama_host(text).reveal()
            except ConfigError:
                ours = "refused"
            if text in OTHER_HOSTS:
                tally.ignored[OTHER_HOSTS[text]] += 1
            else:
                tally.exact += 1
                if ours != wanted:
                    tally.problems.append(f"OLLAMA_HOST={text!r}: recorded {wanted}, ours {ours}")
        elif name := re.fullmatch(r'name "(.*)"\s+valid (true|false)\s+full (.*?)\s+ps shows (.*?)\s*', line):
            text, valid, _, shown = name.groups()
            tally.requests += 1
            tally.exact += 2
            try:
                simulated = short_name(text)
            except Refusal:
                simulated = "refused"
            if simulated != (shown if valid == "true" else "refused"):
                tally.problems.append(f"name {text!r}: recorded {valid} {shown}, simulated {simulated}")
            if valid == "true" and canonical_name(text) != shown.casefold():
                tally.problems.append(f"name {text!r}: recorded {shown}, ours {canonical_name(text)}")
        else:
            tally.problems.append(f"host-and-name-parsing: a line that nobody read: {line!r}")
    return tally


def everything() -> list[Tally]:
    """Replay all recordings that lie in the folder; one without a script is a problem."""
    tallies = [replay(name) for name in SCENARIOS]
    tallies.append(addresses_and_names())
    strange = {path.name for path in RECORDINGS.iterdir()} - {f"{tally.scenario}.json" for tally in tallies}
    strange -= {"host-and-name-parsing.txt"}
    return [*tallies, *(Tally(name, problems=[f"{name}: no script replays it"]) for name in sorted(strange))]
