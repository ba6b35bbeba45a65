"""The floors of the README's drawing: imports go down only."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "cityrag_jax"
FLOORS = [
    {"geo", "diffusion", "batch", "flops", "chips", "int8", "files", "progress"},
    {"data", "metrics", "model", "checkpoint", "parallel"},
    {"encode", "convert", "report", "rerun_file", "importers", "toy"},
    {"sampling", "generator", "rollout", "recording", "request", "jobs", "scores"}
    | {"plan", "training", "commands", "leases"},
    {"train", "generate", "evaluate", "survey", "doctor", "ui", "__main__"},
    {"demo"},  # which goes through all doors
]
SHARED = {"parallel", "checkpoint"}  # what model/ and checkpoint may use beside them


def room_of(path: pathlib.Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: pathlib.Path) -> set[str]:
    """Rooms of the package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
            if node.module == "cityrag_jax":
                names = [f"cityrag_jax.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {n.split(".")[1] for n in names if n.startswith("cityrag_jax.")}
    return found


def floor_of(room: str) -> int:
    return next(i for i, rooms in enumerate(FLOORS) if room in rooms)


FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def test_every_room_stands_on_a_floor():
    assert len(FILES) > 20
    known = set().union(*FLOORS)
    assert {room_of(path) for path in FILES} <= known


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path):
    room = room_of(path)
    for imported in imports_of(path) - {room}:
        below = floor_of(imported) < floor_of(room)
        beside = floor_of(imported) == floor_of(room)
        if floor_of(room) == 1:
            beside = imported in SHARED and room in {"model", "checkpoint"}
        elif floor_of(room) in (2, 4):
            beside = False
        assert below or beside, f"{path.name} ({room}) imports {imported}"


def test_data_workers_never_import_a_network():
    """A Grain worker re-imports what it runs; networks cost seconds and memory."""
    for name in ("store", "clips", "pairs"):
        assert "model" not in imports_of(PACKAGE / "data" / f"{name}.py")


@pytest.mark.parametrize(
    "path", sorted((PACKAGE / "geo").glob("*.py")), ids=lambda p: p.name
)
def test_geography_is_numpy_alone(path):
    """A float32 step at the size of ECEF coordinates is half a metre."""
    tree = ast.parse(path.read_text())
    modules = [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    modules += [
        a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names
    ]
    assert not any((m or "").split(".")[0] in {"jax", "flax"} for m in modules)
