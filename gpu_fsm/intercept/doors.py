"""The rules that every door keeps, and leases that end whatever becomes of the answer read under them."""

from __future__ import annotations

import contextlib
import queue
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AbstractContextManager, ExitStack
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

from attrs import frozen

from gpu_fsm.intercept.needs import Ask, Need, is_alias, read, refused_model
from gpu_fsm.settings import GPUResourceConfig, SecretURL

OtherModels = Literal["pass", "refuse"]


class AsyncManager(Protocol):
    """What a door needs of `manager.aio`."""

    def vlm(self, *, holder: str = "", timeout_s: float | None = None) -> AbstractAsyncContextManager[Any]:
        """See `gpu_fsm.aio`."""

    def clip(self, *, holder: str = "", timeout_s: float | None = None) -> AbstractAsyncContextManager[Any]:
        """See `gpu_fsm.aio`."""

    async def ensure_vlm_unloaded(self, *, timeout_s: float | None = None) -> None:
        """See `gpu_fsm.aio`."""


class Manager(Protocol):
    """What a door needs of the manager, which imports the doors and not the other way round."""

    @property
    def config(self) -> GPUResourceConfig:
        """Its settings now."""

    @property
    def aio(self) -> AsyncManager:
        """The same for asyncio."""

    def vlm(self, *, holder: str = "", timeout_s: float | None = None) -> AbstractContextManager[Any]:
        """See `gpu_fsm.manager`."""

    def clip(self, *, holder: str = "", timeout_s: float | None = None) -> AbstractContextManager[Any]:
        """See `gpu_fsm.manager`."""

    def ensure_vlm_unloaded(self, *, timeout_s: float | None = None) -> None:
        """See `gpu_fsm.manager`."""


@frozen(kw_only=True)
class Rules:
    """How a door treats requests.  `timeout_s` bounds the wait for a lease, loading included; None waits."""

    other_models: OtherModels = "pass"
    timeout_s: float | None = None

    def read(
        self, config: GPUResourceConfig, method: str, path: str, body: bytes, *, encoded: bool, vlm: str = ""
    ) -> Ask:
        """Read a request; `vlm` is another name of the VLM.  Raises `BadArgument`.

        What `names_another` model goes on only after a look whether it `is_alias`.
        """
        return read(
            method,
            path,
            body,
            vlm=vlm or config.vlm_model,
            keep_alive_s=config.idle_timeout_s + config.keep_alive_margin_s,
            options=config.vlm_options,
            encoded=encoded,
        )

    def is_alias(self, config: GPUResourceConfig, ask: Ask, tags: bytes) -> bool:
        """Whether the VLM is meant, by an answer to `TAGS`: then it has to be read again under that name.

        Raises `OllamaRequestRejected` for a model that the policy refuses.
        """
        if is_alias(tags, ask.model, config.vlm_model):
            return True
        if ask.need is Need.OTHER and self.other_models == "refuse":
            raise refused_model(ask.model, config.vlm_model)
        return False


TAGS = "/api/tags"
TAGS_S = 2.0
"""Longer than Ollama takes for hundreds of models; without an answer a name is what it says."""


def base_of(config: GPUResourceConfig) -> str:
    """Ollama's address without credentials, and without a slash at its end."""
    url = config.ollama_url
    parts = urlsplit(url.reveal() if isinstance(url, SecretURL) else url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"


_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


def aliases_of(base: str) -> tuple[str, ...]:
    """The addresses under which a client may know the Ollama at `base`: on loopback it has three names."""
    parts = urlsplit(base)
    port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname or ""
    hosts = _LOOPBACK if host in _LOOPBACK else (host,)
    return tuple(f"{parts.scheme}://{name}:{port}{parts.path.rstrip('/')}" for name in hosts)


def origin_of(url: str) -> tuple[str, str, int | None]:
    """Scheme, host and port of an address; a port that goes without saying is said."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or {"http": 80, "https": 443}.get(parts.scheme)


class Held:
    """What is given back when an answer has been read: by `close()`, or when `owner` is forgotten.

    A collector that finds a forgotten answer may run in the middle of anything, also of a pool of connections that
    holds its own lock, so it only notes what is to be given back; a thread of its own does it.
    """

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._finalizer: weakref.finalize[..., Any] | None = None

    def with_owner(self, owner: object, cut: Callable[[], object]) -> None:
        """When `owner` is collected, at the latest: `cut` the answer's connection and give back."""
        _start_collecting()
        self._finalizer = weakref.finalize(owner, _FORGOTTEN.put, (cut, self._stack))
        self._finalizer.atexit = False

    def close(self) -> None:
        """Give back now; idempotent."""
        if self._finalizer is not None:
            self._finalizer.detach()
        self._stack.pop_all().close()


_FORGOTTEN: queue.SimpleQueue[tuple[Callable[[], object], ExitStack]] = queue.SimpleQueue()
"""The one queue that may be put to from a finalizer."""
_collecting = threading.Lock()
_collector: threading.Thread | None = None


def _start_collecting() -> None:
    global _collector  # noqa: PLW0603 - one thread for the process, started when it is first needed
    with _collecting:
        if _collector is None or not _collector.is_alive():
            _collector = threading.Thread(target=_collect, name="gpu_fsm-forgotten", daemon=True)
            _collector.start()


def _collect() -> None:
    while True:
        cut, stack = _FORGOTTEN.get()
        for give_back in (cut, stack.close):
            with contextlib.suppress(Exception):
                give_back()
        del cut, stack


def admit(manager: Manager, ask: Ask, stack: ExitStack, *, holder: str, timeout_s: float | None) -> None:
    """Do what the request needs before it goes on; what it holds meanwhile is in `stack`."""
    match ask.need:
        case Need.VLM:
            stack.enter_context(manager.vlm(holder=holder, timeout_s=timeout_s))
        case Need.UNLOAD:
            manager.ensure_vlm_unloaded(timeout_s=timeout_s)
        case _:
            pass


async def admit_async(
    manager: Manager, ask: Ask, stack: contextlib.AsyncExitStack, *, holder: str, timeout_s: float | None
) -> None:
    """The same for asyncio."""
    match ask.need:
        case Need.VLM:
            await stack.enter_async_context(manager.aio.vlm(holder=holder, timeout_s=timeout_s))
        case Need.UNLOAD:
            await manager.aio.ensure_vlm_unloaded(timeout_s=timeout_s)
        case _:
            pass
