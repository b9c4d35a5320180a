"""Where screens come from: a folder, frames of anything, the live screen.  All of them are iterables of `Screen`."""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from attrs import define, field, frozen

from gpu_fsm.errors import BadArgument, Bucket, GPUFSMError, one_line

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger("gpu_fsm")

_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
_LARGEST_SCREEN_BYTES = 64 * 2**20
"""More than any screenshot: an 8K screen without compression is 100 MB, as PNG rarely a third of it."""


@define(kw_only=True, eq=False, slots=False)
class ScreenLost(GPUFSMError):
    """The live screen was there and cannot be seen any more."""

    code: ClassVar[str] = "screen_lost"
    bucket: ClassVar[Bucket] = "user"


@frozen(kw_only=True)
class Screen:
    """One screenshot: its name, the bytes of its file, and perhaps a text that belongs to it."""

    name: str
    data: bytes = field(repr=False)
    text: str = ""
    """What else tells screens apart, where the source knows it: a window's title, recognised words."""

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the bytes, in hexadecimal."""
        return hashlib.sha256(self.data).hexdigest()

    def image(self) -> Image:
        """Decode to RGB.  Raises `BadArgument` for bytes that are no whole image."""
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(io.BytesIO(self.data)) as opened:
                return opened.convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            unknown = isinstance(error, UnidentifiedImageError)  # its own text names our buffer, not the file
            why = "an unknown format, or damaged" if unknown else one_line(error, 80)
            raise BadArgument(
                detail=f"{one_line(self.name)} is no image that can be read: {why}",
                remedy="Remove the file or store it again as a PNG.",
            ) from error


_MEND = "Name a folder that holds PNG or JPEG screenshots."


def find_screens(folder: Path | str) -> list[Path]:
    """The images of a folder by their names alone, sorted.  Raises `BadArgument` where there is none."""
    folder = Path(folder)
    try:
        files = sorted(folder.iterdir())
    except OSError as error:
        why = "is no folder" if not folder.is_dir() else f"cannot be read: {one_line(error.strerror)}"
        raise BadArgument(detail=f"{one_line(folder)} {why}", remedy=_MEND) from error
    found = [path for path in files if path.suffix.lower() in _SUFFIXES and path.is_file()]
    if not found:
        raise BadArgument(detail=f"{one_line(folder)} holds no image", remedy=_MEND)
    return found


def load_screens(folder: Path | str) -> tuple[Screen, ...]:
    """Read all images of a folder, sorted by name, and check that each can be decoded.

    Raises `BadArgument` for a folder that is missing or holds no image, and for a broken image.
    """
    screens = []
    for path in find_screens(folder):
        try:
            if path.stat().st_size > _LARGEST_SCREEN_BYTES:
                raise BadArgument(detail=f"{one_line(path)} is larger than 64 MiB", remedy="Store it smaller.")
            screen = Screen(name=path.name, data=path.read_bytes())
        except OSError as error:
            why = one_line(error.strerror)
            raise BadArgument(detail=f"{one_line(path)} cannot be read: {why}", remedy=_MEND) from error
        screen.image()
        screens.append(screen)
    return tuple(screens)


def frames(images: Iterable[Any], name: str = "frame") -> Iterator[Screen]:
    """Turn PIL images, or uint8 arrays of shape (height, width, 3) in RGB, into screens `name-000000` and on.

    A video's frames, for example: `frames(imageio.v3.imiter("demo.mp4"))`, or
    `frames(PIL.ImageSequence.Iterator(PIL.Image.open("demo.gif")))`.
    """
    from PIL import Image

    for number, given in enumerate(images):
        image = given if isinstance(given, Image.Image) else Image.fromarray(given)
        yield Screen(name=f"{name}-{number:06}", data=_png(image))


def live(
    *,
    every_s: float | Callable[[], float] = 1.0,
    monitor: int = 1,
    only_changes: bool = True,
    grab: Callable[[], Image] | None = None,
) -> Iterator[Screen]:
    """The live screen, for ever: one screenshot every `every_s` seconds, by default only when a pixel has changed.

    `every_s` may be a function, which is asked each time.  `monitor` 0 is all of them together, 1 the first.  `grab`
    takes the picture instead of the package mss (extra `screen`).  Raises `ModuleNotFoundError` without that package,
    `BadArgument` where there is no such screen to be seen, later `ScreenLost` where it has gone.
    """
    # At once, and not with the first screen: before that a model may have been loaded for nothing.
    return _looks(grab or _grabber(monitor), every_s, only_changes)


def _looks(take: Callable[[], Image], every_s: float | Callable[[], float], only_changes: bool) -> Iterator[Screen]:
    last = b""
    pause = threading.Event()
    for number in itertools.count():
        begun = time.monotonic()
        image = take()
        pixels = hashlib.sha256(image.tobytes()).digest()
        if not only_changes or pixels != last:
            last = pixels
            yield Screen(name=f"screen-{number:06}", data=_png(image))
        wanted_s = every_s() if callable(every_s) else every_s
        pause.wait(max(0.0, wanted_s - (time.monotonic() - begun)))


def _grabber(monitor: int) -> Callable[[], Image]:
    import mss
    from PIL import Image

    def grab() -> Image.Image:
        # A connection for each look costs a millisecond, and monitors come, go and change their size.
        with mss.MSS() as camera:
            places = camera.monitors
            if not 0 <= monitor < len(places):
                there = f"1 to {len(places) - 1} are there" if len(places) > 1 else "there is none"
                raise BadArgument(
                    detail=f"there is no monitor {monitor}: {there}", remedy="0 takes all of them together."
                )
            shot = camera.grab(places[monitor])
        return Image.frombytes("RGB", shot.size, shot.rgb)

    def grab_or_tell() -> Image.Image:
        for patient in (True, False):  # a monitor that changes its size spoils one look
            try:
                return grab()
            except Exception as error:  # the library's own, and its assertions where the display has died
                if not patient:
                    raise ScreenLost(
                        detail=f"monitor {monitor} cannot be seen any more: {_why(error)}",
                        remedy="Start again where the desktop is.",
                    ) from error
        raise AssertionError

    try:
        first = grab()
    except BadArgument:
        raise
    except Exception as error:
        raise BadArgument(
            detail=f"the screen cannot be seen: {_why(error)}",
            remedy="Run where the desktop is (DISPLAY on Linux), or take screenshots from a folder.",
        ) from error
    if os.environ.get("WAYLAND_DISPLAY") and first.getbbox() is None:
        log.warning("the screen is black: a Wayland session shows X programs nothing else; log in to an X11 session")
    return grab_or_tell


def _why(error: Exception) -> str:
    return one_line(error) or type(error).__name__


def _png(image: Image) -> bytes:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG", compress_level=1)  # the default level takes ten times as long
    return buffer.getvalue()


def sendable(screen: Screen, image: Image, largest_side: int) -> bytes:
    """The bytes for a VLM: as they are where they are small PNG or JPEG, else a PNG within `largest_side` pixels."""
    small = max(image.size) <= largest_side
    if small and screen.data.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")):
        return screen.data
    copy = image.copy()
    copy.thumbnail((largest_side, largest_side))
    return _png(copy)
