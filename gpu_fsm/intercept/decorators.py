"""The door for one's own functions: `@manager.needs_vlm`, `@manager.needs_clip`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, aclosing
from typing import Any, Literal, TypeVar

from gpu_fsm.errors import BadArgument, one_line
from gpu_fsm.intercept.doors import Manager

F = TypeVar("F", bound=Callable[..., Any])


def leased(
    manager: Manager, model: Literal["vlm", "clip"], *, holder: str, timeout_s: float | None
) -> Callable[[F], F]:
    """A decorator: the function runs under a lease on `model`, which is loaded first where it is out.

    Functions, coroutine functions, generators and asynchronous generators; a generator holds the lease from its first
    step until it ends, is closed or is forgotten.
    """

    def here(name: str) -> AbstractContextManager[Any]:
        take = manager.vlm if model == "vlm" else manager.clip
        return take(holder=name, timeout_s=timeout_s)

    def waiting(name: str) -> AbstractAsyncContextManager[Any]:
        take = manager.aio.vlm if model == "vlm" else manager.aio.clip
        return take(holder=name, timeout_s=timeout_s)

    def decorate(function: F) -> F:
        if not callable(function):
            raise BadArgument(
                detail=f"{one_line(function, 60)} cannot be called",
                remedy="Decorate the function itself, below @classmethod, @staticmethod or @property.",
            )
        # What an object does when it is called is told by its class.
        plain = inspect.isroutine(function) or isinstance(function, functools.partial | type)
        called = function if plain else type(function).__call__
        name = holder or str(getattr(function, "__qualname__", "")) or repr(function)
        made: Callable[..., Any]
        if inspect.isasyncgenfunction(called):

            @functools.wraps(function)
            async def made(*args: Any, **options: Any) -> AsyncGenerator[Any, Any]:
                async with waiting(name), aclosing(function(*args, **options)) as inner:
                    sent, pending = None, None
                    while True:
                        try:
                            step = inner.asend(sent) if pending is None else inner.athrow(pending)
                            value = await step
                        except StopAsyncIteration:
                            return
                        sent, pending = None, None
                        try:
                            sent = yield value
                        except GeneratorExit:
                            raise
                        except BaseException as error:
                            pending = error

        elif inspect.isgeneratorfunction(called):

            @functools.wraps(function)
            def made(*args: Any, **options: Any) -> Generator[Any, Any, Any]:
                with here(name):
                    return (yield from function(*args, **options))

        elif inspect.iscoroutinefunction(called):

            @functools.wraps(function)
            async def made(*args: Any, **options: Any) -> Any:
                async with waiting(name):
                    return await function(*args, **options)

        else:

            @functools.wraps(function)
            def made(*args: Any, **options: Any) -> Any:
                with here(name):
                    return _done(function(*args, **options), name)

        return made  # type: ignore[return-value]

    return decorate


def _done(result: Any, name: str) -> Any:
    """A result as it is; work that would only begin after the lease has ended is refused rather than done without."""
    if inspect.iscoroutine(result) or inspect.isgenerator(result):
        result.close()
    elif not inspect.isasyncgen(result):
        return result
    raise BadArgument(
        detail=f"{name} returned a {type(result).__name__}, which would run after the lease has ended",
        remedy="Decorate the coroutine function or generator itself.",
    )
