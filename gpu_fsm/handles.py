"""What a lease gives its holder: the model, for as long as the lease lasts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from gpu_fsm import errors
from gpu_fsm.driver import Driver
from gpu_fsm.ports import Completion
from gpu_fsm.status import Answer

if TYPE_CHECKING:
    from gpu_fsm.ports import Embeddings


class VLM:
    """The VLM under a lease.  Every call is a use: it carries our keep_alive and re-arms the idle timer."""

    def __init__(self, driver: Driver, lease: int) -> None:
        self._driver = driver
        self._lease = lease

    @property
    def model(self) -> str:
        """The model's name in Ollama."""
        return self._driver.server.model

    def generate(
        self,
        prompt: str,
        *,
        images: Sequence[object] = (),
        format: Mapping[str, Any] | str | None = None,  # noqa: A002 - Ollama's word
        timeout_s: float | None = None,
    ) -> Completion:
        """Run a prompt, with images as PNG/JPEG bytes, paths or PIL images, and return the whole answer.

        `format` is `"json"` or a JSON schema.  Raises errors of `gpu_fsm.errors`, `LeaseLost` if the model was taken.
        """
        return _only(self._run(self._driver.server.generate, prompt, images=images, format=format, timeout_s=timeout_s))

    def stream(
        self,
        prompt: str,
        *,
        images: Sequence[object] = (),
        format: Mapping[str, Any] | str | None = None,  # noqa: A002 - Ollama's word
        timeout_s: float | None = None,
    ) -> Generator[Completion, None, None]:
        """The same in parts; the last has `done=True`.  Close the iterator to stop early."""
        server = self._driver.server
        return self._run(server.generate, prompt, images=images, format=format, timeout_s=timeout_s, stream=True)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        format: Mapping[str, Any] | str | None = None,  # noqa: A002 - Ollama's word
        timeout_s: float | None = None,
    ) -> Completion:
        """Continue a conversation of `{"role", "content", "images"}` messages and return the whole answer."""
        return _only(self._run(self._driver.server.chat, messages, format=format, timeout_s=timeout_s))

    def stream_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        format: Mapping[str, Any] | str | None = None,  # noqa: A002 - Ollama's word
        timeout_s: float | None = None,
    ) -> Generator[Completion, None, None]:
        """`chat` in parts; the last has `done=True`."""
        return self._run(self._driver.server.chat, messages, format=format, timeout_s=timeout_s, stream=True)

    def _run(
        self,
        call: Callable[..., Iterator[Completion]],
        what: object,
        *,
        timeout_s: float | None,
        **options: Any,
    ) -> Generator[Completion, None, None]:
        driver, engine = self._driver, self._driver.engine
        self._check_lease()
        self._check_vision(what, options)
        limit = driver.config.inference_timeout_s if timeout_s is None else timeout_s
        driver.leases.touch()
        keep_alive_s = engine.keep_alive_s  # what is sent counts, whatever the settings say when the answer comes
        try:
            parts = call(what, keep_alive_s=keep_alive_s, timeout_s=limit, **options)
            with contextlib.closing(cast("Generator[Completion, None, None]", parts)):
                for part in parts:
                    driver.leases.touch()
                    if part.done:
                        engine.used_server(keep_alive_s)
                    yield part
                    if not part.done:
                        self._check_lease()  # a stream may outlive the `with` that it was started in
        except errors.GPUFSMError as error:
            driver.report(error)
            raise
        finally:
            driver.leases.touch()

    def _check_lease(self) -> None:
        if self._driver.leases.is_lost(self._lease):
            raise errors.LeaseLost(
                detail="the VLM was taken away under this lease, or the lease has ended",
                remedy="Take a new lease with manager.vlm().",
            )

    def _check_vision(self, what: object, options: Mapping[str, Any]) -> None:
        given = options.get("images", ())
        if not isinstance(given, Sequence) or isinstance(given, str | bytes):
            raise errors.BadArgument(detail=f"images is {type(given).__name__}", remedy="Give a list of images.")
        chat = not isinstance(what, str)
        if chat and not (isinstance(what, Sequence) and all(isinstance(message, Mapping) for message in what)):
            raise errors.BadArgument(
                detail=f"{errors.one_line(what, 40)} is neither a prompt nor a list of messages",
                remedy='Give text to generate(), and messages such as {"role": "user", "content": "..."} to chat().',
            )
        messages: Sequence[Any] = what if chat else ()  # type: ignore[assignment]
        images = options.get("images") or any(isinstance(m, Mapping) and m.get("images") for m in messages)
        if images and self._driver.engine.sees_images is Answer.NO:
            raise errors.OllamaRequestRejected(
                detail=f"{self.model} does not see images",
                remedy="Set vlm_model to a vision model, for example qwen2.5vl:7b.",
                model=self.model,
            )


def _only(parts: Iterator[Completion]) -> Completion:
    last = None
    for part in parts:
        last = part
    if last is None:
        raise errors.OllamaProtocolError(detail="an answer without any part")
    return last


class CLIP:
    """CLIP under a lease: it stays where it is until the lease ends."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver

    @property
    def device(self) -> str:
        """Where it is: `cpu`, `cuda:0`, `sim:0`."""
        return self._driver.clip.device

    def encode(
        self,
        items: Sequence[object],
        *,
        batch_size: int = 32,
        normalize: bool = True,
        progress: Callable[[int, int], None] | None = None,
    ) -> Embeddings:
        """Embed images and texts in order.  Returns float32 of shape (n, d), unit vectors with `normalize`.

        `progress(done, total)` is called after every batch, where the host can tell.
        """
        told = {} if progress is None else {"progress": progress}
        encode: Callable[..., Embeddings] = self._driver.clip.encode
        try:
            return encode(items, batch_size=batch_size, normalize=normalize, **told)
        except errors.GPUFSMError as error:
            self._driver.report(error)
            raise
