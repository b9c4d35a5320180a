"""The package as others get it: metadata, generated files, the README's commands and example."""

from __future__ import annotations

import configparser
import re
import tomllib
from pathlib import Path

import pytest

import gpu_fsm
from gpu_fsm import diagrams
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
            assert re.fullmatch(r"[a-z-]+(==[\d.]+|>=[\d.]+,<[\d.]+)", requirement), requirement


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
