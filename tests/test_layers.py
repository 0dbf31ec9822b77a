"""Imports run down the list of rooms, and no file imports itself by way of others.

Lazy and typing-only imports count: what looks up only now and then does look up.
"""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import normswap

PACKAGE = Path(normswap.__file__).parent
# From the bottom; those in one line may know each other. The package itself is the public API.
ROOMS = (
    ("core",),
    ("source", "demo"),
    ("norms", "nn"),
    ("graph",),
    ("passes",),
    ("fit",),
    ("api", "store"),
    ("deploy",),
    ("report",),
    ("cli", "__main__"),
)
HEIGHT = {room: height for height, rooms in enumerate(ROOMS) for room in rooms}


def files() -> dict[str, Path]:
    """The modules of the package, by name."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


FILES = files()


def imports(path: Path) -> Iterator[str]:
    """The modules of the package that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("normswap."):
            for each in node.names:
                name = f"{node.module}.{each.name}"
                yield name if name in FILES else str(node.module)
        elif isinstance(node, ast.Import):
            yield from (each.name for each in node.names if each.name in FILES)


def room(name: str) -> str:
    return name.split(".")[1]


def test_every_file_is_in_a_room() -> None:
    assert {room(name) for name in FILES if "." in name} == HEIGHT.keys()


def test_imports_run_down_the_list_of_rooms() -> None:
    up = [
        f"{name} imports {other}"
        for name, path in FILES.items()
        if "." in name
        for other in imports(path)
        if "." in other and HEIGHT[room(other)] > HEIGHT[room(name)]
    ]
    assert up == []


def test_no_file_imports_itself_by_way_of_others() -> None:
    graph = {name: set(imports(path)) for name, path in FILES.items() if "." in name}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(" imports ".join(reversed(error.args[1]))) from None


def test_the_table_of_operators_knows_nothing_of_graphs() -> None:
    for name, path in FILES.items():
        if name.startswith("normswap.graph.operators"):
            above = [
                o
                for o in imports(path)
                if not o.startswith(("normswap.core", "normswap.graph.operators"))
            ]
            assert above == [], name


def test_relative_imports_do_not_hide_from_these_tests() -> None:
    for path in FILES.values():
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.ImportFrom) and node.level), path


def private_names(path: Path) -> Iterator[str]:
    """The names of torch that a file uses and torch does not document; operators are no names."""

    def is_private(name: str) -> bool:
        return any(part.startswith("_") and part[1:2] != "_" for part in name.split("."))

    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            yield from (
                name
                for name in (f"{node.module}.{each.name}" for each in node.names)
                if is_private(name)
            )
        elif isinstance(node, ast.Import):
            yield from (
                n.name for n in node.names if n.name.startswith("torch.") and is_private(n.name)
            )
        elif isinstance(node, ast.Attribute):
            name = ast.unparse(node) if "(" not in ast.unparse(node) else ""
            if name.startswith("torch.") and is_private(name) and not name.startswith("torch.ops."):
                yield name


def test_private_names_of_torch_are_in_one_file() -> None:
    used = {name: sorted(set(private_names(path))) for name, path in FILES.items()}
    assert len(used.pop("normswap.core.compat")) > 15
    assert {name: names for name, names in used.items() if names} == {}
