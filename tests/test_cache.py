"""The memory against a slow one that keeps every block in a list and turns every key by itself."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from packforcing_jax import cache
from packforcing_jax.config import PROFILES, CacheConfig, CompressorConfig, DiTConfig, Experiment, SpaceToDepthConfig
from packforcing_jax.types import KV

LAYERS, VIDEOS, HEADS, PAIRS, THETA = 2, 3, 2, (3, 1, 2), (100.0, 20.0, 7.0)
ROWS, COLUMNS, PACKED_TOKENS = 2, 3, 2  # tokens of a frame, tokens of a packed block
FRAME = ROWS * COLUMNS


def experiment(cfg):
    return Experiment(
        name="numbered", latent=(2, 6), cache=cfg, codec=SpaceToDepthConfig(factor=1),
        dit=DiTConfig(dim=HEADS * 2 * sum(PAIRS), heads=HEADS, layers=LAYERS, in_channels=3, out_channels=3,
                      patch=(1, 1, 2), rope_pairs=PAIRS, rope_theta=THETA),
        compressor=CompressorConfig(channels=(2, 2), strides=((2, 2, 1), (1, 1, 4))),
    )  # fmt: skip


@st.composite
def memories(draw):
    """Settings of a memory: any sizes without packed blocks, whole blocks with them."""
    block, top = draw(st.integers(1, 4)), draw(st.integers(0, 3))
    unit = block if top else 1
    pick = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    return CacheConfig(
        block=block, top=top, capacity=top + draw(st.integers(0, 3)) if top else 0,
        sink=unit * draw(st.integers(0, 3)), recent=unit * draw(st.integers(0, 2)), spare=draw(st.integers(0, 4)),
        rope_adjustment=pick("sink", "sink", "none"), span=pick("true", "fit"), trained=draw(st.integers(4, 24)),
        selection=pick("affinity", "recency", "all"), key_multiple=pick(1, 8),
        score_pool=pick((1, 1, 1), (min(block, 2), 2, 1), (1, 1, 2)),
    )  # fmt: skip


def block_of(rng, exp, number):
    """Keys without order and values that count: no two tokens of all blocks share a value."""

    def kv(tokens, first):
        shape = (LAYERS, VIDEOS, tokens, HEADS, exp.dit.head_dim)
        v = np.zeros(shape, np.float32) + first + np.arange(tokens)[:, None, None]
        v += np.arange(LAYERS)[:, None, None, None, None] / 4 + np.arange(VIDEOS)[:, None, None, None] / 16
        return KV(k=rng.normal(size=shape).astype(np.float32), v=v)

    return kv(exp.cache.block * FRAME, 1 + 1000 * number), kv(PACKED_TOKENS, 501 + 1000 * number)


# The slow memory


def turn(keys, angles):
    """Keys [..., k, n, 2 pairs] with pair j of token i turned by angles[..., i, j], as complex numbers."""
    numbers = (keys[..., 0::2] + 1j * keys[..., 1::2]) * np.exp(1j * angles)[..., None, :]
    return np.stack([numbers.real, numbers.imag], axis=-1).reshape(keys.shape)


def angles_of(times, rows=0.0, columns=0.0):
    places = np.broadcast_arrays(times, rows, columns)
    return np.concatenate([np.asarray(place, float)[..., None] * THETA[axis] ** (-np.arange(PAIRS[axis]) / PAIRS[axis])
                           for axis, place in enumerate(places)], axis=-1)  # fmt: skip


def offsets(block):
    """Middles of frames {0, 1} and {2, 3} of a packed block, without those the block does not have."""
    halves = [[f for f in half if f < block] for half in ((0, 1), (2, 3))]
    return np.asarray([np.mean(half) if half else block - 1 for half in halves])


def parts(cfg, blocks, gap=0.0):
    """What the next block may see after `blocks` blocks, and where."""
    total = blocks * cfg.block
    sink, recent = range(total)[: cfg.sink], range(max(cfg.sink, total - cfg.recent), max(cfg.sink, total))
    archive = [b for b in range(blocks) if b * cfg.block >= cfg.sink and (b + 1) * cfg.block <= total - cfg.recent]
    archive = archive[-cfg.capacity :] if cfg.top else []
    count = min(len(archive), cfg.capacity if cfg.selection == "all" else cfg.top)
    step = min(cfg.block, max(cfg.trained - cfg.sink - cfg.recent - cfg.block, 1) / max(count, 1))
    step = step if cfg.span == "fit" else cfg.block
    current_at = len(sink) + count * step + gap + len(recent) if cfg.rope_adjustment == "sink" else total
    return types.SimpleNamespace(sink=sink, recent=recent, archive=archive, count=count, step=step,
                                 recent_at=current_at - len(recent), current_at=current_at)  # fmt: skip


def sharp(cfg, story, frames, first):
    """Keys turned to the places first, first+1, ... and values of whole frames, [layer, b, k, n, h]."""
    tokens = [slice(f % cfg.block * FRAME, (f % cfg.block + 1) * FRAME) for f in frames]
    cut = [[getattr(story[f // cfg.block][0], x)[:, :, part] for f, part in zip(frames, tokens)] for x in "kv"]
    empty = [np.zeros((LAYERS, VIDEOS, 0, HEADS, 2 * sum(PAIRS)))]
    k, v = (np.concatenate(empty + pieces, axis=2) for pieces in cut)
    return turn(k, angles_of(np.repeat(first + np.arange(len(frames)), FRAME))), v


def attention_to_archive(cfg, story, seen, q):
    """Scores [layer, b, archived block]: softmax over archive, sink and recent, each block's mass to the fourth."""
    pt, py, px = cfg.score_pool
    pools = [(t, y, x) for t in range(cfg.block // pt) for y in range(ROWS // py) for x in range(COLUMNS // px)]
    grid = q.reshape(LAYERS, VIDEOS, cfg.block, ROWS, COLUMNS, HEADS, -1).astype(float)
    pooled = np.stack([grid[:, :, t * pt : (t + 1) * pt, y * py : (y + 1) * py, x * px : (x + 1) * px].mean((2, 3, 4))
                       for t, y, x in pools], axis=2)  # fmt: skip
    middle = (np.asarray(pools) * cfg.score_pool + (np.asarray(cfg.score_pool) - 1) / 2).T
    asked = turn(pooled, angles_of(seen.current_at + middle[0], middle[1], middle[2]))
    there = len(seen.sink) + seen.count * seen.step / 2 + offsets(cfg.block) * seen.step / cfg.block
    keys = [turn(story[b][1].k, angles_of(there)) for b in seen.archive]
    keys += [sharp(cfg, story, seen.sink, 0)[0], sharp(cfg, story, seen.recent, seen.recent_at)[0]]
    logits = np.einsum("lbqnh,lbknh->lbqnk", asked, np.concatenate(keys, axis=2)) / np.sqrt(asked.shape[-1])
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    mass = [weights[..., i * PACKED_TOKENS : (i + 1) * PACKED_TOKENS].sum(-1) for i in range(len(seen.archive))]
    return np.stack([(m**4).sum((2, 3)) for m in mass], axis=-1)


def chosen(cfg, story, seen, q):
    """Ids [layer, b, count] of the packed blocks to attend, in time order."""
    if cfg.selection == "affinity" and len(seen.archive) > seen.count:
        best = np.argsort(-attention_to_archive(cfg, story, seen, q), axis=-1)[..., : seen.count]
        return np.sort(np.asarray(seen.archive)[best], axis=-1)
    newest = np.asarray(seen.archive[len(seen.archive) - seen.count :], int)
    return np.broadcast_to(newest, (LAYERS, VIDEOS, seen.count))


def expected_view(cfg, story, seen, ids):
    """(keys, values) [layer, b, k, n, h] that the next block must find, in the order sink, packed, recent."""
    packed = np.zeros((2, LAYERS, VIDEOS, seen.count, PACKED_TOKENS, HEADS, 2 * sum(PAIRS)))
    for layer, video, rank in np.ndindex(ids.shape):
        twin = story[ids[layer, video, rank]][1]
        at = len(seen.sink) + rank * seen.step + offsets(cfg.block) * seen.step / cfg.block
        if cfg.rope_adjustment == "none":
            at = ids[layer, video, rank] * cfg.block + offsets(cfg.block)
        packed[:, layer, video, rank] = turn(twin.k[layer, video], angles_of(at)), twin.v[layer, video]
    packed = packed.reshape(2, LAYERS, VIDEOS, seen.count * PACKED_TOKENS, *packed.shape[-2:])
    sink, recent = sharp(cfg, story, seen.sink, 0), sharp(cfg, story, seen.recent, seen.recent_at)
    return [np.concatenate([sink[i], packed[i], recent[i]], axis=2) for i in range(2)]


# The two side by side


def stepper(exp):
    """Jitted `step(memory, full, packed, q, gap) -> (view, ids, plan, length), memory after`."""

    @jax.jit
    def step(memory, full, packed, q, gap):
        seen = cache.plan(exp.cache, memory.num_blocks, gap)
        past = (memory.sink, memory.mid, memory.recent)
        view, ids = jax.vmap(lambda past, q: cache.recall(exp, seen, past, q))(past, q)
        return (view, ids, seen, cache.length(exp, seen)), cache.commit(exp, memory, full, packed)

    return step


def check_view(exp, story, looked, q, gap):
    """Who is seen, with which content, at which place; the valid ones first."""
    (view, ids, plan, length), cfg = looked, exp.cache
    seen = parts(cfg, len(story), gap)
    expected = chosen(cfg, story, seen, q)
    assert (np.asarray(ids)[..., seen.count :] == -1).all()
    np.testing.assert_array_equal(ids[..., : seen.count], expected)
    k, v = expected_view(cfg, story, seen, expected)
    assert length == k.shape[2]
    np.testing.assert_array_equal(view.v[:, :, :length], v)
    np.testing.assert_allclose(view.k[:, :, :length], k, atol=2e-5)
    np.testing.assert_allclose(plan.current_at, seen.current_at, rtol=1e-6)
    room = int(length) + cfg.block * FRAME + (PACKED_TOKENS if cfg.top else 0)
    assert view.k.shape[2] == cache.room(exp) >= room
    assert cache.room(exp) % cfg.key_multiple == 0


def check_commit(cfg, number, before, after):
    """Only the block's own frames and its packed twin were written, into as many places."""
    frames = np.arange(number * cfg.block, (number + 1) * cfg.block)
    late = (frames >= cfg.sink).sum()
    packed = int(cfg.top > 0 and number * cfg.block >= cfg.sink)
    written = {"sink": cfg.block - late, "recent": min(late, cfg.ring), "mid": packed}
    for store, count in written.items():
        for x in "kv":
            old, new = (np.asarray(getattr(getattr(memory, store), x)) for memory in (before, after))
            assert old.shape == new.shape
            assert (old != new).any(axis=(0, 1, 3, 4, 5)).sum() == count, store
    assert after.num_blocks == number + 1


def hide_with_noise(cfg, story, memory, rng):
    """`memory` with noise wherever no value lies that the next block may see."""
    seen = parts(cfg, len(story))
    numbers = {1 + 1000 * (f // cfg.block) + f % cfg.block * FRAME for f in (*seen.sink, *seen.recent)}
    numbers |= {501 + 1000 * b for b in seen.archive}

    def cover(store):
        if store.k.shape[2] == 0:
            return store
        hidden = ~np.isin(np.asarray(store.v[0, 0, :, 0, 0, 0]), list(numbers))[:, None, None, None]
        noise = lambda x: np.where(hidden, 50 * rng.normal(size=x.shape).astype(np.float32), x)  # noqa: E731
        return KV(k=jnp.asarray(noise(store.k)), v=jnp.asarray(noise(store.v)))

    return memory.replace(sink=cover(memory.sink), mid=cover(memory.mid), recent=cover(memory.recent))


def check_noise(cfg, story, step, memory, looked, inputs, rng):
    (view, ids, _, length), _ = step(hide_with_noise(cfg, story, memory, rng), *inputs)
    np.testing.assert_array_equal(ids, looked[1])
    for x in "kv":
        np.testing.assert_array_equal(getattr(view, x)[:, :, :length], getattr(looked[0], x)[:, :, :length])


def check_export(exp, story, memory):
    """Everything still held at full size, in time order, turned to its true frames."""
    cfg, total = exp.cache, len(story) * exp.cache.block
    late = range(max(cfg.sink, total - cfg.ring), total)
    sink, rest = sharp(cfg, story, range(total)[: cfg.sink], 0), sharp(cfg, story, late, late.start)
    held = cache.export(exp, memory)
    np.testing.assert_allclose(held.k, np.concatenate([sink[0], rest[0]], axis=2), atol=2e-5)
    np.testing.assert_array_equal(held.v, np.concatenate([sink[1], rest[1]], axis=2))
    np.testing.assert_array_equal(cache.end_indices(exp, memory), [total * FRAME, held.k.shape[2]])


@settings(max_examples=8, derandomize=True, deadline=None)
@example(CacheConfig(block=2, sink=1, recent=5, top=0, capacity=0, spare=1, rope_adjustment="none"), 7, 0)
@example(CacheConfig(block=3, sink=6, recent=3, top=2, capacity=4, selection="affinity", score_pool=(3, 1, 1)), 13, 1)
@example(CacheConfig(block=4, sink=4, recent=4, top=3, capacity=3, span="fit", trained=17, selection="all",
                     score_pool=(2, 1, 1)), 9, 2)
@given(memories(), st.integers(7, 13), st.integers(0, 99))
def test_every_block_sees_what_the_slow_memory_shows(cfg, blocks, seed):
    exp, rng, story = experiment(cfg), np.random.default_rng(seed), []
    step, memory, gap = stepper(exp), cache.init(exp, VIDEOS), float(rng.choice([0.0, 2.75]))
    for number in range(blocks):
        full, packed = block_of(rng, exp, number)
        q = rng.normal(size=full.k.shape).astype(np.float32) * 2
        inputs = full, packed if cfg.top else None, q, gap
        looked, after = step(memory, *inputs)
        check_view(exp, story, looked, q, gap)
        check_commit(cfg, number, memory, after)
        check_noise(cfg, story, step, memory, looked, inputs, rng)
        story.append((full, packed))
        memory = after
    check_export(exp, story, memory)
    assert step._cache_size() == 1


@given(memories(), st.integers(0, 400))
@settings(max_examples=15, derandomize=True, deadline=None)
def test_a_fitted_span_stays_within_the_trained_range(cfg, blocks):
    fixed = cfg.sink + cfg.recent + cfg.block
    cfg = dataclasses.replace(cfg, span="fit", rope_adjustment="sink", trained=max(cfg.trained, fixed + 1))
    seen = cache.plan(cfg, np.int32(blocks))
    assert seen.current_at + cfg.block <= cfg.trained + 1e-4
    assert seen.recent_at - seen.sink <= seen.chosen * cfg.block  # squeezed, never stretched


def test_true_spans_keep_whole_blocks_and_true_frames_grow():
    cfg = CacheConfig(block=3, sink=3, recent=3, top=2, capacity=5, score_pool=(1, 1, 1))
    assert [float(cache.plan(cfg, np.int32(n)).current_at) for n in (0, 1, 2, 3, 4, 5, 90)] == [0, 3, 6, 9, 12, 12, 12]
    true = dataclasses.replace(cfg, rope_adjustment="none")
    assert [float(cache.plan(true, np.int32(n)).current_at) for n in (0, 5, 90)] == [0, 15, 270]


def filled(exp, blocks, commit):
    """A memory after `blocks` blocks of which each is `block_of` its number, and the memory before the last."""
    rng, memory, before = np.random.default_rng(3), cache.init(exp, VIDEOS), None
    for number in range(blocks):
        before = memory
        memory = commit(memory, *(jax.tree.map(jnp.asarray, kv) for kv in block_of(rng, exp, number)))
    return before, memory


PACKING = CacheConfig(block=2, sink=4, recent=2, top=3, capacity=5, spare=2, score_pool=(2, 1, 1))


def test_thirty_commits_compile_once_and_keep_shape_and_sink():
    exp = experiment(PACKING)
    commit = jax.jit(lambda memory, full, packed: cache.commit(exp, memory, full, packed))
    _, early = filled(exp, 2, commit)
    _, late = filled(exp, 30, commit)
    assert commit._cache_size() == 1
    jax.tree.map(np.testing.assert_array_equal, late.sink, early.sink)
    assert (np.asarray(late.sink.v[0, 0, :, 0, 0, 0]) == [1, 7, 1001, 1007]).all()
    ids = np.asarray(cache.plan(PACKING, late.num_blocks).ids)
    assert sorted(ids) == [-1, 24, 25, 26, 27, 28]  # past capacity the oldest went; 29 is still sharp
    held = np.asarray(late.mid.v[0, 0, :, 0, 0, 0])
    np.testing.assert_array_equal(held[ids >= 0], 501 + 1000 * ids[ids >= 0])


def test_a_donated_memory_is_written_in_place():
    exp = experiment(PACKING)
    plain = jax.jit(lambda memory, full, packed: cache.commit(exp, memory, full, packed))
    given_away = jax.jit(lambda memory, full, packed: cache.commit(exp, memory, full, packed), donate_argnums=0)
    _, expected = filled(exp, 6, plain)
    memory = cache.init(exp, VIDEOS)
    addresses = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((memory.sink, memory.mid, memory.recent))]
    assert len(set(addresses)) == 6
    before, memory = filled(exp, 6, given_away)
    jax.tree.map(np.testing.assert_array_equal, memory, expected)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves((memory.sink, memory.mid, memory.recent)))
    blocks = jax.tree.map(jnp.asarray, block_of(np.random.default_rng(0), exp, 6))
    assert given_away.lower(memory, *blocks).compile().memory_analysis().alias_size_in_bytes >= size


def test_looking_back_keeps_the_memory():
    exp = experiment(PACKING)
    step, (_, memory) = stepper(exp), filled(exp, 9, jax.jit(lambda *args: cache.commit(exp, *args)))
    held = jax.tree.map(np.array, memory)
    full, packed = block_of(np.random.default_rng(1), exp, 9)
    (view, *_), _ = step(memory, full, packed, full.k, 0.0)
    cache.extend(view, KV(*(jnp.ones((LAYERS, 1, *view.k.shape[2:])) for _ in "kv")), jnp.int32(1))
    jax.tree.map(np.testing.assert_array_equal, memory, held)


def test_extending_a_view_writes_only_behind_what_is_valid():
    view = KV(k=jnp.arange(24.0).reshape(1, 6, 2, 2), v=jnp.arange(24.0).reshape(1, 6, 2, 2) + 100)
    own = KV(k=-jnp.ones((1, 2, 2, 2)), v=-2 * jnp.ones((1, 2, 2, 2)))
    longer = cache.extend(view, own, jnp.int32(3))
    for x, value in (("k", -1), ("v", -2)):
        old, new = np.asarray(getattr(view, x)), np.asarray(getattr(longer, x))
        assert (new[:, 3:5] == value).all()
        np.testing.assert_array_equal(np.delete(new, [3, 4], axis=1), np.delete(old, [3, 4], axis=1))


@pytest.mark.parametrize(("block", "frames"), [(4, (0.5, 2.5)), (3, (0.5, 2.0)), (2, (0.5, 1.0)), (1, (0.0, 0.0))])
def test_packed_tokens_sit_in_the_middle_of_their_frames(block, frames):
    cfg = dataclasses.replace(PROFILES["paper"], block=block, sink=2 * block, recent=block, score_pool=(1, 4, 4))
    times, places = cache.packed_places(Experiment(name="full", cache=cfg))
    np.testing.assert_array_equal(times, np.repeat(frames, 7 * 13))
    rows, columns = np.mgrid[:7, :13] * 4 + 1.5  # 8 latent cells are 4 tokens, counted from the middle of the first
    np.testing.assert_array_equal(places, np.tile(np.stack([rows, columns], axis=-1).reshape(-1, 2), (2, 1)))


@pytest.mark.parametrize(("profile", "held", "attended"), [("paper", 21_632, 27_872), ("published", 21_632, 26_312)])
def test_the_sizes_of_the_paper(profile, held, attended):
    exp = Experiment(name="full", cache=PROFILES[profile])
    seen = cache.plan(exp.cache, np.int32(500))
    assert int(cache.length(exp, seen)) == held
    assert int(cache.length(exp, seen)) + exp.cache.block * exp.tokens_per_frame == attended
    assert exp.tokens_per_packed_block == 182
    assert cache.room(Experiment(name="full", cache=PROFILES["paper"])) == 28_160
