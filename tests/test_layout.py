"""The layout: what lies where, who may import whom, what `import gpu_fsm` costs."""

from __future__ import annotations

import ast
import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "gpu_fsm"

TOP_LEVEL = {
    ".ci",
    ".gitignore",
    "LICENSE",
    "README.md",
    "diagrams",
    "gpu_fsm",
    "pyproject.toml",
    "setup.cfg",
    "tests",
}

ONLY_IN = {
    "click": {"cli"},
    "fastapi": {"examples"},
    "httpx": {"examples", "gateway", "intercept"},
    "hypothesis": {"examples", "testing"},
    "mss": {"agent"},
    "platformdirs": {"appconfig"},
    "pynvml": {"vram"},
    "requests": {"intercept", "ollama", "simulation"},
    "rich": {"cli", "demo"},
    "sentence_transformers": {"clip"},
    "starlette": {"gateway"},
    "torch": {"clip"},
    "transformers": {"clip"},
    "transitions": {"machine"},
    "typed_settings": {"settings"},
    "urllib3": {"ollama", "simulation"},
    "uvicorn": {"gateway"},
}
"""A wrapped library is imported in one file: to replace it is to change that file."""

HEAVY = {
    "PIL",
    "click",
    "httpx",
    "hypothesis",
    "numpy",
    "platformdirs",
    "pynvml",
    "requests",
    "rich",
    "sentence_transformers",
    "torch",
    "transformers",
    "transitions.extensions",
    "typed_settings",
}


@functools.cache
def package_map() -> dict[str, int]:
    """Name -> line number in the map of the package's docstring."""
    source = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    places: dict[str, int] = {}
    for number, line in enumerate((ast.get_docstring(source) or "").splitlines()):
        found = re.match(r"\s*(`?[a-z_]+`?(?:, *`?[a-z_]+`?)*)\s+-\s+\S", line)
        if found:
            for name in found[1].replace("`", "").split(","):
                assert name.strip() not in places, f"{name} stands twice in the map"
                places[name.strip()] = number
    return places


def modules() -> Iterator[tuple[str, Path]]:
    """Every source file with its name in the map; a folder counts as one."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts not in (("__init__",), ("__main__",)):
            yield parts[0], path


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """All that a file imports, wherever in the file, as dotted names with line numbers."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node.lineno


def test_the_top_level_holds_what_was_agreed_and_nothing_else() -> None:
    """A newcomer reads nine names."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout, so what is ours and what was built cannot be told apart")
    listed = subprocess.run(
        [git, "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert {line.partition("/")[0] for line in listed.stdout.splitlines()} == TOP_LEVEL


def test_the_map_names_every_file_and_no_other() -> None:
    """The map in the package's docstring is complete."""
    assert set(package_map()) == {name for name, _ in modules()}


def test_imports_point_up_the_map_only() -> None:
    """From a later line to an earlier one; names that share a line never import each other."""
    places, wrong = package_map(), []
    for name, path in modules():
        for imported, line in imports(path):
            if imported.partition(".")[0] != "gpu_fsm":
                continue
            target = imported.split(".")[1] if "." in imported else ""
            if target == "__version__" and places[name] == max(places.values()):
                continue
            if name == "examples" and target not in places:
                continue  # they use the public face, as an embedder does
            if target != name and places.get(target, 10**6) >= places[name]:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {imported}")
    assert not wrong, "\n".join(wrong)


def test_the_simulation_is_no_echo_of_the_code_under_test() -> None:
    """It knows the words, the errors and the ports, and nothing that decides."""
    allowed = {"errors", "events", "ports", "settings", "simulation", "status"}
    for name, path in modules():
        if name == "simulation":
            for imported, line in imports(path):
                if imported.startswith("gpu_fsm"):
                    assert imported.split(".")[1] in allowed, f"{path}:{line} imports {imported}"


def test_a_wrapped_library_is_imported_where_it_is_wrapped() -> None:
    """One library, one file."""
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {imported}"
        for name, path in modules()
        for imported, line in imports(path)
        if name not in ONLY_IN.get(imported.partition(".")[0], {name})
    ]
    assert not wrong, "\n".join(wrong)


def fresh_python(code: str, **changes: str | None) -> str:
    """Run code in a new interpreter with warnings as errors; `changes` alters its environment."""
    environ = {**os.environ, **{name: value for name, value in changes.items() if value is not None}}
    for name, value in changes.items():
        if value is None:
            environ.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_imports_none_of_the_heavy_libraries() -> None:
    """Adapters load when used: an import costs neither torch nor an HTTP client."""
    loaded = set(fresh_python("import sys, gpu_fsm; print(*sys.modules)").split())
    assert not HEAVY & loaded


def test_importing_the_package_needs_no_home() -> None:
    """A service account may have none."""
    fresh_python("import gpu_fsm", HOME=None)


def test_importing_the_package_starts_nothing_and_touches_no_logging() -> None:
    """No thread, no handler, no level: a library leaves the program's affairs alone."""
    code = (
        "import logging, threading, gpu_fsm\n"
        "log = logging.getLogger('gpu_fsm')\n"
        "print(threading.active_count(), logging.root.handlers, log.level, log.propagate)"
    )
    assert fresh_python(code).split() == ["1", "[]", "0", "True"]


def test_each_of_the_thirteen_properties_has_its_named_test() -> None:
    """`test_property_01_...` to `test_property_13_...`; a property may have several."""
    named = {
        node.name[: len("test_property_00")]
        for path in (ROOT / "tests").glob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_property_")
    }
    assert named == {f"test_property_{number:02}" for number in range(1, 14)}
