"""The house rules, measured: short functions and files, few parameters and imports, flat classes, plain names.

Rooms are the packages that ship; tests and benchmarks keep the rules of size and of names as well.
"""

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("configs", "launcher", "model", "parallel", "planner", "training")
ELSEWHERE = ("benchmarks", "slurm", "tests")
MARKS = {"parallel.doing"}  # says what is done, wherever that is: a decoration, not a dependency
FILES = [path for room in (*ROOMS, *ELSEWHERE) for path in sorted((ROOT / room).rglob("*.py"))]
SHIPPED = [path for path in FILES if path.relative_to(ROOT).parts[0] in ROOMS]
SOURCES = [path for path in FILES if path.name != "__init__.py"]

VAGUE_FILES = {"util", "utils", "common", "helper", "helpers", "manager", "base", "misc", "lib", "tools"}
VAGUE_ENDS = ("Manager", "Helper", "Util", "Utils", "Base", "Misc")
VAGUE_NAMES = {
    "tmp",
    "temp",
    "foo",
    "bar",
    "stuff",
    "thing",
    "things",
    "misc",
    "helper",
    "util",
    "process_data",
    "do_it",
}

Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def functions(path: Path) -> Iterator[Function]:
    return (node for node in ast.walk(parse(path)) if isinstance(node, Function))


def length(node: Function) -> int:
    """Lines of a function from its ``def`` on, its docstring left out."""
    lines = (node.end_lineno or node.lineno) - node.lineno + 1
    if ast.get_docstring(node) is not None:
        text = node.body[0]
        lines -= (text.end_lineno or text.lineno) - text.lineno + 1
    return lines


def parameters(node: Function) -> int:
    a = node.args
    names = [x.arg for x in (*a.posonlyargs, *a.args, *a.kwonlyargs) if x.arg not in ("self", "cls")]
    return len(names)


def shown(found: dict[str, object]) -> str:
    return "\n".join(f"{place}: {what}" for place, what in found.items())


def place(path: Path, node: ast.AST | None = None, name: str = "") -> str:
    line = f":{node.lineno}" if isinstance(node, ast.stmt | ast.expr) else ""
    return f"{path.relative_to(ROOT)}{line}{f' {name}' if name else ''}"


def test_rooms_are_found() -> None:
    assert len(SHIPPED) > 20 and len(FILES) > len(SHIPPED)


def test_modules_of_tests_differ_in_name() -> None:
    """All folders of tests are on one path, and ranks import by name: of two that share one, either may come."""
    folders: dict[str, list[Path]] = {}
    for path in (ROOT / "tests").rglob("*.py"):
        if path.name not in ("__init__.py", "conftest.py"):
            folders.setdefault(path.stem, []).append(path)
    same: dict[str, object] = {name: " and ".join(map(place, sorted(p))) for name, p in folders.items() if len(p) > 1}
    assert not same, shown(same)


def test_functions_are_short() -> None:
    every = {place(path, node, node.name): length(node) for path in FILES for node in functions(path)}
    assert not (long := {where: lines for where, lines in every.items() if lines > 80}), shown(long)
    for files in (SHIPPED, FILES):
        lengths = sorted(length(node) for path in files for node in functions(path))
        assert lengths[int(0.95 * len(lengths))] <= 45


def test_files_are_short() -> None:
    lines = {place(path): len(path.read_text().splitlines()) for path in FILES}
    assert not (long := {where: n for where, n in lines.items() if n > 350}), shown(long)


def test_functions_take_few_parameters() -> None:
    every = {place(path, node, node.name): parameters(node) for path in SHIPPED for node in functions(path)}
    assert not (many := {where: n for where, n in every.items() if n > 6}), shown(many)


def imported(path: Path) -> set[str]:
    """What a file imports at its top: modules of ours and of the standard library, other libraries once each."""
    names = set()
    for node in parse(path).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    kept = (*ROOMS, *sys.stdlib_module_names)
    names -= MARKS
    return {name if name.partition(".")[0] in kept else name.partition(".")[0] for name in names}


def test_files_import_little() -> None:
    counts = {place(path): len(imported(path)) for path in SHIPPED}
    assert not (many := {where: n for where, n in counts.items() if n > 12}), shown(many)


def test_nothing_is_global() -> None:
    found = {
        place(path, node): ", ".join(node.names)
        for path in FILES
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Global)
    }
    assert not found, shown(found)


def test_classes_inherit_one_level() -> None:
    """A class of ours may build on a library's or on one of ours that does; not on a third."""
    classes = {
        node.name: (path, node, {ast.unparse(base).split("[")[0].split(".")[-1] for base in node.bases})
        for path in SHIPPED
        for node in ast.walk(parse(path))
        if isinstance(node, ast.ClassDef)
    }
    deep = {
        place(path, node, name): f"{name} -> {parent} -> {', '.join(classes[parent][2] & classes.keys())}"
        for name, (path, node, parents) in classes.items()
        for parent in parents & classes.keys()
        if classes[parent][2] & classes.keys()
    }
    assert not deep, shown(deep)


@pytest.mark.parametrize("path", SOURCES, ids=place)
def test_file_opens_with_what_it_is(path: Path) -> None:
    text = ast.get_docstring(parse(path))
    assert text and len(text.split()) >= 5, "the first statement of a file is a docstring that says what the file is"


def test_packages_have_empty_init() -> None:
    assert not [place(path) for path in FILES if path.name == "__init__.py" and path.read_text().strip()]
    lacking = {path.parent for path in SHIPPED} - {path.parent for path in SHIPPED if path.name == "__init__.py"}
    assert not lacking


def test_public_things_say_what_they_are() -> None:
    kinds = (ast.FunctionDef, ast.ClassDef)
    silent = [
        place(path, node, node.name)
        for path in SHIPPED
        for node in parse(path).body
        if isinstance(node, kinds) and not node.name.startswith("_") and not ast.get_docstring(node)
    ]
    assert not silent, "\n".join(silent)


def test_names_say_something() -> None:
    vague = [place(path) for path in FILES if VAGUE_FILES & {part.lower() for part in (path.stem, path.parent.name)}]
    for path in FILES:
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.ClassDef) and node.name.endswith(VAGUE_ENDS):
                vague.append(place(path, node, node.name))
            if isinstance(node, Function) and node.name in VAGUE_NAMES:
                vague.append(place(path, node, node.name))
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id in VAGUE_NAMES:
                vague.append(place(path, node, node.id))
    assert not vague, "\n".join(vague)
