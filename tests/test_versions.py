"""Broken pairs of jax and flax are refused by name, from the metadata alone."""

from importlib import metadata

import pytest

from packforcing_jax import versions
from packforcing_jax.errors import MachineError


def fake(**numbers):
    def version(name):
        if name not in numbers:
            raise metadata.PackageNotFoundError(name)
        return numbers[name]

    return version


@pytest.mark.parametrize(
    ("jax", "flax"),
    [
        ("0.11.1", "0.12.8"),
        ("0.11.2", "0.12.8"),
        ("0.12.0.1", "0.12.8"),
        ("1.0", "0.12.8"),
        ("0.11.2", "0.12.9"),
    ],
)
def test_a_broken_pair_is_refused_with_both_versions_and_the_remedy(jax, flax):
    with pytest.raises(MachineError, match=r'pip install "flax>=') as raised:
        versions.check(fake(jax=jax, flax=flax))
    assert f"flax {flax}" in str(raised.value)
    assert f"jax {jax};" in str(raised.value)


@pytest.mark.parametrize(
    ("jax", "flax"),
    [
        ("0.10.2", "0.12.8"),
        ("0.11.0", "0.12.8"),
        ("0.11.1", "0.12.9"),
        ("0.12.0.1", "0.12.9"),
        ("0.12.0.1", "0.12.12"),
        ("0.11.2", "0.12.10"),
    ],
)
def test_other_pairs_pass(jax, flax):
    versions.check(fake(jax=jax, flax=flax))


def test_versions_compare_as_numbers_and_not_as_text():
    assert versions.parse("0.9.0") < versions.parse("0.11.1") < versions.parse("0.12.0.1")
    assert versions.parse("0.11.2.dev20260101+abc") == (0, 11, 2)
    assert versions.problem("0.9.0", "0.12.8") is None


@pytest.mark.parametrize("missing", ["jax", "flax"])
def test_a_missing_package_is_named(missing):
    present = {"jax": "0.10.2", "flax": "0.12.8"}
    del present[missing]
    with pytest.raises(
        MachineError, match=f"{missing} is not installed; run: pip install {missing}"
    ):
        versions.check(fake(**present))


def test_the_installed_pair_works():
    versions.check()


@pytest.mark.parametrize("python", ["py311", "py312"])
def test_the_pinned_pair_works_and_no_pin_holds_an_address(python, request):
    text = (request.config.rootpath / f"constraints-{python}.txt").read_text()
    pins = dict(line.split("==") for line in text.splitlines() if not line.startswith("#"))
    assert versions.problem(pins["jax"], pins["flax"]) is None
    assert pins["jaxlib"] == pins["jax"]
    assert "://" not in text
    assert "@" not in text


def test_every_dependency_is_pinned(request):
    import re
    import tomllib

    root = request.config.rootpath
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    names = {re.match(r"[\w-]+", each)[0].lower().replace("-", "_") for each in wanted}
    for python in ("py311", "py312"):
        lines = (root / f"constraints-{python}.txt").read_text().splitlines()
        pinned = {line.split("==")[0].lower().replace("-", "_") for line in lines if "==" in line}
        assert names <= pinned, names - pinned
