"""Every experiment in `configs/` builds, is short, and has the sizes that the paper and the weights fix."""

import math

import jax
import pytest
from flax import nnx

from packforcing_jax import pytrees
from packforcing_jax.config import loading
from packforcing_jax.networks import dit

NAMES = loading.names()


@pytest.mark.parametrize("name", NAMES)
def test_a_config_builds_and_says_what_it_is(name):
    experiment = loading.load_experiment(name)
    text = loading.find(name).read_text()
    assert experiment.name == name
    assert text.removeprefix("r").startswith('"""')
    assert len(text.splitlines()) <= 100  # as the formatter lays it out


@pytest.mark.parametrize("name", NAMES)
def test_packed_blocks_are_whole(name):
    experiment = loading.load_experiment(name)
    for axis, size in enumerate((experiment.compressor.frames, *experiment.latent)):
        assert size >= experiment.compressor.stride(axis)
    assert experiment.cache.block <= experiment.compressor.frames
    assert (
        experiment.cache.max_position
        >= experiment.cache.sink + experiment.cache.recent + experiment.cache.block
    )


def sharp(experiment, frames):
    return frames * experiment.tokens_per_frame


def cached(experiment):
    cache = experiment.cache
    return (
        sharp(experiment, cache.sink + cache.recent)
        + cache.top * experiment.tokens_per_packed_block
    )


def attended(experiment):
    return cached(experiment) + sharp(experiment, experiment.cache.block)


@pytest.mark.parametrize("name", ["wan_t2v_1_3b", "wan_t2v_1_3b_paper", "wan_t2v_14b"])
def test_a_frame_is_1560_tokens_and_a_packed_block_182(name):
    experiment = loading.load_experiment(name)
    height, width = (size * experiment.codec.space_factor for size in experiment.latent)
    assert (height, width) == (480, 832)
    assert experiment.tokens_per_frame == 1560
    assert experiment.tokens_per_packed_block == 182


def test_the_paper_profile_has_the_papers_budget():
    paper = loading.load_experiment("wan_t2v_1_3b_paper")
    assert cached(paper) == 21_632
    assert attended(paper) == 27_872
    assert cached(paper) * paper.dit.dim * 2 * 2 * paper.dit.layers == pytest.approx(
        3.987e9, rel=1e-3
    )  # bf16 k and v


def test_the_published_profile_attends_26312_keys():
    assert attended(loading.load_experiment("wan_t2v_1_3b")) == 26_312


def test_packing_is_about_32_times():
    paper = loading.load_experiment("wan_t2v_1_3b_paper")
    assert sharp(paper, paper.cache.block) / paper.tokens_per_packed_block == pytest.approx(
        34.3, abs=0.05
    )


@pytest.mark.parametrize(
    ("name", "parameters"), [("wan_t2v_1_3b", 1_418_996_800), ("wan_t2v_14b", 14_288_491_584)]
)
def test_the_transformers_have_the_published_number_of_parameters(name, parameters):
    config = loading.load_experiment(name).dit
    shapes = jax.eval_shape(lambda: dit.WanDiT(config, nnx.Rngs(0)))
    assert sum(math.prod(leaf.shape) for leaf in pytrees.flatten(shapes).values()) == parameters
