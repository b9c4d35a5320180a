"""Birth and death of a manager: close in every situation, interpreter exit, the shared one, forks, Ctrl-C."""

from __future__ import annotations

import contextlib
import contextvars
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future

import pytest

from gpu_fsm import GPUResourceConfig, GPUResourceManager
from gpu_fsm.errors import GPUFSMError, ManagerClosed, OperationTimeout
from gpu_fsm.events import Event
from gpu_fsm.ollama import OllamaManager
from gpu_fsm.simulation import OllamaHTTPServer, RunningClock, SimulatedModel, SimulatedOllama, SimulatedWorld
from gpu_fsm.states import STABLE, State
from gpu_fsm.tickets import Outcome
from tests.waiting import PATIENCE_S, Gate, in_thread, journal_is_whole, let_time_pass, run_python, threads_of, until
from tests.worlds import inline, threaded

IN_A_WORLD = """
import os, sys, threading
from gpu_fsm import GPUResourceManager
from gpu_fsm.errors import ForkedProcess, ManagerClosed
from gpu_fsm.ollama import OllamaManager
from gpu_fsm.simulation import SimulatedWorld

def made(shared=False, **settings):
    world = SimulatedWorld()
    config = world.config(**settings)
    ports = world.ports(OllamaManager(config, clock=world.clock, transport=world.transport))
    return world, (GPUResourceManager.shared if shared else GPUResourceManager)(config, **ports)

def in_child(check):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            check()
            code = 0
        except BaseException as error:
            print("child:", repr(error), file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
"""
"""What the subprocesses of this file begin with."""

FORKING = ("-W", "ignore::DeprecationWarning")
"""Newer Pythons warn of a fork beside threads; that it is safe here is what is tested."""


def calls(manager: GPUResourceManager) -> dict[str, Callable[[], object]]:
    """Every public call that needs a living manager."""

    def vlm() -> None:
        with manager.vlm():
            pass

    def clip() -> None:
        with manager.clip():
            pass

    return {
        "set_execution_mode": lambda: manager.set_execution_mode("idle"),
        "submit_execution_mode": lambda: manager.submit_execution_mode("idle"),
        "ensure_vlm_loaded": manager.ensure_vlm_loaded,
        "ensure_vlm_unloaded": manager.ensure_vlm_unloaded,
        "migrate_clip_to_gpu": manager.migrate_clip_to_gpu,
        "migrate_clip_to_cpu": manager.migrate_clip_to_cpu,
        "vlm": vlm,
        "clip": clip,
    }


def lease_elsewhere(manager: GPUResourceManager, model: str, holder: str) -> Callable[[], None]:
    """Take a lease as somebody else would, in a context of its own; returns what ends it."""
    context = contextvars.Context()
    lease = getattr(manager, model)(holder=holder)
    context.run(lease.__enter__)
    return lambda: context.run(lease.__exit__, None, None, None)


# --- close ---


def test_close_gives_back_what_is_ours_and_leaves_no_thread() -> None:
    """After `close()` our VLM is out, CLIP is on the CPU, the ports are closed and both threads have ended."""
    world = SimulatedWorld()
    manager = threaded(world)
    manager.set_execution_mode("autopilot", timeout_s=PATIENCE_S)
    manager.ensure_vlm_loaded(timeout_s=PATIENCE_S)
    assert world.vlm_resident()
    assert manager.close() == ()
    assert world.vlm_held_mib() == 0
    assert world.clip.place == "cpu"
    assert world.probe.closed
    assert world.clip.closed
    assert threads_of(manager) == []
    assert manager.get_status().closed
    journal_is_whole(manager)


def test_close_leaves_the_vlm_where_the_settings_say_so() -> None:
    """`on_close = leave` sends no unload."""
    world = SimulatedWorld()
    manager = inline(world, on_close="leave")
    manager.set_execution_mode("recording")
    assert manager.close() == ()
    assert world.vlm_resident()


def test_close_does_not_unload_what_somebody_else_loaded() -> None:
    """A VLM that this manager neither loaded nor used stays."""
    world = SimulatedWorld()
    world.ollama.foreign_load(world.vlm.name)
    world.clock.advance(10)
    manager = inline(world)
    manager.drive_for(1)
    assert manager.close() == ()
    assert world.vlm_resident()


def test_close_is_idempotent() -> None:
    """Closing again does nothing and says nothing."""
    world = SimulatedWorld()
    manager = threaded(world)
    manager.set_execution_mode("recording", timeout_s=PATIENCE_S)
    assert manager.close() == ()
    unloads = world.ollama.counts["unloads"]
    assert manager.close() == ()
    with manager:
        pass
    assert world.ollama.counts["unloads"] == unloads == 1


def test_late_calls_raise_manager_closed() -> None:
    """Every call that asks for something raises `ManagerClosed`; looking still works."""
    world = SimulatedWorld()
    manager = threaded(world)
    manager.close()
    for name, call in calls(manager).items():
        with pytest.raises(ManagerClosed) as caught:
            call()
        assert caught.value.remedy, name
    assert manager.get_status().closed
    assert manager.get_clip_device() == "cpu"
    assert "IDLE" in manager.explain("idle")
    assert manager.journal[-1].dest is State.IDLE


def test_close_from_several_threads_is_one_close() -> None:
    """Eight threads close at once: all return, one unload is sent, no thread is left."""
    world = SimulatedWorld()
    manager = threaded(world)
    manager.set_execution_mode("recording", timeout_s=PATIENCE_S)
    start = threading.Barrier(8)

    def close() -> tuple[str, ...]:
        start.wait(PATIENCE_S)
        return manager.close()

    for closing in [in_thread(close) for _ in range(8)]:
        assert closing.result(PATIENCE_S) == ()
    assert world.ollama.counts["unloads"] == 1
    assert threads_of(manager) == []


@pytest.mark.parametrize(
    ("op", "phase", "mode"),
    [
        ("ollama.load", "before", "recording"),
        ("ollama.load", "after", "recording"),
        ("clip.to_gpu", "before", "autopilot"),
        ("clip.to_gpu", "after", "autopilot"),
        ("ollama.unload", "before", "unload"),
        ("ollama.unload", "after", "unload"),
        ("ollama.ps", "before", "recording"),
        ("probe.read", "before", "recording"),
    ],
)
def test_close_in_the_middle_of_a_step_gives_everything_back(op: str, phase: str, mode: str) -> None:
    """Wherever a step is when `close()` comes: its caller gets `ManagerClosed`, and nothing of ours stays."""
    world = SimulatedWorld()
    manager = threaded(world)
    if mode == "unload":
        manager.set_execution_mode("recording", timeout_s=PATIENCE_S)
        manager.set_execution_mode("idle", timeout_s=PATIENCE_S)
    gate = Gate(world, op, phase)
    asking = in_thread(manager.ensure_vlm_unloaded if mode == "unload" else lambda: manager.set_execution_mode(mode))
    gate.wait()
    closing = in_thread(manager.close)
    until(lambda: manager._driver._closing is not None)
    gate.open()
    assert closing.result(PATIENCE_S) == ()
    with contextlib.suppress(ManagerClosed):
        asking.result(PATIENCE_S)
    assert world.vlm_held_mib() == 0
    assert world.clip.place == "cpu"
    assert threads_of(manager) == []
    journal_is_whole(manager)


@pytest.mark.parametrize("quarter", [1, 2, 3, 4])
def test_close_in_any_quarter_of_a_load_cuts_it_off(quarter: int) -> None:
    """A load is not waited for: its socket is closed and the half-loaded model goes."""
    world = SimulatedWorld()
    manager = threaded(world)
    quarters: list[str] = []

    def close(op: str, phase: str) -> None:
        if phase == "during":
            quarters.append(op)
            if len(quarters) == quarter:
                manager._driver.post_close()

    world.on_io.append(close)
    with pytest.raises(ManagerClosed):
        manager.set_execution_mode("recording", timeout_s=PATIENCE_S)
    assert manager.close() == ()
    assert world.vlm_held_mib() == 0


def test_queued_tickets_get_manager_closed() -> None:
    """What waits in the mailbox when `close()` comes is answered with `ManagerClosed`, at once."""
    world = SimulatedWorld()
    gate = Gate(world, "ollama.load")
    manager = threaded(world)
    running = in_thread(manager.ensure_vlm_loaded)
    gate.wait()
    queued = [manager.submit_execution_mode(mode) for mode in ("recording", "idle", "autopilot")]
    closing = in_thread(manager.close)
    for future in queued:
        assert isinstance(future.exception(PATIENCE_S), ManagerClosed)
    gate.open()
    assert closing.result(PATIENCE_S) == ()
    with pytest.raises(ManagerClosed):
        running.result(PATIENCE_S)


def test_a_ticket_that_waits_for_leases_gets_manager_closed() -> None:
    """Waiting for a lease to end ends with the manager."""
    world = SimulatedWorld()
    manager = threaded(world, drain_timeout_s=5)
    manager.set_execution_mode("autopilot", timeout_s=PATIENCE_S)
    end = lease_elsewhere(manager, "clip", "a long encode")
    waiting = manager.submit_execution_mode("recording")
    until(lambda: manager._driver.engine.waiting)
    closing = in_thread(manager.close)
    assert isinstance(waiting.exception(PATIENCE_S), ManagerClosed)
    end()
    assert closing.result(PATIENCE_S) == ()
    assert world.clip.place == "cpu"


def test_close_waits_for_leases_only_so_long_and_names_what_it_leaves() -> None:
    """A CLIP lease that does not end: after `drain_timeout_s` the close goes on without it and says who holds it."""
    world = SimulatedWorld()
    manager = inline(world, drain_timeout_s=3)
    manager.set_execution_mode("autopilot")
    manager.ensure_vlm_loaded()
    end = lease_elsewhere(manager, "clip", "the endless one")
    began = world.clock.monotonic()
    left = manager.close()
    assert world.clock.monotonic() - began < 3 + 10
    assert len(left) == 1
    assert "CLIP" in left[0]
    assert "the endless one" in left[0]
    assert world.vlm_held_mib() == 0
    end()
    assert world.clip.violations == []


def test_close_takes_the_vlm_from_a_lease_that_does_not_end() -> None:
    """A VLM lease is waited for, then its model goes all the same: Ollama lets a running request finish."""
    world = SimulatedWorld()
    manager = inline(world, drain_timeout_s=3)
    manager.set_execution_mode("recording")
    end = lease_elsewhere(manager, "vlm", "the endless one")
    began = world.clock.monotonic()
    assert manager.close() == ()
    assert 3 <= world.clock.monotonic() - began < 3 + 10
    end()
    assert world.vlm_held_mib() == 0


def test_close_ends_as_soon_as_the_lease_does() -> None:
    """The drain is a limit and not a pause."""
    world = SimulatedWorld()
    manager = threaded(world, drain_timeout_s=1000)
    manager.set_execution_mode("autopilot", timeout_s=PATIENCE_S)
    end = lease_elsewhere(manager, "clip", "a short encode")
    closing = in_thread(manager.close)
    until(lambda: manager._driver.engine.waiting)
    assert not closing.done()
    end()
    assert closing.result(PATIENCE_S) == ()
    assert world.clip.place == "cpu"


def test_close_within_the_caller_s_own_lease_does_not_wait_for_ever() -> None:
    """Closing inside a `with manager.clip()` block: the lease is left, the close is bounded, the block may end."""
    world = SimulatedWorld()
    manager = inline(world, drain_timeout_s=2)
    manager.set_execution_mode("autopilot")
    with manager.clip(holder="myself"):
        left = manager.close()
    assert "myself" in left[0]


def test_close_with_ollama_gone_is_bounded() -> None:
    """Nobody answers: the close gives back what it can reach and ends within its deadlines."""
    world = SimulatedWorld()
    manager = inline(world)
    manager.set_execution_mode("recording")
    world.faults.arm("ollama.ps", "hang", times=None)
    world.faults.arm("ollama.unload", "hang", times=None)
    began = world.clock.monotonic()
    left = manager.close()
    assert world.clock.monotonic() - began < 120
    assert any(world.vlm.name in name for name in left)
    assert world.clip.place == "cpu"


def test_a_close_that_timed_out_can_be_finished() -> None:
    """A close whose waiting ended early goes on; closing again waits for it, closes the ports, names the leftovers."""
    world = SimulatedWorld()
    gate = Gate(world, "ollama.load")
    manager = threaded(world, drain_timeout_s=1)
    loading = in_thread(manager.ensure_vlm_loaded)
    gate.wait()
    with pytest.raises(OperationTimeout):
        manager.close(timeout_s=0)
    gate.open()
    assert isinstance(loading.exception(PATIENCE_S), ManagerClosed)
    until(lambda: manager.get_status().closed)
    manager.close()
    assert world.probe.closed
    assert threads_of(manager) == []


def test_a_request_that_races_with_the_end_is_answered() -> None:
    """Asking in the very moment in which the manager closes ends in `ManagerClosed`, never in silence."""
    world = SimulatedWorld()
    manager = inline(world)
    real = world.clock.monotonic
    closed: list[tuple[str, ...]] = []

    def close_first() -> float:
        # The clock is read for the ticket: after the manager was found open, before the ticket is in the mailbox.
        world.clock.monotonic = real  # type: ignore[method-assign]
        closed.append(manager.close())
        return real()

    world.clock.monotonic = close_first  # type: ignore[method-assign]
    try:
        future = manager.submit_execution_mode("recording")
    except ManagerClosed:
        return
    assert isinstance(future.exception(0.1), ManagerClosed)


def test_nothing_supersedes_a_close() -> None:
    """Who is told `ManagerClosed` and asks again with `preempt`, from the callback, cannot undo the close."""
    world = SimulatedWorld()
    gate = Gate(world, "probe.read")
    manager = threaded(world)
    gate.wait()
    again: list[BaseException | Future[Outcome]] = []

    def insist(done: Future[Outcome]) -> None:
        try:
            again.append(manager.submit_execution_mode("recording", preempt=True))
        except GPUFSMError as error:
            again.append(error)

    manager.submit_execution_mode("autopilot").add_done_callback(insist)
    closing = in_thread(manager.close)
    until(lambda: again)
    gate.open()
    assert closing.result(PATIENCE_S) == ()
    assert isinstance(again[0], ManagerClosed)
    assert not world.vlm_resident()


def test_a_callback_may_use_the_manager_that_closes() -> None:
    """The callback of a request that got `ManagerClosed` runs under no lock of ours, so it cannot stop the world."""
    world = SimulatedWorld()
    gate = Gate(world, "probe.read")
    manager = threaded(world)
    gate.wait()
    subscribed = threading.Event()

    def subscribe(_: Future[Outcome]) -> None:
        manager.subscribe(lambda event: None)
        subscribed.set()

    manager.submit_execution_mode("autopilot").add_done_callback(subscribe)
    closing = in_thread(manager.close)
    try:
        assert subscribed.wait(1.0)
    finally:
        gate.open()
    assert closing.result(PATIENCE_S) == ()


def test_a_listener_may_close_the_manager() -> None:
    """Closing from the listeners' thread works, though that thread is one that the close ends."""
    world = SimulatedWorld()
    manager = threaded(world)
    closed: Future[tuple[str, ...]] = Future()

    def close(event: Event) -> None:
        closed.set_result(manager.close())

    manager.subscribe(close, "mode_changed")
    manager.set_execution_mode("recording", timeout_s=PATIENCE_S)
    assert closed.result(PATIENCE_S) == ()
    assert world.vlm_held_mib() == 0
    until(lambda: threads_of(manager) == [])


def test_leaving_the_block_closes_also_after_an_error() -> None:
    """The context manager closes, and the error of the block goes on."""
    world = SimulatedWorld()
    with pytest.raises(ZeroDivisionError), threaded(world) as manager:
        manager.set_execution_mode("recording", timeout_s=PATIENCE_S)
        raise ZeroDivisionError
    assert world.vlm_held_mib() == 0
    assert threads_of(manager) == []


def test_a_manager_that_was_never_used_closes_at_once() -> None:
    """Opening and closing touches nothing on the card."""
    world = SimulatedWorld()
    with threaded(world):
        pass
    assert not [entry for entry in world.ollama.log if entry.op not in ("ollama.ps", "ollama.tags")]
    assert world.clip.ups == 0


# --- the interpreter ends ---


def served() -> tuple[OllamaHTTPServer, SimulatedOllama, RunningClock]:
    """A simulated Ollama behind a real socket, in real time."""
    clock = RunningClock()
    ollama = SimulatedOllama(
        [SimulatedModel(name="sim-vlm:7b", size_mib=4000.0, load_s=0.05)],
        clock=clock, card=None, reclaim_s=0.0, unload_s=0.0, generate_s=0.0,
    )  # fmt: skip
    return OllamaHTTPServer(ollama), ollama, clock


@pytest.mark.parametrize("ending", ["", "raise SystemExit(0)", "sys.exit()", "manager.close()"])
def test_the_exit_handler_closes_what_is_open(ending: str) -> None:
    """A program that ends without closing unloads its VLM, exits with 0 and prints nothing."""
    server, ollama, clock = served()
    with server:
        run_python(
            "import sys\n"
            "from gpu_fsm import GPUResourceManager, GPUResourceConfig\n"
            f"config = GPUResourceConfig(ollama_url={server.url!r}, vlm_model='sim-vlm:7b', clip_model=None)\n"
            "manager = GPUResourceManager(config)\n"
            "assert manager.set_execution_mode('recording', timeout_s=30).granted\n"
            f"{ending}\n"
        )
        assert ollama.counts["loads"] == 1
        assert ollama.loaded() == ()
        assert [entry.op for entry in ollama.log if entry.op == "ollama.unload"]
    clock.close()


def test_the_exit_handler_loses_no_time() -> None:
    """What the close needs still works at exit: the unload follows the end of the program at once."""
    server, ollama, clock = served()
    with server:
        run_python(
            "from gpu_fsm import GPUResourceManager, GPUResourceConfig\n"
            f"config = GPUResourceConfig(ollama_url={server.url!r}, vlm_model='sim-vlm:7b', clip_model=None,\n"
            "    observe_timeout_s=5)\n"
            "manager = GPUResourceManager(config)\n"
            "assert manager.set_execution_mode('recording', timeout_s=30).granted\n"
        )
        ended = [entry.at for entry in ollama.log if entry.op in ("ollama.load", "ollama.unload")]
        assert ended[-1] - ended[0] < 4
    clock.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_the_exit_handler_starts_no_thread(host: str) -> None:
    """CPython 3.12 starts none once the interpreter ends; the unload goes out all the same."""
    server, ollama, clock = served()
    with server:
        run_python(
            "import atexit, threading\n"
            "from gpu_fsm import GPUResourceManager, GPUResourceConfig\n"
            f"config = GPUResourceConfig(ollama_url={server.url.replace('127.0.0.1', host)!r}, clip_model=None,\n"
            "    vlm_model='sim-vlm:7b')\n"
            "manager = GPUResourceManager(config)\n"
            "assert manager.set_execution_mode('recording', timeout_s=30).granted\n"
            "def refuse(thread):\n"
            '    raise RuntimeError("can\'t create new thread at interpreter shutdown")\n'
            "atexit.register(setattr, threading.Thread, 'start', refuse)\n"
        )
        assert ollama.counts["loads"] == 1
        assert ollama.loaded() == ()
    clock.close()


def test_the_exit_handler_leaves_no_socket_open() -> None:
    """With all warnings on a program that ends without closing prints nothing either."""
    server, _ollama, clock = served()
    with server:
        run_python(
            "from gpu_fsm import GPUResourceManager, GPUResourceConfig\n"
            f"config = GPUResourceConfig(ollama_url={server.url!r}, vlm_model='sim-vlm:7b', clip_model=None)\n"
            "manager = GPUResourceManager(config)\n"
            "assert manager.set_execution_mode('recording', timeout_s=30).granted\n",
            options=("-W", "error"),
        )
    clock.close()


def test_the_exit_handler_closes_also_a_manager_that_nobody_refers_to() -> None:
    """A manager that was dropped without closing still drives, so it is still open, and is closed at the end."""
    server, ollama, clock = served()
    with server:
        run_python(
            "import gc\n"
            "from gpu_fsm import GPUResourceManager, GPUResourceConfig\n"
            f"config = GPUResourceConfig(ollama_url={server.url!r}, vlm_model='sim-vlm:7b', clip_model=None)\n"
            "GPUResourceManager(config).set_execution_mode('recording', timeout_s=30)\n"
            "gc.collect()\n",
        )
        assert ollama.counts["loads"] == 1
        assert ollama.loaded() == ()
    clock.close()


def test_the_exit_handler_does_not_hang_on_a_server_that_has_gone() -> None:
    """Ollama has vanished meanwhile: the program ends all the same, soon and with 0."""
    run_python(
        "from gpu_fsm import GPUResourceManager, GPUResourceConfig\n"
        "from gpu_fsm.simulation import OllamaHTTPServer, RunningClock, SimulatedModel, SimulatedOllama\n"
        "model = SimulatedModel(name='sim-vlm:7b', size_mib=4000.0, load_s=0.05)\n"
        "server = OllamaHTTPServer(SimulatedOllama([model], clock=RunningClock()))\n"
        "config = GPUResourceConfig(ollama_url=server.url, vlm_model='sim-vlm:7b', clip_model=None,\n"
        "    unload_deadline_s=1, shed_deadline_s=1, observe_timeout_s=0.5, settle_timeout_s=0.5)\n"
        "manager = GPUResourceManager(config)\n"
        "assert manager.set_execution_mode('recording', timeout_s=30).granted\n"
        "server.close()\n"
    )


def test_an_inline_manager_is_closed_at_exit_too() -> None:
    """The exit handler drives an inline manager itself."""
    said = run_python(
        IN_A_WORLD + "world = SimulatedWorld(); config = world.config()\n"
        "server = OllamaManager(config, clock=world.clock, transport=world.transport)\n"
        "manager = GPUResourceManager(config, threaded=False, **world.ports(server))\n"
        "manager.set_execution_mode('recording')\n"
        "real = world.probe.close\n"
        "world.probe.close = lambda: (real(), print('held', world.vlm_held_mib() > 0))\n"
    )
    assert said == "held False\n"


# --- the shared one ---


def test_shared_is_one_per_process_until_it_is_closed() -> None:
    """`shared()` makes a manager at the first call, gives the same to every thread, and a new one after a close."""
    world = SimulatedWorld()
    config = world.config()

    def made() -> GPUResourceManager:
        server = OllamaManager(config, clock=world.clock, transport=world.transport)
        return GPUResourceManager.shared(config, **world.ports(server))

    start = threading.Barrier(8)

    def at_once() -> GPUResourceManager:
        start.wait(PATIENCE_S)
        return made()

    managers = {thread.result(PATIENCE_S) for thread in [in_thread(at_once) for _ in range(8)]}
    assert len(managers) == 1
    first = managers.pop()
    assert first.set_execution_mode("recording", timeout_s=PATIENCE_S).granted
    other = threaded(world)
    assert other is not first
    other.close()
    assert made() is first
    first.close()
    second = made()
    assert second is not first
    second.close()


# --- fork ---


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_child_cannot_use_its_parent_s_manager() -> None:
    """Every call in the child raises `ForkedProcess` with the mend; its end touches nothing; the parent goes on."""
    run_python(
        IN_A_WORLD
        + """
world, manager = made()
manager.set_execution_mode("recording", timeout_s=30)

def check():
    for call in (
        lambda: manager.set_execution_mode("idle"),
        lambda: manager.submit_execution_mode("idle"),
        manager.ensure_vlm_loaded,
        manager.ensure_vlm_unloaded,
        manager.migrate_clip_to_cpu,
        lambda: manager.vlm().__enter__(),
        lambda: manager.clip().__enter__(),
    ):
        try:
            call()
        except ForkedProcess as error:
            assert "shared()" in error.remedy, error
        else:
            raise AssertionError("no ForkedProcess")
    assert manager.get_status().state.value == "recording"
    assert manager.close() == ()

in_child(check)
assert world.vlm_resident()
assert manager.set_execution_mode("autopilot", timeout_s=30).granted
assert manager.close() == ()
""",
        options=FORKING,
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_child_gets_a_shared_manager_of_its_own() -> None:
    """`shared()` in the child is a new, working manager; the parent's stays the parent's."""
    run_python(
        IN_A_WORLD
        + """
world, manager = made(shared=True)
manager.set_execution_mode("recording", timeout_s=30)

def check():
    mine_world, mine = made(shared=True)
    assert mine is not manager
    assert mine.set_execution_mode("recording", timeout_s=30).granted
    assert mine_world.vlm_resident()
    assert GPUResourceManager.shared() is mine
    assert mine.close() == ()

in_child(check)
assert GPUResourceManager.shared() is manager
assert manager.close() == ()
""",
        options=FORKING,
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_fork_while_every_lock_is_held_leaves_the_child_usable() -> None:
    """Locks that other threads held at the fork are nobody's in the child: it must not wait for them."""
    run_python(
        IN_A_WORLD
        + """
world, manager = made(shared=True)
held, go = threading.Event(), threading.Event()

def hold():
    driver = manager._driver
    with GPUResourceManager._shared_lock, driver._wake, driver._post_lock, driver.mailbox._lock:
        held.set()
        go.wait(30)

thread = threading.Thread(target=hold)
thread.start()
held.wait(30)

def check():
    done = threading.Event()
    def use():
        mine_world, mine = made(shared=True)
        assert mine.set_execution_mode("recording", timeout_s=30).granted
        assert mine.close() == ()
        done.set()
    threading.Thread(target=use, daemon=True).start()
    assert done.wait(20)

in_child(check)
go.set()
thread.join()
manager.close()
""",
        options=FORKING,
    )


CUDA = """
import types
torch = types.ModuleType("torch")
torch.cuda = types.SimpleNamespace(is_initialized=lambda: True)
sys.modules["torch"] = torch
"""
"""A process in which CUDA has been initialised."""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_child_of_a_process_that_used_cuda_is_told_so() -> None:
    """CUDA does not survive a fork: `shared()` in the child says so and names the spawn method."""
    run_python(
        IN_A_WORLD
        + CUDA
        + """
def check():
    try:
        made(shared=True)
    except ForkedProcess as error:
        assert "CUDA" in str(error) and "spawn" in str(error), error
    else:
        raise AssertionError("no ForkedProcess")

in_child(check)
""",
        options=FORKING,
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_child_that_is_the_first_to_ask_for_a_manager_is_told_so_too() -> None:
    """The parent has done no more than `import gpu_fsm`."""
    run_python(
        "import os, sys, types\n"
        "import gpu_fsm\n"
        "sys.modules['torch'] = types.SimpleNamespace(cuda=types.SimpleNamespace(is_initialized=lambda: True))\n"
        "if not os.fork():\n"
        "    try:\n"
        "        gpu_fsm.GPUResourceManager.shared()\n"
        "    except gpu_fsm.errors.ForkedProcess:\n"
        "        os._exit(0)\n"
        "    os._exit(1)\n"
        "assert os.wait()[1] == 0\n",
        options=FORKING,
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_parent_that_used_cuda_and_forked_keeps_its_right_to_the_gpu() -> None:
    """The fork concerns the child only: the parent's first `shared()` after it works."""
    run_python(
        IN_A_WORLD
        + CUDA
        + """
in_child(lambda: None)
world, manager = made(shared=True)
assert manager.close() == ()
""",
        options=FORKING,
    )


# --- Ctrl-C ---

HOOKS = [
    (op, phase, nth)
    for op, phase in (
        ("probe.read", "before"),
        ("ollama.ps", "before"),
        ("ollama.ps", "after"),
        ("ollama.unload", "before"),
        ("ollama.unload", "after"),
        ("ollama.load", "before"),
        ("ollama.load", "after"),
        ("clip.to_cpu", "before"),
        ("clip.to_cpu", "after"),
        ("clip.to_gpu", "before"),
        ("clip.to_gpu", "after"),
    )
    for nth in (1, 2, 3)
]


@pytest.mark.parametrize(("op", "phase", "nth"), HOOKS)
def test_the_call_after_a_keyboard_interrupt_works(op: str, phase: str, nth: int) -> None:
    """Ctrl-C at the n-th such call of an inline drive comes out as itself; the next call finds a whole machine."""
    world = SimulatedWorld()
    manager = inline(world)
    manager.set_execution_mode("autopilot")
    left = [nth]

    def strike(what: str, when: str) -> None:
        if (what, when) == (op, phase):
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt

    world.on_io.append(strike)
    try:
        for mode in ("recording", "autopilot", "recording"):
            manager.set_execution_mode(mode)
    except KeyboardInterrupt:
        pass
    world.on_io.remove(strike)
    manager.drive_for(0)
    assert manager.get_status().state in STABLE
    for mode in ("idle", "recording", "autopilot"):
        outcome = manager.set_execution_mode(mode)
        assert outcome.granted, outcome.reason
        assert manager.get_status().state.value == mode
    assert not world.vlm_resident()
    assert world.clip.place == "gpu"
    assert manager.get_status().leases == ()
    assert manager.close() == ()


def test_an_interrupted_drive_hands_over_to_another_waiter() -> None:
    """Two threads wait on an inline manager; the one that drives is interrupted, and the other gets its answer."""
    world = SimulatedWorld()
    gate = Gate(world, "ollama.load")
    manager = inline(world)
    struck: list[str] = []

    def strike(op: str, phase: str) -> None:
        if (op, phase) == ("ollama.load", "after") and not struck:
            struck.append(op)
            raise KeyboardInterrupt

    driving = in_thread(manager.set_execution_mode, "recording")
    gate.wait()
    world.on_io.append(strike)
    waiting = in_thread(manager.set_execution_mode, "autopilot")
    until(lambda: manager.get_status().queued)
    gate.open()
    with pytest.raises(KeyboardInterrupt):
        driving.result(PATIENCE_S)
    assert waiting.result(PATIENCE_S).granted
    assert world.clip.place == "gpu"


def test_a_keyboard_interrupt_while_waiting_for_a_lease_leaves_no_lease() -> None:
    """Ctrl-C before the lease was granted: nobody holds it afterwards."""
    world = SimulatedWorld()
    manager = inline(world)

    def strike(op: str, phase: str) -> None:
        if (op, phase) == ("ollama.load", "after"):
            raise KeyboardInterrupt

    world.on_io.append(strike)
    with pytest.raises(KeyboardInterrupt), manager.vlm():
        pytest.fail("it was interrupted")
    world.on_io.clear()
    manager.drive_for(60)
    assert manager.get_status().leases == ()


def test_time_passes_only_while_a_threaded_manager_needs_it() -> None:
    """`drive_for` is for inline managers; a threaded one says so."""
    world = SimulatedWorld()
    manager = threaded(world)
    with pytest.raises(ValueError, match="drives itself"):
        manager.drive_for(1)
    closing = in_thread(manager.close)
    assert let_time_pass(world, closing) == ()


def test_a_manager_without_arguments_reads_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """`GPUResourceManager()` is the real thing, configured by environment; without Ollama and GPU it still opens."""
    monkeypatch.setenv("GPU_FSM_CLIP_MODEL", "none")
    monkeypatch.setenv("GPU_FSM_OLLAMA_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("GPU_FSM_RECOVER_BASE_S", "30")
    with GPUResourceManager() as manager:
        assert isinstance(manager.config, GPUResourceConfig)
        assert manager.config.ollama_url == "http://127.0.0.1:9"
        outcome = manager.set_execution_mode("recording", timeout_s=PATIENCE_S)
        assert not outcome.granted
        assert outcome.reason is not None
        assert outcome.reason.remedy
