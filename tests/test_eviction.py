"""How a store forgets: the two halves of a rule agree, a wrong rule is refused, and a rule of one's own is obeyed."""

import collections

import histories
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import slow_memory
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from packforcing_jax.config import CacheConfig
from packforcing_jax.errors import InputError
from packforcing_jax.memory import cache
from packforcing_jax.policies import eviction
from packforcing_jax.policies.eviction import FIFO, Eviction
from packforcing_jax.sampling import block_step, host_archive


def _half_slot(item, size):
    half = size // 2
    return jnp.where(item < half, item, half + FIFO.slot_of(item - half, size - half))


def _half_ids(written, size):
    half = size // 2
    first = jnp.where(jnp.arange(half) < written, jnp.arange(half), -1)
    later = FIFO.ids_in(jnp.maximum(written - half, 0), size - half)
    return jnp.concatenate([first, jnp.where(later >= 0, half + later, -1)])


def _even_slot(item, size):
    return jnp.where(item % 2 == 0, FIFO.slot_of(item // 2, size), -1)


def _even_ids(written, size):
    ids = FIFO.ids_in((written + 1) // 2, size)
    return jnp.where(ids >= 0, 2 * ids, -1)


HALF = Eviction("keep the first half", _half_slot, _half_ids)  # the rest is a ring
EVEN = Eviction("keep every second", _even_slot, _even_ids)
OWN = pytest.mark.parametrize("rule", [HALF, EVEN], ids=["first half", "every second"])


def slow_ids(rule, written, size):
    """The item in each slot, written one after the other; -1 where there is none."""
    held = [-1] * size
    for item in range(written):
        slot = int(rule.slot_of(item, size))
        if slot >= 0:
            held[slot] = item
    return held


@given(st.integers(1, 40), st.integers(0, 300))
@settings(max_examples=60, derandomize=True, deadline=None)
def test_the_halves_of_fifo_agree_and_it_keeps_the_newest(size, written):
    held = np.maximum(FIFO.ids_in(written, size), -1)
    np.testing.assert_array_equal(held, slow_ids(FIFO, written, size))
    assert sorted(i for i in held if i >= 0) == [*range(max(0, written - size), written)]


@given(st.sampled_from([HALF, EVEN]), st.integers(1, 9), st.integers(0, 40))
@settings(max_examples=40, derandomize=True, deadline=None)
def test_the_halves_of_rules_of_ones_own_agree(rule, size, written):
    np.testing.assert_array_equal(
        np.maximum(rule.ids_in(written, size), -1), slow_ids(rule, written, size)
    )


@given(st.integers(0, 30))
@settings(max_examples=10, derandomize=True, deadline=None)
def test_a_store_without_slots_holds_nothing(written):
    assert FIFO.ids_in(written, 0).shape == (0,)
    assert FIFO.slot_of(written, 0) == 0  # of a store that nothing is written to
    eviction.check(FIFO, 0)


@pytest.mark.parametrize("rule", [FIFO, HALF, EVEN])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_right_rule_passes(rule, size):
    eviction.check(rule, size)


WRONG = {
    "late": (lambda item, size: item % size, lambda written, size: FIFO.ids_in(written - 1, size)),
    "other slots": (lambda item, size: (item + 1) % size, FIFO.ids_in),
    "too few": (FIFO.slot_of, lambda written, size: FIFO.ids_in(written, size)[:-1]),
    "only after a turn": (lambda item, size: item % size, lambda written, size: np.arange(size)),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_rule_whose_halves_disagree_is_refused(name):
    rule = Eviction(name, *WRONG[name])
    with pytest.raises(
        InputError, match=rf"cache\.eviction='{name}': after \d+ items ids_in says .* agree\."
    ):
        CacheConfig(eviction=rule)


def test_a_rule_that_writes_outside_its_store_is_refused():
    rule = Eviction("outside", lambda item, size: item, _ids_up_to)
    with pytest.raises(
        InputError,
        match=r"cache\.eviction='outside' writes item 129 to slot 129 of 129; correct it",
    ):
        CacheConfig(eviction=rule)
    CacheConfig(eviction=rule, top=0)  # has no archive


def _ids_up_to(written, size):
    return np.where(np.arange(size) < written, np.arange(size), -1)


def test_an_unknown_rule_is_refused_with_the_nearest_one():
    with pytest.raises(
        InputError, match=r"cache\.eviction='fiffo' is unknown; did you mean fifo\?"
    ):
        CacheConfig(eviction="fiffo")


# The archive of a memory


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize(
    ("rope_adjustment", "selection"), [("sink", "affinity"), ("incremental", "random")]
)
@OWN
def test_a_rule_of_ones_own_is_obeyed_in_random_histories(
    rule, rope_adjustment, selection, stacked
):
    """With cuts and flushes, after which the archive is counted anew."""
    cfg = CacheConfig(
        block=2,
        sink=2,
        recent=2,
        top=2,
        capacity=5,
        eviction=rule,
        rope_adjustment=rope_adjustment,
        selection=selection,
        score_pool=(2, 1, 1),
    )
    exp = histories.experiment(cfg)
    tally = collections.Counter()
    step = histories.stepper(exp, stacked=stacked)
    rng = np.random.default_rng(11)
    for events in (None, {9: "flush"}, {4: "cut", 12: "flush"}):
        story = slow_memory.tell(exp, rng, blocks=16, layers=2, videos=4)
        tally += histories.check_history(exp, story, step, stacked=stacked, events=events)
    assert step._cache_size() == 1
    assert tally["past capacity"]
    assert tally["seen again"]


@pytest.mark.parametrize(
    ("rule", "visible"),
    [
        (FIFO, [8, 9, 10, 11, 12]),
        (HALF, [1, 2, 3, 11, 12]),  # 10 has gone for 13, which is still recent
        (EVEN, [3, 5, 7, 9, 11]),
    ],
    ids=["fifo", "first half", "every second"],
)
def test_which_blocks_are_left(rule, visible):
    """After 14 blocks, the first the sink and the last recent: five visible, one slot for the recent one's twin."""
    cfg = CacheConfig(
        block=2, sink=2, recent=2, top=2, capacity=5, eviction=rule, score_pool=(2, 1, 1)
    )
    assert slow_memory.visible(cfg, 14).archive == visible


LATE = {"scope": "shared", "timing": "late", "capacity": 3}


def played(exp, blocks):
    """Latents and ids of blocks made by the archive that `exp` says."""
    nets = tiny.apart()
    text = tiny.text()
    memory = cache.init(exp.memory, tiny.BATCH)
    archive = host_archive.init(exp.memory, tiny.BATCH)
    found = []
    for block in range(blocks):
        noise = tiny.noise(exp, block)
        progress = jax.tree.map(np.asarray, memory.progress)
        if exp.cache.archive == "host":
            denoiser = block_step.Denoiser(nets, exp.step, text)
            memory, done = host_archive.denoise(denoiser, memory, archive, noise)
        else:
            memory, done = tiny.denoise(nets, exp.step, memory, noise=noise, text=text)
        memory, packed = tiny.commit(
            nets,
            exp.step,
            memory,
            latent=done.latent,
            low_res=tiny.low_res(1)[0],
            selection=done.selection,
            text=text,
        )
        if packed is not None:
            host_archive.put(archive, host_archive.slot(exp.memory, progress), packed)
        found.append((np.asarray(done.latent), tiny.ids(done)))
    return found


@OWN
def test_the_host_archive_obeys_it_as_the_one_on_the_device_does(rule):
    exps = [tiny.with_cache(**LATE, archive=x, eviction=rule) for x in ("host", "device")]
    host, device = (played(exp, 12) for exp in exps)
    seen = set()
    for block, ((latent, ids), (expected, chosen)) in enumerate(zip(host, device, strict=True)):
        np.testing.assert_array_equal(ids, chosen)
        np.testing.assert_allclose(latent, expected, atol=2e-5)
        archive = slow_memory.visible(exps[0].cache, block).archive
        assert np.isin(ids[ids >= 0], archive).all()
        seen.update(ids[ids >= 0].tolist())
    assert (min(seen), max(seen)) == (1, 9)  # of the last block, 10 is still recent
