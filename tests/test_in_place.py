"""What is donated is written in place: no commit and no view copies a store, however long the archive.

XLA:CPU updates slices of bfloat16 by way of float32, which takes copies of its own: here everything is float32.
`benchmarks/compile_for_h200.py` looks at whole steps in bfloat16 for a GPU.
"""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import pytest
import tiny

from packforcing_jax import pytrees
from packforcing_jax.config import loading
from packforcing_jax.memory import cache, view
from packforcing_jax.memory import layout as layouts
from packforcing_jax.plan import hlo, programs
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
    return jax.jit(function, donate_argnums=donated, keep_unused=True).lower(*args).compile(QUICK)


def full_size(config, mode, layers=1):
    exp = loading.load_experiment(config, [f"dit.layers={layers}"])
    return tiny.with_cache(exp, rope_adjustment=mode)


def committed(exp, batch=1):
    """(commit as a function, the shapes it takes, memory first)."""
    spec = exp.memory
    latent = (batch, exp.cache.block, *exp.memory.latent)
    memory = jax.eval_shape(lambda: cache.init(spec, batch))
    tokens = lambda size: jax.ShapeDtypeStruct(
        (batch, size, spec.heads, spec.head_dim), jnp.float32
    )  # noqa: E731
    per_layer = lambda size: [KV(k=tokens(size), v=tokens(size)) for _ in memory.layers]  # noqa: E731
    newest = jax.eval_shape(
        lambda progress: view.newest(spec, layouts.layout(exp.cache, progress), batch),
        memory.progress,
    )
    return functools.partial(cache.commit, spec), (
        memory,
        jax.ShapeDtypeStruct(latent, jnp.float32),
        per_layer(exp.cache.block * exp.tokens_per_frame),
        per_layer(spec.tokens_per_packed_block),
        [newest for _ in memory.layers],
    )


def laid(exp):
    """(laying packed blocks into a layer's view as a function, the shapes it takes, the view first)."""
    _, (memory, *_, selection) = committed(exp)

    def lay(seen, layer, progress, chosen):
        layout = layouts.layout(exp.cache, progress)
        layer = dataclasses.replace(layer, view=seen)
        return view.lay(exp.memory, layout, layer, view.gather(layer, chosen), chosen)

    layer = memory.layers[0]
    return lay, (layer.view, layer, memory.progress, selection[0])


# At full size: compiled from shapes, nothing is allocated

SIZES = [("wan_t2v_1_3b_paper", mode) for mode in MODES] + [("wan_t2v_1_3b", "sink")]


@pytest.mark.parametrize("what", [committed, laid])
@pytest.mark.parametrize(("config", "mode"), SIZES)
def test_a_full_size_store_is_updated_where_it_lies(config, mode, what):
    exp = full_size(config, mode)
    function, (donated, *others) = what(exp)
    compiled = build(function, 0, donated, *others)
    held = stores(committed(exp)[1][0].layers)
    stats = compiled.memory_analysis()
    assert stats.alias_size_in_bytes == total(donated)
    assert stats.temp_size_in_bytes < min(map(total, held))  # no store fits into it
    assert hlo.moved(hlo.read(compiled.as_text()), shapes(held)) == []


def test_incremental_remakes_the_keys_it_turns_and_nothing_else():
    """Turning mixes pairs of channels, so that keys cannot be turned within the buffer that they are read from."""
    exp = full_size("wan_t2v_1_3b_paper", "incremental")
    function, (memory, *others) = committed(exp)
    compiled = build(function, 0, memory, *others)
    packed = memory.layers[0].packed.k
    stats = compiled.memory_analysis()
    sink = total(memory.layers[0].view.k) * exp.cache.sink * exp.tokens_per_frame / exp.memory.room
    assert stats.alias_size_in_bytes == total(memory)
    assert stats.temp_size_in_bytes < total(packed) + 2 * sink
    copied = hlo.moved(hlo.read(compiled.as_text()), shapes(stores(memory)))
    assert len(copied) <= 1
    assert {op.shape for op in copied} <= shapes([packed])
    lay, (seen, *read) = laid(exp)
    assert build(lay, 0, seen, *read).memory_analysis().temp_size_in_bytes < sink


def as_scanned(exp):
    """A commit in which the memory goes through a loop over layers and comes out new."""

    def commit(memory, latent, *new):
        def one(_, inputs):
            layer, full, packed, chosen = inputs
            held = cache.Memory(layers=[layer], latents=memory.latents, progress=memory.progress)
            new = cache.commit(exp.memory, held, latent, [full], [packed], [chosen])
            return None, new.layers[0]

        inputs = [pytrees.stack(each) for each in (memory.layers, *new)]
        layers = pytrees.unstack(jax.lax.scan(one, None, tuple(inputs))[1], exp.dit.layers)
        return cache.advanced(exp.memory, dataclasses.replace(memory, layers=layers), latent)

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
    smallest = min(map(total, stores(args[0])))
    looked_for = shapes(stores(args[0]))
    for spoilt in (build(function, (), *args), build(as_scanned(exp), 0, *args)):
        stats = spoilt.memory_analysis()
        program = hlo.read(spoilt.as_text())
        assert stats.temp_size_in_bytes > smallest or stats.alias_size_in_bytes < total(args[0])
        assert hlo.moved(program, looked_for)


# Whole steps, tiny


def lowered(exp):
    """(denoising, committing), before XLA, and the memory that both are given to keep."""
    found = dict(programs.lowered_programs(exp, tiny.BATCH))
    memory = programs.shapes_of(exp, tiny.BATCH).memory
    return (found[programs.DENOISING], found[programs.COMMITTING]), memory


@pytest.mark.parametrize("mode", [*MODES, "incremental"])
def test_steps_give_every_donated_buffer_a_result(mode):
    steps, memory = lowered(tiny.with_cache(TINY, rope_adjustment=mode))
    for step in steps:
        assert step.as_text().count("tf.aliasing_output") == len(jax.tree.leaves(memory))


@pytest.mark.parametrize("mode", MODES)
def test_compiled_steps_keep_their_buffers(mode):
    """XLA:CPU drops the barriers that keep the uses of a view in order; there committing copies views, and no more."""
    (denoise, commit), memory = lowered(tiny.with_cache(TINY, rope_adjustment=mode))
    every = stores(memory.layers)
    views = stores([layer.view for layer in memory.layers])
    others = shapes(every) - shapes(views)
    for step, held in ((denoise, shapes(every)), (commit, others)):
        compiled = step.compile(QUICK)
        assert compiled.memory_analysis().alias_size_in_bytes == total(memory)
        assert hlo.moved(hlo.read(compiled.as_text()), held) == []


# Running


def test_no_two_stores_share_a_buffer():
    memory = cache.init(tiny.EXP.memory, tiny.BATCH)
    buffers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(memory) if x.size]
    assert len(set(buffers)) == len(buffers)


def zeros(shapes):
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def test_stores_stay_where_they_are():
    function, (_, *new) = committed(tiny.EXP, tiny.BATCH)
    commit = jax.jit(function, donate_argnums=0)
    memory = cache.init(tiny.EXP.memory, tiny.BATCH)
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
            cache.init(exp.memory, tiny.BATCH),
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
