"""Marks for tests that compile something: skipped, with the reason, where that cannot be done.

With `MUST_BUILD` in the environment, as the gate has it, such a skip is a failure of the run.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

import pytest

T = TypeVar("T", bound=Callable[..., object])


def marks(missing: str) -> list[pytest.MarkDecorator]:
    """For `pytestmark`; `missing` says what is not there, or nothing."""
    skip = pytest.mark.skipif(bool(missing), reason=missing or "everything is here")
    return [skip, pytest.mark.must_run] if os.environ.get("MUST_BUILD") else [skip]


def needs(missing: str) -> Callable[[T], T]:
    """The same for one test."""

    def decorate(test: T) -> T:
        for mark in marks(missing):
            test = mark(test)
        return test

    return decorate
