"""The suites of figures for video files, by name."""

from collections.abc import Mapping

from packforcing_jax.errors import nearest, require
from packforcing_jax.evaluation import native_suite, vbench_suite
from packforcing_jax.evaluation.suite import Suite

SUITES: Mapping[str, Suite] = {
    "native": native_suite.SUITE,
    "vbench": vbench_suite.VBENCH,
    "clip": vbench_suite.CLIP,
}


def named(name: str) -> Suite:
    """The suite of a name; raises `InputError` for one that is not there."""
    require(name in SUITES, f"--suite {name} is unknown for video files; {nearest(name, SUITES)}")
    return SUITES[name]
