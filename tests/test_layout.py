"""The package reads downwards: a room imports only from rooms below it, and no two files depend on each other."""

import ast
import graphlib
import pathlib
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
ROOMS = """
errors interrupts types versions pytrees sharding
policies config networks memory methods io sampling stage data training plan evaluation verify live cli __main__
""".split()  # noqa: SIM905  from the ground up; a name without a folder is a file of the package itself
BESIDE = {
    "configs": "config training",
    "convert": "io",
}  # top-level folders of the repository and the rooms below them
MAY_CONVERT = {"verify", "cli"}  # the rooms that read public weights
MAY_FIND = {"config"}  # finds experiments by their name in configs/
FOREIGN = {"torch", "diffusers", "transformers", "tensorflow"}
ELSEWHERE = {"packforcing_jax.evaluation.vbench_driver"}  # programs of another environment


def module_of(path):
    """Dotted name, as it is imported, of a file of the package or of a folder that is installed inside it."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts if parts[0] == "packforcing_jax" else ("packforcing_jax", *parts))


FILES = {
    module_of(path): path
    for folder in ("packforcing_jax", *BESIDE)
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path.name != "__init__.py"
}


def room_of(module):
    return module.split(".")[1] if module != "packforcing_jax" else ""


def imported(source):
    """Dotted names of all modules that `source` imports anywhere, from `import a.b` and from `from a import b`."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "import by full name"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in FILES else node.module)
    return found


def ours(source):
    """The package's own modules and rooms that `source` imports."""
    return {name for name in imported(source) if name.startswith("packforcing_jax.")}


def below(room):
    """The rooms that a room may import from."""
    if room in BESIDE:
        last = max(ROOMS.index(name) for name in BESIDE[room].split())
        return {*ROOMS[: last + 1], room}
    allowed = {*ROOMS[: ROOMS.index(room) + 1]}
    return (
        allowed
        | ({"convert"} if room in MAY_CONVERT else set())
        | ({"configs"} if room in MAY_FIND else set())
    )


def test_rooms_are_the_package():
    assert len(ROOMS) == len(set(ROOMS))
    assert set(ROOMS) | set(BESIDE) == {room_of(module) for module in FILES}, (
        "add a new room to ROOMS, where it belongs"
    )


@pytest.mark.parametrize("module", list(FILES))
def test_a_module_imports_only_from_rooms_below_its_own(module):
    found = {room_of(name) for name in ours(FILES[module].read_text())}
    assert found <= below(room_of(module))


def test_no_two_files_depend_on_each_other():
    graph = {module: ours(path.read_text()) & set(FILES) for module, path in FILES.items()}
    assert set(graphlib.TopologicalSorter(graph).static_order()) == set(FILES)


@pytest.mark.parametrize("module", list(FILES))
def test_a_file_says_what_it_is_for_and_needs_no_other_framework(module):
    source = FILES[module].read_text()
    assert ast.get_docstring(ast.parse(source))
    assert module in ELSEWHERE or not {name.split(".")[0] for name in imported(source)} & FOREIGN


@pytest.mark.parametrize("module", sorted(ELSEWHERE))
def test_a_program_of_another_environment_needs_nothing_of_ours_and_nothing_imports_it(module):
    assert not ours(FILES[module].read_text())
    assert not [name for name, path in FILES.items() if module in imported(path.read_text())]


def test_every_room_is_installed_and_nothing_else():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = [path.parent for path in (ROOT / "packforcing_jax").rglob("__init__.py")]
    rooms = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    beside = {f"packforcing_jax.{name}": name for name in BESIDE}
    assert set(settings["packages"]) == rooms | set(beside)
    assert settings["package-dir"] == beside


@pytest.mark.parametrize("module", [module for module in FILES if room_of(module) == "cli"])
def test_verbs_import_jax_only_when_they_run(module):
    body = ast.parse(FILES[module].read_text()).body
    top = {
        name
        for node in body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in imported(ast.unparse(node))
    }
    assert not {name.split(".")[0] for name in top} & {"jax", "flax", "optax", "numpy", "grain"}


def test_imports_are_read_wherever_they_stand():
    source = "import numpy as np\ndef f():\n    from packforcing_jax.networks import rope, config\n"
    assert imported(source) == {
        "numpy",
        "packforcing_jax.networks.rope",
        "packforcing_jax.networks",
    }
    assert ours("from packforcing_jax.errors import InputError\nimport jax") == {
        "packforcing_jax.errors"
    }
