"""150 migrations while two threads encode on the second device, in a process that may crash."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.tools import building, fakegpu
from tests.waiting import ROOT

pytestmark = [pytest.mark.needs_torch, *building.marks(fakegpu.missing())]

PATIENCE_S = 240.0


def storm(*without: str) -> subprocess.CompletedProcess[str]:
    """Run `tests/tools/storm.py` with some protection taken out."""
    options = ["--without", ",".join(without)] if without else []
    command = [sys.executable, "-W", "error", "-m", "tests.tools.storm", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False)


@pytest.mark.parametrize("without", [(), ("lock",)], ids=["all_in_place", "leases_alone"])
def test_migrations_under_two_encoding_threads_give_no_wrong_vector(without: tuple[str, ...]) -> None:
    """Every vector is bit-identical to the reference of one device, taken after adoption; no crash.

    The leases do it alone: the host's own lock is for callers without a manager.
    """
    done = storm(*without)
    assert done.returncode == 0, (done.stdout, done.stderr[-2000:])
    said = json.loads(done.stdout)
    assert (said["moves"], said["wrong"]) == (150, [])
    assert min(said["encodes"]) >= 20


@pytest.mark.parametrize("without", [("leases",), ("leases", "lock")], ids=["no_leases", "neither"])
def test_the_same_without_leases_fails(without: tuple[str, ...]) -> None:
    """Else the test above would prove nothing: encodes are cut in two, mix devices, or end the process."""
    done = storm(*without)
    assert done.returncode != 0
    if done.returncode > 0:
        assert json.loads(done.stdout)["wrong"]
