"""Sizes that cannot work are refused by name, and derived sizes are what the parts are built from."""

import dataclasses

import pytest
import tiny

from packforcing_jax import config
from packforcing_jax.config import (
    CacheConfig,
    CompressorConfig,
    DiTConfig,
    Experiment,
    SampleConfig,
    memory,
)
from packforcing_jax.errors import InputError


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: DiTConfig(dim=100, heads=3), r"dit\.dim=100 is not divisible by heads=3"),
        (lambda: DiTConfig(dim=15, heads=3), r"dit\.dim/heads=5 must be even"),
        (lambda: DiTConfig(patch=(2, 2, 2)), r"dit\.patch=\(2, 2, 2\) must be 1 in time"),
        (
            lambda: DiTConfig(dim=36, heads=3, rope_pairs=(2, 2, 3)),
            r"rope_pairs=\(2, 2, 3\) must add up to 6",
        ),
        (
            lambda: config.VAEConfig(temporal_downsample=(True,)),
            r"temporal_downsample=\(True,\) needs 3 entries",
        ),
        (lambda: config.VAEConfig(z_dim=3), r"need z_dim=3 entries"),
        (
            lambda: config.TextConfig(dim_attn=10, heads=3),
            r"text\.dim_attn=10 is not divisible by heads=3",
        ),
        (
            lambda: CacheConfig(sink=-4),
            r"cache\.sink=-4 is out of range; give a whole number from 0",
        ),
        (lambda: CacheConfig(key_multiple=-1), r"cache\.key_multiple=-1 is out of range"),
        (
            lambda: CacheConfig(block=0),
            r"cache\.block=0 is out of range; give a whole number from 1",
        ),
        (lambda: CacheConfig(top=9, capacity=8), r"cache\.top=9 exceeds capacity=8"),
        (lambda: CacheConfig(sink=6), r"cache\.sink=6 and recent=4 must be whole blocks of 4"),
        (lambda: CacheConfig(recent=7), r"cache\.sink=8 and recent=7 must be whole blocks of 4"),
        (
            lambda: CacheConfig(rope_adjustment="shift"),
            r"cache\.rope_adjustment='shift' is unknown; choose one of sink",
        ),
        (lambda: CacheConfig(span="loose"), r"cache\.span='loose' is unknown"),
        (
            lambda: CacheConfig(selection="recent"),
            r"cache\.selection='recent' is unknown; did you mean recency\?",
        ),
        (
            lambda: CacheConfig(eviction="lifo"),
            r"cache\.eviction='lifo' is unknown; did you mean fifo\?",
        ),
        (
            lambda: CacheConfig(window=6, top=0),
            r"cache\.window=6 must be whole blocks of 4 frames",
        ),
        (
            lambda: CacheConfig(window=8),
            r"cache\.window=8 must be whole blocks .* one block when packed blocks are attended",
        ),
        (
            lambda: CacheConfig(archive="host"),
            r"cache\.archive='host' is fetched once a block, .* set scope=shared and timing=late",
        ),
        (
            lambda: CacheConfig(scope="video"),
            r"cache\.scope='video' is unknown; choose one of layer, shared",
        ),
        (
            lambda: CacheConfig(timing="last"),
            r"cache\.timing='last' is unknown; choose one of first, late, every",
        ),
        (
            lambda: CacheConfig(archive="disk"),
            r"cache\.archive='disk' is unknown; choose one of device, host",
        ),
        (
            lambda: CacheConfig(rope_adjustment="incremental", span="fit"),
            "squeezes them; set span=true or .*=sink",
        ),
        (
            lambda: CompressorConfig(positions="odd"),
            r"compressor\.positions='odd' is unknown; choose one of stretched, native",
        ),
        (
            lambda: CompressorConfig(keys="own"),
            r"compressor\.keys='own' is unknown; choose one of blocks, projected",
        ),
        (
            lambda: CompressorConfig(channels=(3, 4)),
            r"channels=\(3, 4\) and strides=.* need the same length",
        ),
        (lambda: CompressorConfig(branches="none"), r"compressor\.branches='none' is unknown"),
        (lambda: SampleConfig(steps=()), r"sample\.steps=\(\) holds no step"),
        (lambda: SampleConfig(steps=(500, 500)), r"sample\.steps=\(500, 500\) must fall"),
        (lambda: SampleConfig(steps=(1001, 5)), r"sample\.steps=\(1001, 5\) is out of range"),
        (lambda: SampleConfig(steps=(5, 0)), r"sample\.steps=\(5, 0\)"),
        (lambda: SampleConfig(prediction="noise"), r"sample\.prediction='noise' is unknown"),
        (
            lambda: config.TrainConfig(batch=0),
            r"train\.batch=0 is out of range; give a whole number from 1",
        ),
        (lambda: config.TrainConfig(save_every=-1), r"train\.save_every=-1"),
        (
            lambda: config.TrainConfig(history="none"),
            r"train\.history='none' is unknown; choose one of memory, clean, noisy",
        ),
        (
            lambda: config.TrainConfig(blend=1.5, blend_from="model"),
            r"train\.blend=1\.5 is out of range; give a number from 0\.0 to 1\.0",
        ),
        (
            lambda: config.TrainConfig(blend=0.25),
            r"train\.blend=0\.25 needs a model .* name it in train\.blend_from",
        ),
        (
            lambda: Experiment("odd", latent=(60, 103)),
            r"latent=\(60, 103\) is not a multiple of dit\.patch",
        ),
        (
            lambda: Experiment("odd", dit=DiTConfig(in_channels=8, out_channels=8)),
            r"codec\.z_dim=16 differs from dit\.in_channels=8",
        ),
    ],
)
def test_the_impossible_is_refused_by_name_and_value(build, said):
    with pytest.raises(InputError, match=said):
        build()


def test_a_memory_without_packed_blocks_need_not_be_whole_blocks():
    assert CacheConfig(sink=1, recent=7, top=0, capacity=0).slots == 0


@pytest.mark.parametrize(
    ("head", "pairs"), [(128, (22, 21, 21)), (12, (2, 2, 2)), (32, (6, 5, 5)), (4, (2, 0, 0))]
)
def test_rotary_pairs_fill_the_head_and_time_takes_the_rest(head, pairs):
    assert DiTConfig(dim=3 * head, heads=3).pairs == pairs
    assert sum(pairs) == head // 2


def test_codecs_know_their_factors():
    assert (config.VAEConfig().time_factor, config.VAEConfig().space_factor) == (4, 8)
    odd = config.VAEConfig(dim_mult=(1, 2, 3), temporal_downsample=(False, True))
    assert (odd.time_factor, odd.space_factor) == (2, 4)
    exact = config.SpaceToDepthConfig(factor=3)
    assert (exact.time_factor, exact.space_factor, exact.z_dim) == (1, 3, 27)


def test_stores_hold_what_is_seen_and_what_is_being_made():
    """The ring: recent frames and one block. The archive: `capacity`, and the twins of recent blocks."""
    cache = CacheConfig(block=3, sink=3, recent=6, top=2, capacity=5)
    assert (cache.ring, cache.slots, cache.attended) == (9, 7, 2)
    assert dataclasses.replace(cache, selection="all").attended == 5
    plain = dataclasses.replace(tiny.EXP, cache=dataclasses.replace(cache, top=0, key_multiple=1))
    assert plain.memory.room == plain.memory.full_res == (3 + 9) * 8
    joint = dataclasses.replace(
        plain,
        cache=dataclasses.replace(plain.cache, window=9, rope_adjustment="sink_only"),
        sample=dataclasses.replace(plain.sample, steps=(1000, 600, 300)),
    )
    assert joint.cache.ring == 6 + 3 + 9  # as many frames as a whole window sees
    assert joint.memory.room == (3 + 18) * 8
    assert (
        joint.memory.denoised_in == (3 + 6 + 6 + 9) * 8
    )  # a window that shrinks sees two blocks more
    assert joint.memory.committed_in == 18 * 8


def test_compressor_strides_multiply_per_axis():
    assert [CompressorConfig().stride(axis) for axis in range(3)] == [2, 8, 8]
    assert [tiny.EXP.compressor.stride(axis) for axis in range(3)] == [2, 4, 2]


def test_tokens_are_counted_in_frames_and_packed_blocks():
    assert (tiny.EXP.grid, tiny.EXP.tokens_per_frame) == ((4, 2), 8)
    assert (tiny.EXP.packed_grid, tiny.EXP.tokens_per_packed_block) == ((2, 2, 2), 8)
    wan = Experiment("wan")
    assert (wan.tokens_per_frame, wan.packed_grid, wan.tokens_per_packed_block) == (
        1560,
        (2, 7, 13),
        182,
    )


def test_a_training_clip_is_whole_blocks():
    assert dataclasses.replace(tiny.EXP, clip=21).blocks == 7
    with pytest.raises(
        InputError, match=r"clip=20 is not a whole number of blocks of 3; change one\."
    ):
        _ = dataclasses.replace(tiny.EXP, clip=20).blocks


NEEDED = {  # beside a choice, for it to be made
    ("cache.archive", "host"): {"scope": "shared", "timing": "late"},
    ("cache.registry", "shared"): {"timing": "every"},
    ("compressor.branches", "own"): {"tokens": 5},
}


def test_every_choice_on_offer_can_be_made():
    defaults = {
        "cache": CacheConfig,
        "compressor": CompressorConfig,
        "sample": SampleConfig,
        "dtypes": config.DtypeConfig,
        "train": config.TrainConfig,
    }
    for key, allowed in config.CHOICES.items():
        group, name = key.split(".")
        assert getattr(defaults[group](), name) in allowed
        for choice in allowed:
            beside = NEEDED.get((key, choice), {})
            assert getattr(defaults[group](**beside, **{name: choice}), name) == choice


@pytest.mark.parametrize("profile", config.PROFILES)
def test_profiles_build_and_can_be_keys(profile):
    experiment = Experiment("any", cache=config.PROFILES[profile])
    assert {experiment: 1}[dataclasses.replace(experiment)] == 1


def test_values_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny.EXP.cache.sink = 4  # type: ignore[misc]


OWN = CacheConfig(
    block=3,
    sink=6,
    recent=9,
    top=5,
    capacity=7,
    max_position=30,
    score_pool=(3, 2, 1),
    key_multiple=9,
)


@pytest.mark.parametrize("profile", config.PROFILES)
def test_a_profile_keeps_what_the_model_was_trained_with(profile):
    got = memory.profiled(OWN, profile)
    kept = ("block", "max_position", "score_pool", "key_multiple")
    assert [getattr(got, name) for name in kept] == [getattr(OWN, name) for name in kept]


@pytest.mark.parametrize(
    ("profile", "changed"),
    [
        ("no-mid", {"top": 0, "capacity": 0}),
        ("no-sink", {"top": 0, "capacity": 0, "sink": 0, "recent": 15}),
        ("paper", {"top": 16, "capacity": 128, "sink": 6, "recent": 3}),
        ("published", {"top": 16, "capacity": 128, "sink": 9, "recent": 3, "span": "fit"}),
    ],
)
def test_a_profile_changes_what_its_name_says(profile, changed):
    assert memory.profiled(OWN, profile) == dataclasses.replace(OWN, **changed)


def test_profiles_of_the_stage_model_are_as_they_were():
    stage = config.PROFILES["stage"]
    for name in ("stage", "no-mid", "no-sink"):
        assert memory.profiled(stage, name) == config.PROFILES[name]
    assert memory.profiled(stage, "no-sink").recent == 12
