"""The package reads downwards: a module is short and imports only from modules above it in ORDER."""

import ast
import graphlib
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "packforcing_jax"
ORDER = """
errors interrupts hlo types train_config config tensors trees versions options hub timing placement
rope schedules unipc attention layers selection cache view dit vae_layers vae codec text tokenizer compressor sampler
archive formulas counting
checkpoints models encoding growing video
stage.world stage.captions stage.oracle stage.metrics stage.data stage.stories
pipeline programs fitting budget bench trace saves keeping inspection timelines jobs
training.records training.mesh training.sources training.optimisers training.batches
training.rollout training.distillation training.objectives training.paths training.importing
training.state training.exports training.logs training.runs
evaluation recall verify_parts verify_dit verify_training verify
cli.common cli.doctor cli.convert cli.plan cli.prepare cli.download cli.bench cli.inspect cli.sample cli.verify
cli.train cli.evaluate cli.main __main__
""".split()  # noqa: SIM905
CONVERT_STANDS_ABOVE = "pipeline"  # conversion knows the networks and checkpoints, nothing that runs them
MAY_CONVERT = ("verify", "cli.convert")  # and the modules whose names begin so
FOREIGN = {"torch", "diffusers", "transformers", "tensorflow"}
LINES = 350


def name_of(path, root=PACKAGE):
    return ".".join(path.relative_to(root).with_suffix("").parts)


ON_DISK = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__init__.py"}
CONVERT = {path.stem: path for path in sorted((ROOT / "convert").glob("*.py")) if path.name != "__init__.py"}


def is_module(dotted):
    package, _, name = dotted.partition(".")
    return name in {"packforcing_jax": ON_DISK, "convert": CONVERT}.get(package, {})


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
                found.add(inner if is_module(inner) else node.module)
    return found


def within(package, source):
    """Modules of `package` that `source` imports, without its name; packages themselves do not count."""
    ours = {name for name in imported(source) if name.startswith(f"{package}.") and is_module(name)}
    return {name.removeprefix(f"{package}.") for name in ours}


def test_order_is_the_package():
    assert len(ORDER) == len(set(ORDER))
    assert set(ORDER) == set(ON_DISK), "add new modules to ORDER, where they belong"


@pytest.mark.parametrize("name", list(ON_DISK))
def test_a_module_is_short_and_imports_only_what_stands_above_it(name):
    source = ON_DISK[name].read_text()
    assert len(source.splitlines()) <= LINES
    above = set(ORDER[: ORDER.index(name)])
    assert within("packforcing_jax", source) <= above
    assert not within("convert", source) or name.startswith(MAY_CONVERT)


@pytest.mark.parametrize("name", list(CONVERT))
def test_conversion_is_short_and_knows_only_the_networks(name):
    source = CONVERT[name].read_text()
    assert len(source.splitlines()) <= LINES
    assert within("packforcing_jax", source) <= set(ORDER[: ORDER.index(CONVERT_STANDS_ABOVE)])


def test_conversion_has_no_cycles():
    graph = {name: within("convert", path.read_text()) for name, path in CONVERT.items()}
    assert set(graphlib.TopologicalSorter(graph).static_order()) == set(CONVERT)


@pytest.mark.parametrize("path", [*ON_DISK.values(), *CONVERT.values()], ids=lambda path: name_of(path, ROOT))
def test_a_file_says_what_it_is_for_and_needs_no_other_framework(path):
    source = path.read_text()
    assert ast.get_docstring(ast.parse(source))
    assert not {name.split(".")[0] for name in imported(source)} & FOREIGN


@pytest.mark.parametrize("name", [name for name in ON_DISK if name.startswith("cli.")])
def test_verbs_import_jax_only_when_they_run(name):
    top = [node for node in ast.parse(ON_DISK[name].read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    heavy = {"jax", "flax", "optax", "numpy", "grain"}
    assert not {each.split(".")[0] for node in top for each in imported(ast.unparse(node))} & heavy


def test_imports_are_read_wherever_they_stand():
    source = "import numpy as np\ndef f():\n    from packforcing_jax import rope, config\n"
    assert imported(source) == {"numpy", "packforcing_jax.rope", "packforcing_jax.config"}
    assert imported("from packforcing_jax.errors import InputError") == {"packforcing_jax.errors"}
    assert within("packforcing_jax", "import packforcing_jax.stage.world\nimport packforcing_jax") == {"stage.world"}
