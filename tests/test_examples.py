"""The examples run, say what is simulated, and stay short."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

pytest.importorskip("numpy", reason="numpy is not installed")
pytest.importorskip("PIL", reason="pillow is not installed")

FOLDER = Path(__file__).resolve().parents[1] / "gpu_fsm" / "examples"
EXAMPLES = ("blocking_loop", "asyncio_loop", "llm_tool", "two_managers", "web_app")


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_works_in_the_simulated_world(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each judges itself by what its agent did; what is simulated is said first."""
    if name == "web_app":
        pytest.importorskip("fastapi", reason="fastapi is not installed")
    module = importlib.import_module(f"gpu_fsm.examples.{name}")
    assert module.main(["--simulated"]) == 0
    assert capsys.readouterr().out.startswith("Simulated: ")


def test_an_example_says_what_it_is_about(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`--help` shows its first words and how to run it without a GPU; what it does not know is refused."""
    from gpu_fsm.examples import blocking_loop
    from gpu_fsm.examples.worlds import arguments

    monkeypatch.setattr("sys.argv", ["blocking_loop", "--help"])
    with pytest.raises(SystemExit, match="0"):
        arguments(blocking_loop.__doc__)
    said = capsys.readouterr().out
    assert "An agent in one blocking loop" in said
    assert "--simulated  without a GPU" in said
    monkeypatch.setattr("sys.argv", ["blocking_loop", "--simulate-it"])
    with pytest.raises(SystemExit, match="2"):
        arguments(blocking_loop.__doc__)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_read_in_a_minute(name: str) -> None:
    """Under sixty lines, and the first say how to run it."""
    lines = (FOLDER / f"{name}.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) < 60
    assert any(f"python -m gpu_fsm.examples.{name}" in line for line in lines[:8])
    assert "    sys.exit(main(arguments(__doc__)))" in lines
