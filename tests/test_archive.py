"""Packed blocks on the host: the same choices and the same video, with nothing packed left on the device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from packforcing_jax.config import CacheConfig
from packforcing_jax.errors import InputError
from packforcing_jax.memory import cache
from packforcing_jax.memory import layout as layouts
from packforcing_jax.sampling import host_archive, pipeline, player
from packforcing_jax.types import KV

LATE = {"scope": "shared", "timing": "late", "capacity": 3}
HOST = tiny.with_cache(**LATE, archive="host")
SPEC = HOST.memory
BLOCKS = 9
HALF = 5  # the ring of four turns over twice


def play(model, state, blocks):
    """Latents and ids of `blocks`, and the state behind them."""
    words = [
        model.text_kv([first, "lime square"]) for first in ("a red disc", "the blue figure walks")
    ]
    found = []
    for index in blocks:
        state, block = player.next_block(model, state, words[index // 4 % 2])
        found.append((np.array(block.latent), tiny.ids(block)))
    return found, state


@pytest.fixture(scope="module")
def played(folder):
    """For both places of the archive each block's latents [b, ...] and ids [layer, b, top], and the state behind.

    And for the host the second half once more, "resumed" from a copy of the state behind the first.
    """
    loaded = pipeline.Pipeline.from_pretrained(folder)
    found = {}
    for place in ("device", "host"):
        model = loaded.with_settings(
            [*(f"cache.{name}={value}" for name, value in LATE.items()), f"cache.archive={place}"]
        )
        first, state = play(model, model.start(seed=3, videos=[5, 8]), range(HALF))
        half = jax.tree.map(np.array, state)
        rest, end = play(model, state, range(HALF, BLOCKS))
        found[place] = first + rest, jax.tree.map(np.array, end)
    found["resumed"] = play(model, half, range(HALF, BLOCKS))
    return found


def test_choices_and_latents_are_those_of_an_archive_on_the_device(played):
    """To what programs compiled in one piece or in four differ by."""
    choices = set()
    for (latent, ids), (expected, chosen) in zip(
        played["host"][0], played["device"][0], strict=True
    ):
        np.testing.assert_array_equal(ids, chosen)
        np.testing.assert_allclose(latent, expected, atol=2e-5)
        assert (ids[0] == ids[1]).all()  # one choice for all layers
        choices.update(tuple(row) for row in (ids[0] - ids[0].max(axis=1, keepdims=True)).tolist())
    assert len(choices) > 3  # not always the newest
    assert (played["host"][0][-1][1] >= 0).all()


def test_from_a_copy_of_its_state_the_video_goes_on_bit_for_bit(played):
    whole = played["host"]
    resumed = played["resumed"]
    for (latent, ids), (expected, chosen) in zip(resumed[0], whole[0][HALF:], strict=True):
        np.testing.assert_array_equal(ids, chosen)
        np.testing.assert_array_equal(latent, expected)
    jax.tree.map(np.testing.assert_array_equal, resumed[1].archive, whole[1].archive)
    jax.tree.map(np.testing.assert_array_equal, resumed[1].memory, whole[1].memory)


def test_the_host_holds_what_the_device_would(played):
    device, host = (played[place][1] for place in ("device", "host"))
    for store, layer in zip(host.archive, device.memory.layers, strict=True):
        np.testing.assert_allclose(store.k, layer.packed.k, atol=2e-5)
        np.testing.assert_allclose(store.v, layer.packed.v, atol=2e-5)
        assert (np.abs(store.v).max(axis=(2, 3, 4)) > 0).all()  # every slot was written
    assert device.archive == []


def test_the_device_keeps_no_packed_block(played):
    for layer in played["host"][1].memory.layers:
        assert layer.packed.k.shape[1] == layer.packed.v.shape[1] == 0
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(host_archive.init(SPEC, 2)))
    assert host_archive.init(tiny.EXP.memory, 2) == []


def packed(number):
    """A packed block for every layer, [b, p, n, h], of one number."""
    return [
        KV(
            k=jnp.full((2, 8, 3, 12), number + 0.25 * layer),
            v=jnp.full((2, 8, 3, 12), -number - 0.25 * layer),
        )
        for layer in range(2)
    ]


def test_blocks_of_the_sink_are_not_kept_and_the_oldest_gives_way():
    spec = tiny.with_cache(HOST, sink=6).memory
    store = host_archive.init(spec, 2)
    host_archive.put(store, host_archive.slot(spec, layouts.begin(0)), packed(1))
    host_archive.put(store, host_archive.slot(spec, layouts.begin(1)), packed(2))
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(store))
    for block in range(2, 8):
        host_archive.put(store, host_archive.slot(spec, layouts.begin(block)), packed(block + 1))
    for layer in range(2):
        held = np.asarray([7, 8, 5, 6]) + 0.25 * layer  # blocks 2 to 7 in turn, in a ring of four
        np.testing.assert_array_equal(
            store[layer].k, np.broadcast_to(held[:, None, None, None], (2, 4, 8, 3, 12))
        )
        np.testing.assert_array_equal(store[layer].v, -store[layer].k)


def test_the_host_ring_and_the_devices_plan_agree_on_who_lies_where():
    store = host_archive.init(SPEC, 2)
    exp = HOST
    for block in range(12):
        plan = layouts.layout(exp.cache, layouts.begin(block))
        for slot, held in enumerate(np.asarray(plan.ids)):
            if held >= 0:
                assert (store[1].k[:, slot] == held + 0.25).all()
        host_archive.put(store, host_archive.slot(SPEC, layouts.begin(block)), packed(block))
    assert (np.asarray(plan.ids) >= 0).sum() == exp.cache.capacity


def test_the_chosen_slots_are_taken_for_each_video_from_every_layer():
    rng = np.random.default_rng(4)
    store = [KV(*rng.normal(size=(2, 2, 4, 8, 3, 12)).astype(np.float32)) for _ in range(3)]
    slots = jnp.asarray([[3, 0, 1], [2, 2, 0]])
    chosen = cache.Selection(slots=slots, ids=slots, scores=slots, positions=slots)
    for kv, picked in zip(store, host_archive.gather(store, chosen), strict=True):
        for name in ("k", "v"):
            wanted = np.stack(
                [getattr(kv, name)[video, np.asarray(slots)[video]] for video in range(2)]
            )
            np.testing.assert_array_equal(getattr(picked.kv, name), wanted)
        np.testing.assert_array_equal(picked.positions, np.zeros((2, 3)))


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        (
            {"scope": "layer", "timing": "late"},
            r"scope='layer' and timing='late' .*set scope=shared and timing=late",
        ),
        (
            {"scope": "shared", "timing": "first"},
            r"scope='shared' and timing='first' .*set scope=shared and timing=late",
        ),
        ({"scope": "layer", "timing": "first"}, r"set scope=shared and timing=late"),
        (
            {"scope": "shared", "timing": "late", "rope_adjustment": "incremental"},
            r"'incremental'; set rope_adjustment=sink",
        ),
    ],
)
def test_what_the_host_cannot_serve_is_refused_with_the_remedy(changes, remedy):
    with pytest.raises(InputError, match=remedy):
        CacheConfig(archive="host", **changes)
