"""Programs of strangers run through the gateway unchanged."""

from __future__ import annotations

# ruff: noqa: E402
import pytest

for _library in ("httpx", "ollama", "openai", "starlette", "uvicorn"):
    pytest.importorskip(_library, reason=f"{_library} is not installed; it comes with the extra test")

import os
from pathlib import Path

from tests.strangers import Unreachable, compare, examples_of, fetch

ENOUGH = 20
"""Examples that run to a good end; with fewer the package has changed, and this is no proof any more."""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_the_example_programs_of_the_ollama_package_cannot_tell_the_doors_apart(tmp_path: Path) -> None:
    """Each prints the same to the letter at Ollama itself, as a client of the managed model, and of another one."""
    try:
        source = fetch(tmp_path)
    except Unreachable as why:
        pytest.skip(str(why))
    verdicts = compare(examples_of(source)[False])
    assert [verdict for verdict in verdicts if not verdict.agrees] == []
    assert sum(verdict.direct.code == 0 for verdict in verdicts) >= ENOUGH
    assert sum(verdict.as_vlm.leased > 0 for verdict in verdicts) >= ENOUGH
