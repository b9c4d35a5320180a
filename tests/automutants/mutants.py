"""The mutants: cosmic-ray's operators on one definition at a time, and a few of our own on the table of moves.

cosmic-ray changes expressions; the table of `states.py` is words in strings, which it leaves alone.  So rows and their
guards are left out, turned or sent elsewhere by operators of our own.

What can be no fault is not tried; `RULES` says why, and the report counts it.
"""

from __future__ import annotations

import ast
import difflib
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from attrs import frozen

RULES = {
    "no program": "Python refuses or warns of it, e.g. `is` against a literal; warnings are errors here",
    "annotation": "differs only in annotations, which nobody evaluates",
    "one object": "`==` for `is` (or `!=` for `is not`) against None, a bool or a member of an enumeration: the same",
    "signature": "cosmic-ray takes the bare `*` of a signature for a multiplication",
    "twice": "another operator makes the same text",
}
"""Why a mutation is left out."""

_ENUMS = {"Answer", "ExecutionMode", "Hold", "State"}


@frozen
class Mutant:
    """One changed program."""

    module: str
    function: str
    """Qualified name of the smallest definition around it; the name of the class or constant outside functions."""
    operator: str
    change: str
    """The changed lines, `before -> after`: what a person reads, and with module and function the key."""
    source: str
    lines: tuple[int, ...]
    """In the original, 1-based: which tests reach them?"""
    in_place: bool
    """Only a row or the code of a function differs, so that it can be exchanged in a running interpreter."""

    @property
    def is_row(self) -> bool:
        """In the table of moves."""
        return self.function.startswith("row ")

    @property
    def key(self) -> str:
        """What stays the same as long as the code around does."""
        return f"{self.module}:{self.function}: {self.change}"


@frozen
class _Part:
    """One definition: its text stands alone, below `head`, for a parser that need not read the rest each time."""

    name: str
    first: int
    last: int
    head: str = ""
    tail: str = ""
    is_function: bool = False


def mutants_of(path: Path) -> tuple[list[Mutant], Counter[str]]:
    """All mutants of a file, and how many were left out by which rule."""
    source = path.read_text(encoding="utf-8")
    original = ast.parse(source)
    bare, dumped = ast.dump(_bare(original)), ast.dump(original)
    found: dict[str, Mutant] = {}
    seen: set[str] = set()
    left_out: Counter[str] = Counter()
    for part, operator, mutated in _mutations(source, original):
        if mutated in seen:
            left_out["twice"] += 1
            continue
        seen.add(mutated)
        try:
            with warnings.catch_warnings(action="error"):
                compile(mutated, str(path), "exec", dont_inherit=True)
            tree = ast.parse(mutated)
        except (SyntaxError, SyntaxWarning):
            left_out["no program"] += 1
            continue
        if ast.dump(tree) == dumped:
            left_out["twice"] += 1
        elif ast.dump(_bare(ast.parse(mutated))) == bare:
            left_out["annotation"] += 1
        elif _shape(original) != _shape(tree):
            left_out["signature"] += 1
        elif _same_object(original, tree):
            left_out["one object"] += 1
        else:
            change, lines = _difference(source, mutated)
            mutant = Mutant(
                module=path.stem,
                function=part.name,
                operator=operator,
                change=change,
                source=mutated,
                lines=lines,
                in_place=part.name.startswith("row ")
                or (part.is_function and _signature(original, part.name) == _signature(tree, part.name)),
            )
            while mutant.key in found:  # the same words twice in one definition
                mutant = _again(mutant)
            found[mutant.key] = mutant
    return list(found.values()), left_out


def _again(mutant: Mutant) -> Mutant:
    times = re.search(r" \(#(\d+)\)$", mutant.change)
    number = int(times[1]) + 1 if times else 2
    words = mutant.change[: times.start()] if times else mutant.change
    return Mutant(
        mutant.module, mutant.function, mutant.operator, f"{words} (#{number})", mutant.source, mutant.lines,
        mutant.in_place,
    )  # fmt: skip


def _mutations(source: str, tree: ast.Module) -> Iterator[tuple[_Part, str, str]]:
    """Part, operator and the whole mutated text."""
    # Here, because whoever only reads a report does not need it.
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.operators.provider import OperatorProvider

    provider = OperatorProvider()
    operators = {name: provider[name]() for name in provider if not provider[name].arguments()}
    lines = source.splitlines(keepends=True)
    for part in _parts(tree):
        text = part.head + "".join(lines[part.first - 1 : part.last]) + part.tail
        nodes = list(ast_nodes(get_ast(text)))
        for name, operator in operators.items():
            for number in range(sum(1 for node in nodes for _ in operator.mutation_positions(node))):
                mutated = mutate_code(text, operator, number)
                if mutated is not None and mutated.startswith(part.head) and mutated.endswith(part.tail):
                    inner = mutated[len(part.head) : len(mutated) - len(part.tail)]
                    yield part, name, "".join(lines[: part.first - 1]) + inner + "".join(lines[part.last :])
    yield from _table_mutations(source, tree)


def _parts(tree: ast.Module) -> Iterator[_Part]:
    for node in tree.body:
        if not isinstance(node, ast.ClassDef):
            yield _Part(_name(node), _first(node), node.end_lineno or 0, is_function=_is_function(node))
            continue
        yield _Part(node.name, _first(node), _first(node.body[0]) - 1, tail="    pass\n")
        for inner in node.body:
            name = f"{node.name}.{_name(inner)}"
            yield _Part(name, _first(inner), inner.end_lineno or 0, "class _:\n", is_function=_is_function(inner))


def _is_function(node: ast.stmt) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def _first(node: ast.stmt) -> int:
    return min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])


def _name(node: ast.stmt) -> str:
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            return node.name
        case ast.Assign(targets=[target]) | ast.AnnAssign(target=target):
            return ast.unparse(target)
        case _:
            return "-"


# --- the table ---


def _table_mutations(source: str, tree: ast.Module) -> Iterator[tuple[_Part, str, str]]:
    """Each row left out, each guard left out or turned, each way up sent down and the other way round."""
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and getattr(node.func, "id", "") == "_row" and len(node.args) == 7):
            continue
        name, _, _, dest, guards, _, _ = node.args
        part = _Part(f"row {ast.unparse(name)}", node.lineno, node.end_lineno or 0)
        start, end = _span(source, node)
        comma = re.compile(r"\s*,").match(source, end)
        yield part, "RowLeftOut", source[:start] + source[comma.end() if comma else end :]
        for other, replacement in (("RELEASING", "SHEDDING"), ("SHEDDING", "RELEASING")):
            if isinstance(dest, ast.Name) and dest.id == other:
                yield part, "RowElsewhere", _put(source, dest, replacement)
        if isinstance(guards, ast.Constant) and isinstance(guards.value, str):
            words = guards.value.split()
            for place, word in enumerate(words):
                rest = [*words[:place], *words[place + 1 :]]
                turned = word[1:] if word.startswith("!") else f"!{word}"
                yield part, "GuardLeftOut", _put(source, guards, f'"{" ".join(rest)}"')
                swapped = " ".join([*words[:place], turned, *words[place + 1 :]])
                yield part, "GuardTurned", _put(source, guards, f'"{swapped}"')


def _put(source: str, node: ast.expr, text: str) -> str:
    start, end = _span(source, node)
    return source[:start] + text + source[end:]


def _span(source: str, node: ast.expr) -> tuple[int, int]:
    lines = source.splitlines(keepends=True)
    assert source.isascii(), "columns are counted in bytes"
    assert node.end_lineno is not None
    assert node.end_col_offset is not None
    before = sum(len(line) for line in lines[: node.lineno - 1])
    until = sum(len(line) for line in lines[: node.end_lineno - 1])
    return before + node.col_offset, until + node.end_col_offset


# --- what differs ---


def _difference(before: str, after: str) -> tuple[str, tuple[int, ...]]:
    """The changed lines in words, and their numbers in the original."""
    old, new = before.splitlines(), after.splitlines()
    gone: list[str] = []
    come: list[str] = []
    numbers: list[int] = []
    for tag, i1, i2, j1, j2 in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if tag != "equal":
            gone += old[i1:i2]
            come += new[j1:j2]
            numbers += range(i1 + 1, max(i2, i1 + 1) + 1)
    return f"{_words(gone)}  ->  {_words(come)}", tuple(numbers)


def _words(lines: list[str]) -> str:
    return " ".join(" ".join(lines).split()) or "(nothing)"


def _bare(tree: ast.Module) -> ast.Module:
    """Without annotations."""
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.returns = None
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
    return tree


def _same_object(old: ast.Module, new: ast.Module) -> bool:
    """Whether the one difference is `==` for `is`, or `!=` for `is not`, where only one object can be equal."""
    equal = {ast.Is: ast.Eq, ast.IsNot: ast.NotEq}
    pairs = [
        (a, b)
        for a, b in zip(
            (node for node in ast.walk(old) if isinstance(node, ast.Compare)),
            (node for node in ast.walk(new) if isinstance(node, ast.Compare)),
            strict=False,
        )
        if [type(op) for op in a.ops] != [type(op) for op in b.ops]
    ]
    if len(pairs) != 1 or len(pairs[0][0].ops) != 1 or len(pairs[0][1].ops) != 1:
        return False
    a, b = pairs[0]
    if equal.get(type(a.ops[0])) is not type(b.ops[0]):  # type: ignore[call-overload]
        return False
    match a.comparators[0]:
        case ast.Constant(value=None | True | False):
            return True
        case ast.Attribute(value=ast.Name(id=name)):
            return name in _ENUMS
    return False


def _shape(tree: ast.Module) -> list[tuple[int, int, int]]:
    """How the functions take their arguments."""
    signatures = [node for node in ast.walk(tree) if isinstance(node, ast.arguments)]
    return [(len(one.posonlyargs), len(one.args), len(one.kwonlyargs)) for one in signatures]


def _signature(tree: ast.Module, name: str) -> str:
    """All of a function that is evaluated when it is defined: decorators and defaults."""
    body: list[ast.stmt] = tree.body
    found: ast.stmt | None = None
    for step in name.split("."):
        found = next((node for node in body if getattr(node, "name", None) == step), None)
        body = getattr(found, "body", [])
    if not isinstance(found, ast.FunctionDef | ast.AsyncFunctionDef):
        return ""
    arguments = found.args
    evaluated = [*found.decorator_list, *arguments.defaults, *(d for d in arguments.kw_defaults if d is not None)]
    names = [arg.arg for arg in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return " ".join([*(ast.dump(node) for node in evaluated), *names])
