"""A real server, left as it was found."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gpu_fsm.ollama import canonical_name
from tests.live.server import Live, pinned, put_back, seconds


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest) -> Iterator[Live]:
    """The server of `--ollama` and the model of `--model`; skips, and says so, where they are not given."""
    url, model = request.config.getoption("--ollama"), request.config.getoption("--model")
    if not url or not model:
        pytest.skip("no Ollama to test against: give --ollama URL and --model NAME")
    live = Live(url.rstrip("/"), model)
    live.session.trust_env = False
    before, disk = live.resident(), live.on_disk()
    assert canonical_name(model) in {canonical_name(name) for name in disk}, f"{model} is not on {url}"
    yield live
    put_back(live, before)
    after = live.resident()
    assert live.on_disk() == disk
    live.session.close()
    assert set(after) == set(before)
    for name, entry in before.items():
        assert pinned(after[name]) == pinned(entry)
        assert pinned(entry) or abs(seconds(after[name]["expires_at"]) - seconds(entry["expires_at"])) < 30


@pytest.fixture
def live(server: Live) -> Live:
    """The server, with the model out."""
    server.wait_gone()
    return server
