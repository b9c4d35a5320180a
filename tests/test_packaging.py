"""The package as others get it: metadata, generated files, the README's commands and example."""

from __future__ import annotations

import configparser
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import gpu_fsm
from gpu_fsm import diagrams
from gpu_fsm.ollama import OllamaManager
from gpu_fsm.simulation import SimulatedWorld
from gpu_fsm.states import TABLE
from tests.tools import generate

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def fence(marker: str) -> str:
    """The code block that follows a marker in the README."""
    found = re.search(rf"<!-- {re.escape(marker)} -->\n```\w+\n(.*?)```", README, flags=re.DOTALL)
    assert found, marker
    return found[1]


def metadata() -> configparser.ConfigParser:
    """What `setup.cfg` says."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


@pytest.mark.parametrize("path", [path.relative_to(ROOT) for path in generate.files()], ids=str)
def test_generated_files_are_fresh(path: Path) -> None:
    """`python -m tests.tools.generate` writes them."""
    assert (ROOT / path).read_text(encoding="utf-8") == generate.files()[ROOT / path]


def test_nothing_else_lies_among_the_diagrams() -> None:
    """A picture that no code draws would drift."""
    assert {path for path in generate.files() if path.parent.name == "diagrams"} == set((ROOT / "diagrams").iterdir())


@pytest.mark.parametrize("text", [diagrams.overview(), diagrams.detail()], ids=["overview", "detail"])
def test_a_diagram_is_mermaid_that_every_renderer_takes(text: str) -> None:
    """Plain ids, one arrow a line, no character in a label that Mermaid reads as markup."""
    first, start, *arrows, style, styled = text.splitlines()
    assert first == "stateDiagram-v2"
    assert re.fullmatch(r"    \[\*\] --> [A-Z_]+", start)
    assert style.startswith("    classDef step ")
    assert re.fullmatch(r"    class [A-Z_,]+ step", styled)
    for arrow in arrows:
        assert re.fullmatch(r"    [A-Z_]+ --> [A-Z_]+ : [A-Za-z0-9 _,=-]+", arrow), arrow
    assert len(set(arrows)) == len(arrows)


def test_the_detailed_diagram_draws_every_row_that_moves_and_no_other() -> None:
    """An arrow for each source of each row with a destination."""
    moves = sum(len(row.sources) for row in TABLE if row.dest is not None)
    assert diagrams.detail().count(" --> ") == moves + 1


def test_the_overview_joins_the_same_pairs_of_states_as_the_table() -> None:
    """No arrow is lost in summing up, none is invented."""
    pairs = {(source.name, row.dest.name) for row in TABLE if row.dest is not None for source in row.sources}
    drawn = set(re.findall(r"^    ([A-Z_]+) --> ([A-Z_]+) :", diagrams.overview(), flags=re.MULTILINE))
    assert drawn == pairs


def test_the_version_stands_in_one_place() -> None:
    """`setup.cfg` reads it from the package, and the changelog has it."""
    assert metadata()["metadata"]["version"] == "attr: gpu_fsm.__version__"
    assert f"**{gpu_fsm.__version__}**" in README


def test_each_classifier_for_a_python_is_one_that_the_gate_tries() -> None:
    """A version is named only where it was tested."""
    named = re.findall(r"Python :: (3\.\d+)", metadata()["metadata"]["classifiers"])
    tried = re.search(r"^for minor in ([0-9 ]+);", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE)
    assert tried
    assert set(named) <= {f"3.{minor}" for minor in tried[1].split()}
    assert metadata()["options"]["python_requires"] == f">={named[0]}"


def test_every_requirement_has_bounds() -> None:
    """What was not tried is not promised."""
    options = metadata()["options"]["install_requires"].split("\n")
    for extra in metadata()["options.extras_require"].values():
        options += extra.split("\n")
    for requirement in filter(None, options):
        if not requirement.startswith(("gpu-fsm[", "types-")):
            assert re.fullmatch(r"[a-z0-9-]+(==[\d.]+|>=[\d.]+,<[\d.]+)", requirement), requirement


def test_warnings_are_errors_in_the_tests() -> None:
    """The suite's settings stay strict."""
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    assert tools["pytest"]["ini_options"]["filterwarnings"] == ["error"]
    assert tools["mypy"]["strict"] is True


@pytest.mark.parametrize("name", ["demo", "test"])
def test_each_readme_command_is_one_line_with_its_own_environment(name: str) -> None:
    """As typed on a fresh machine."""
    command = fence(f"command: {name}")
    assert command.count("\n") == 1
    assert command.startswith(f"python3 -m venv .venv-{name} && ")
    assert f'".[{name}]"' in command


def test_the_readme_names_only_files_and_options_that_exist() -> None:
    """The table of places to change would otherwise lead astray."""
    table = README.split("## Where do I change")[1].split("\n## ")[0]
    for name in re.findall(r"`(\w+\.py)`", table):
        assert (ROOT / "gpu_fsm" / name).is_file(), name


def test_the_embedding_example_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a simulated world: the VLM labels a screen, then CLIP embeds two texts, and all is given back."""
    image = pytest.importorskip("PIL.Image", reason="pillow not installed")
    world = SimulatedWorld()

    def manager(config: gpu_fsm.GPUResourceConfig) -> gpu_fsm.GPUResourceManager:
        assert config == gpu_fsm.GPUResourceConfig()
        settings = world.config()
        server = OllamaManager(settings, clock=world.clock, transport=world.transport)
        return gpu_fsm.GPUResourceManager(settings, threaded=False, **world.ports(server))

    source = fence("tested: embedding")
    assert len(source.splitlines()) <= 10 + 1
    image.new("RGB", (32, 32)).save(tmp_path / "shot.png")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"in_the_simulation": manager}
    exec(source.replace("with GPUResourceManager(", "with in_the_simulation("), names)
    assert names["label"]
    assert names["vectors"].shape[0] == 2
    assert names["vectors"].dtype == "float32"
    assert [entry.path for entry in world.ollama.log if entry.path == "/api/generate"]
    assert not world.vlm_resident()
    assert world.clip.device == "cpu"


FORBIDDEN = """
def test_property_01_x(): pytest.skip("no time")
@pytest.mark.must_run
def test_marked(): pytest.skip("no time")
@pytest.mark.needs_torch
def test_property_13_x(): pass
"""
ALLOWED = """
def test_x(): pytest.skip("no time")
@pytest.mark.needs_torch
def test_y(): pass
def test_property_01_x(): pass
"""


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        (
            FORBIDDEN,
            1,
            ["test_property_01_x", "test_marked", "test_property_13_x", "tests: 0 passed, 3 failed, 0 skipped"],
        ),
        (
            ALLOWED,
            0,
            ["no time", "torch and sentence_transformers not installed", "tests: 1 passed, 0 failed, 2 skipped"],
        ),
    ],
    ids=["forbidden", "allowed"],
)
def test_a_skip_of_what_must_run_fails_the_run(tmp_path: Path, body: str, code: int, said: list[str]) -> None:
    """The thirteen properties and the invariants are the point of the suite; other skips name their reason."""
    without_torch = "import importlib.util\nimportlib.util.find_spec = lambda name: None\n"
    ours = (ROOT / "tests" / "conftest.py").read_text(encoding="utf-8")
    (tmp_path / "conftest.py").write_text(ours + without_torch, encoding="utf-8")
    (tmp_path / "test_it.py").write_text(f"import pytest\n{body}", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(tmp_path), str(tmp_path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert done.stdout.count("SKIP IS A FAILURE") == (3 if code else 0)
    for words in said:
        assert words in done.stdout
