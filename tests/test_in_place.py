"""What is donated is written in place: no commit and no view copies a store, however long the archive.

XLA:CPU updates slices of bfloat16 by way of float32, which takes copies of its own: here everything is float32.
`benchmarks/compile_for_h200.py` looks at whole steps in bfloat16 for a GPU.
"""

import functools
import time

import jax
import jax.numpy as jnp
import pytest
import tiny

from packforcing_jax import pytrees
from packforcing_jax.config import overrides
from packforcing_jax.memory import cache, view
from packforcing_jax.networks import dit
from packforcing_jax.plan import hlo
from packforcing_jax.sampling import pipeline
from packforcing_jax.types import KV

MODES = ("sink", "sink_only", "none")  # `incremental` turns stored keys: see its own test
TINY = tiny.with_cache(key_multiple=41)  # no view has the shape of anything else
QUICK = {"xla_backend_optimization_level": 0}  # for what never runs


def total(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def shapes(arrays):
    return {("f32", x.shape) for x in arrays}


def stores(tree):
    """Everything that holds keys or values."""
    return [x for x in jax.tree.leaves(tree) if x.ndim >= 4 and x.size]


def build(function, donated, *args):
    """`function` of shapes, compiled with argument number `donated` given away."""
    return jax.jit(function, donate_argnums=donated).lower(*args).compile(QUICK)


def full_size(config, mode, layers=1):
    exp = overrides.load_experiment(config, [f"dit.layers={layers}"])
    return tiny.with_cache(exp, rope_adjustment=mode)


def committed(exp, batch=1):
    """(commit as a function, the shapes it takes, memory first)."""
    memory = jax.eval_shape(lambda: cache.init(exp, batch))
    tokens = lambda size: jax.ShapeDtypeStruct(
        (batch, size, exp.dit.heads, exp.dit.head_dim), jnp.float32
    )  # noqa: E731
    per_layer = lambda size: [KV(k=tokens(size), v=tokens(size)) for _ in memory.layers]  # noqa: E731
    looked = jax.eval_shape(
        lambda n: view.newest(exp, cache.plan(exp.cache, n), batch), memory.num_blocks
    )
    return functools.partial(cache.commit, exp), (
        memory,
        per_layer(exp.cache.block * exp.tokens_per_frame),
        per_layer(exp.tokens_per_packed_block),
        [looked for _ in memory.layers],
    )


def laid(exp):
    """(laying out a view as a function, the shapes it takes, scratch first)."""
    _, (memory, _, _, looked) = committed(exp)
    scratch = jax.eval_shape(lambda: view.scratch(exp, 1))

    def lay(scratch, memory, looked):
        seen = cache.plan(exp.cache, memory.num_blocks)
        return view.lay(
            exp,
            seen,
            memory.layers[0],
            view.take(memory.layers[0], looked[0]),
            looked[0],
            scratch[0],
        )

    return lay, (scratch, memory, looked)


# At full size: compiled from shapes, nothing is allocated

SIZES = [("wan_t2v_1_3b_paper", mode) for mode in MODES] + [("wan_t2v_1_3b", "sink")]


@pytest.mark.parametrize("what", [committed, laid])
@pytest.mark.parametrize(("config", "mode"), SIZES)
def test_a_full_size_store_is_updated_where_it_lies(config, mode, what):
    exp = full_size(config, mode)
    function, (donated, *others) = what(exp)
    compiled = build(function, 0, donated, *others)
    held = stores((committed(exp)[1][0], laid(exp)[1][0]))
    stats = compiled.memory_analysis()
    assert stats.alias_size_in_bytes == total(donated)
    assert stats.temp_size_in_bytes < min(
        map(total, held)
    )  # nothing the size of a store fits into it
    assert hlo.moved(hlo.read(compiled.as_text()), shapes(held)) == []


def test_incremental_remakes_the_keys_it_turns_and_nothing_else():
    """Turning mixes pairs of channels, so that keys cannot be turned within the buffer that they are read from."""
    exp = full_size("wan_t2v_1_3b_paper", "incremental")
    function, (memory, *others) = committed(exp)
    compiled = build(function, 0, memory, *others)
    layer, stats = memory.layers[0], compiled.memory_analysis()
    turned = [layer.sink.k, layer.mid.k]
    assert stats.alias_size_in_bytes == total(memory)
    assert stats.temp_size_in_bytes < total(turned) + total(layer.recent.k)
    copied = hlo.moved(hlo.read(compiled.as_text()), shapes(stores(memory)))
    assert len(copied) <= len(turned)
    assert {op.shape for op in copied} <= shapes(turned)
    lay, (scratch, *read) = laid(exp)
    assert build(lay, 0, scratch, *read).memory_analysis().temp_size_in_bytes < total(
        layer.recent.k
    )


def as_scanned(exp):
    """A commit in which the memory goes through a loop over layers and comes out new."""

    def commit(memory, *new):
        def one(_, inputs):
            layer, full, packed, looked = inputs
            held = cache.Memory(layers=[layer], num_blocks=memory.num_blocks)
            return None, cache.commit(exp, held, [full], [packed], [looked]).layers[0]

        inputs = [pytrees.stack(each) for each in (memory.layers, *new)]
        layers = jax.lax.scan(one, None, tuple(inputs))[1]
        return cache.Memory(
            layers=pytrees.unstack(layers, exp.dit.layers), num_blocks=memory.num_blocks + 1
        )

    return commit


@pytest.mark.parametrize("donated", [0, ()], ids=["donated", "kept"])
def test_the_buffer_assignment_tells_who_lies_elsewhere(donated, tmp_path):
    function, args = committed(full_size("wan_t2v_1_3b_paper", "sink"))
    options = QUICK | {"xla_dump_to": str(tmp_path), "xla_dump_hlo_as_text": True}
    jax.jit(function, donate_argnums=donated).lower(*args).compile(options)
    (told,) = tmp_path.glob("*buffer-assignment.txt")
    assert bool(hlo.astray(told.read_text(), shapes(stores(args[0])))) == (donated == ())


def test_a_copy_would_be_found():
    exp = full_size("wan_t2v_1_3b_paper", "sink", layers=2)
    function, args = committed(exp)
    smallest, looked_for = min(map(total, stores(args[0]))), shapes(stores(args[0]))
    for spoilt in (build(function, (), *args), build(as_scanned(exp), 0, *args)):
        stats, program = spoilt.memory_analysis(), hlo.read(spoilt.as_text())
        assert stats.temp_size_in_bytes > smallest or stats.alias_size_in_bytes < total(args[0])
        assert hlo.moved(program, looked_for)


# Whole steps, tiny


def step_shapes(exp):
    """Shapes of (memory, views, seed, videos, words) for `draw_block`, and of low-resolution latents."""
    memory = jax.eval_shape(lambda: cache.init(exp, tiny.BATCH))
    views = jax.eval_shape(lambda: view.scratch(exp, tiny.BATCH))
    context = jax.ShapeDtypeStruct((tiny.BATCH, exp.dit.text_len, exp.dit.text_dim), jnp.float32)
    words = jax.eval_shape(dit.text_kv, tiny.apart().dit, context)
    seed, videos = (
        jax.ShapeDtypeStruct((), jnp.uint32),
        jax.ShapeDtypeStruct((tiny.BATCH,), jnp.uint32),
    )
    return (memory, views, seed, videos, words), jax.eval_shape(lambda: tiny.lows(1, exp)[0])


def lowered(exp):
    """((drawing, what it is given to keep), (remembering, what it is given to keep)), before XLA."""
    (memory, views, *rest), low = step_shapes(exp)
    nets, words = tiny.apart(), rest[-1]
    drawing = pipeline.draw_block.lower(nets, exp, memory, views, *rest)
    drawn = jax.eval_shape(
        lambda *args: pipeline.draw_block(nets, exp, *args), memory, views, *rest
    )
    remembering = pipeline.remember_block.lower(
        nets, exp, memory, views, drawn.latent, low, drawn.looked, words
    )
    return (drawing, views), (remembering, (memory, views))


@pytest.mark.parametrize("mode", [*MODES, "incremental"])
def test_steps_give_every_donated_buffer_a_result(mode):
    for step, donated in lowered(tiny.with_cache(TINY, rope_adjustment=mode)):
        assert step.as_text().count("tf.aliasing_output") == len(jax.tree.leaves(donated))


def test_compiled_steps_keep_their_buffers():
    """XLA:CPU drops the barrier that keeps the uses of a view in order; there remembering copies views, not stores."""
    drawing, remembering = lowered(TINY)
    memory, views = remembering[1]
    for (step, donated), held in (
        (drawing, stores((memory, views))),
        (remembering, stores(memory)),
    ):
        compiled = step.compile(QUICK)
        assert compiled.memory_analysis().alias_size_in_bytes == total(donated)
        assert hlo.moved(hlo.read(compiled.as_text()), shapes(held)) == []


# Running


def test_no_two_stores_share_a_buffer():
    memory, views = cache.init(tiny.EXP, tiny.BATCH), view.scratch(tiny.EXP, tiny.BATCH)
    buffers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((memory, views)) if x.size]
    assert len(set(buffers)) == len(buffers)


def zeros(shapes):
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def test_stores_stay_where_they_are():
    function, (_, *new) = committed(tiny.EXP, tiny.BATCH)
    commit, memory = jax.jit(function, donate_argnums=0), cache.init(tiny.EXP, tiny.BATCH)
    before = [x.unsafe_buffer_pointer() for x in stores(memory)]
    for _ in range(5):
        memory = commit(memory, *zeros(new))
    assert [x.unsafe_buffer_pointer() for x in stores(memory)] == before


def slowdown(make, mode="sink", donated=0, repeats=40):
    """How much longer a commit takes with an archive 64 times as long; the shortest of many, taken in turn."""
    runs = {}
    for capacity in (128, 128 * 64):
        exp = tiny.with_cache(capacity=capacity, rope_adjustment=mode)
        new = zeros(committed(exp, tiny.BATCH)[1][1:])
        runs[capacity] = (
            jax.jit(make(exp), donate_argnums=donated),
            cache.init(exp, tiny.BATCH),
            new,
        )
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(repeats):
        for capacity, (commit, memory, new) in runs.items():
            start = time.perf_counter()
            memory = jax.block_until_ready(commit(memory, *new))
            best[capacity] = min(best[capacity], time.perf_counter() - start)
            runs[capacity] = commit, memory, new
    short, far = best.values()
    return far / short


def as_it_is(exp):
    return committed(exp)[0]


@pytest.mark.parametrize("mode", MODES)
def test_a_commit_takes_no_longer_with_an_archive_64_times_as_long(mode):
    assert slowdown(as_it_is, mode) < 1.5


@pytest.mark.parametrize(
    ("make", "donated"), [(as_it_is, ()), (as_scanned, 0)], ids=["not donated", "scanned"]
)
def test_the_clock_would_notice_a_copy(make, donated):
    assert slowdown(make, donated=donated, repeats=8) > 1.5
