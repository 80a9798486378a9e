"""Budgets are counted from the real step: they meet hand-made figures, the paper's, and every closed formula."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
import tiny

from packforcing_jax import config
from packforcing_jax.config import loading
from packforcing_jax.errors import InputError
from packforcing_jax.memory import cache, view
from packforcing_jax.memory import layout as layouts
from packforcing_jax.networks import compressor, dit
from packforcing_jax.plan import budget, formulas, jaxpr_cost, memory_fit, programs
from packforcing_jax.policies import eviction, selection
from packforcing_jax.sampling import block_step, pipeline
from packforcing_jax.sampling.schedules import NoiseLevel

FILM = dataclasses.replace(
    tiny.EXP,
    name="film",
    dit=config.DiTConfig(
        dim=30,
        ffn_dim=22,
        heads=5,
        layers=3,
        text_dim=9,
        text_len=11,
        freq_dim=8,
        in_channels=4,
        out_channels=4,
    ),
    codec=config.VAEConfig(
        dim=4,
        z_dim=4,
        dim_mult=(1, 2, 3),
        num_res_blocks=1,
        temporal_downsample=(True, False),
        mean=(0.0,) * 4,
        std=(1.0,) * 4,
    ),
    cache=config.CacheConfig(
        block=4, sink=4, recent=8, top=3, capacity=5, score_pool=(2, 3, 2), key_multiple=7
    ),
    compressor=config.CompressorConfig(
        channels=(3, 5), strides=((2, 1, 1), (1, 2, 2)), pool=(2, 1, 1)
    ),
    latent=(6, 10),  # 3 x 5 tokens a frame, packed to 2 x 3 x 5
)
SHARP = tiny.with_cache(top=0, capacity=0, sink=2, recent=4)  # frames that are not whole blocks
PARTS = ("sink", "packed", "recent", "cached", "current", "attended", "packed twin", "room")


of = functools.cache(budget.of)


def counted(found, part, *names):
    return tuple(found.rows[f"{part}/{name}"].counted for name in names)


def compressed(**changes):
    return dataclasses.replace(
        tiny.EXP, compressor=dataclasses.replace(tiny.EXP.compressor, **changes)
    )


@pytest.mark.parametrize(
    ("exp", "keys"),
    [
        (tiny.EXP, (24, 16, 24, 64, 24, 88, 8, 100)),
        (FILM, (60, 90, 120, 270, 60, 330, 30, 364)),
        (SHARP, (16, 0, 32, 48, 24, 72, 0, 75)),
    ],
)
def test_keys_bytes_and_last_block_of_awkward_sizes(exp, keys):
    found = of(exp, 9, batch=2, dtype="float32")
    each = 2 * 2 * exp.dit.layers * exp.dit.dim * 4  # keys and values, two videos, float32
    assert found.wrong == []
    assert counted(found, "keys", *PARTS) == keys
    assert counted(found, "bytes", "cached", "attended") == (keys[3] * each, keys[5] * each)
    assert counted(found, "held", "views") == (keys[-1] * each,)
    assert counted(found, "last block", "keys it attends") == (
        keys[5],
    )  # nine blocks fill every partition


@pytest.mark.parametrize(
    "exp",
    [
        tiny.with_cache(sink=0, recent=6),
        tiny.with_cache(recent=0, rope_adjustment="incremental"),
        tiny.with_cache(selection="all", span="fit"),
        tiny.with_cache(selection="paper_sum", timing="late"),
        tiny.with_cache(selection="paper", recent=6),
        tiny.with_cache(selection="paper", scope="shared", score_heads=0.7, recent_queries=False),
        tiny.with_cache(selection="log_sum_exp", scope="shared"),  # one more pass, to ask in
        tiny.with_cache(selection="random", scope="shared"),
        compressed(keys="projected", branches="hr"),
        compressed(branches="lr", positions="native"),
    ],
    ids=lambda exp: f"{exp.cache.selection}-{exp.cache.scope}-{exp.compressor.keys}",
)
def test_every_way_to_remember_costs_what_its_formula_says(exp):
    found = budget.of(exp, 6, dtype="float32")
    assert [(row.name, row.counted, row.formula) for row in found.wrong] == []
    assert found.rows["operations/selection"].counted >= 0


class OwnModel(config.DiTConfig):
    """A base model of which nothing is known but what the memory needs."""

    def build(self, rngs):
        return dit.WanDiT(self, rngs)


class OwnCompressor(config.CompressorConfig):
    def build(self, step, rngs):
        return compressor.Compressor(step, rngs)


def keep_first(item, size):
    return jnp.where(item < size, item, -1)


OWN_SCORE = selection.Score(
    "own", selection.paper_sum, jnp.sum, lambda queries, packed, full_res, blocks: blocks
)
FIRST = eviction.Eviction(
    "first",
    keep_first,
    lambda written, size: jnp.where(jnp.arange(size) < written, jnp.arange(size), -1),
)
OWN_PARTS = [
    tiny.with_cache(selection=OWN_SCORE, eviction=FIRST, timing="late"),
    dataclasses.replace(tiny.EXP, compressor=OwnCompressor(**vars(tiny.EXP.compressor))),
    dataclasses.replace(tiny.EXP, dit=OwnModel(**vars(tiny.EXP.dit))),
    dataclasses.replace(tiny.with_cache(scope="shared"), dit=OwnModel(**vars(tiny.EXP.dit))),
]
INSIDES = [
    {"last block/packed blocks it attends"},
    {"parameters/compressor", "operations/packing pass", "share/selection"},
    {
        "parameters/transformer",
        "weights/transformer",
        "held/text_kv",
        "operations/one step",
    },
    {"operations/selection", "operations/whole block"},
]


@pytest.mark.parametrize(("exp", "inside"), list(zip(OWN_PARTS, INSIDES, strict=True)))
def test_what_is_ones_own_is_counted_and_only_its_insides_have_no_formula(exp, inside):
    """The same networks behind other names cost the same; what bounds them is an estimate."""
    found = budget.of(exp, 6, dtype="float32")
    ours = of(tiny.EXP, 6, dtype="float32")
    assert found.wrong == []
    assert found.rows.keys() == ours.rows.keys()
    for name in inside:
        assert (ours.rows[name].formula is None, found.rows[name].formula) == (False, None), name
    kept = {"keys/attended", "keys/room", "held/keys and values", "bytes/cached"}
    assert all(found.rows[name].formula == ours.rows[name].formula for name in kept)
    if exp.cache == tiny.EXP.cache:
        assert {name: row.counted for name, row in found.rows.items()} == {
            name: row.counted for name, row in ours.rows.items()
        }
    if not formulas.all_known(exp):
        assert memory_fit.bounded(exp) == memory_fit.estimated(exp)


MIXED = config.DtypeConfig(
    params="float16", compute="bfloat16", cache="float32", vae="bfloat16", text="float16"
)


def test_every_use_has_its_own_dtype():
    """Hand-made: which of the five decides about each store."""
    exp = dataclasses.replace(FILM, dtypes=MIXED)
    found = budget.of(exp, 6, batch=3)
    assert found.wrong == []
    assert counted(found, "bytes", "cached") == (
        270 * 3 * 2 * 3 * 30 * 4,
    )  # keys, videos, k and v, layers, d, bytes
    assert counted(found, "held", "text_kv") == (11 * 3 * 2 * 3 * 30 * 2,)
    assert counted(found, "weights", "transformer") == (
        2 * found.rows["parameters/transformer"].counted,
    )
    assert counted(found, "weights", "codec") == (2 * found.rows["parameters/codec"].counted,)
    assert counted(found, "weights", "text states of one prompt") == (16 * 10 * 2,)


@pytest.fixture(scope="module")
def paper():
    """The paper's memory at full size, two minutes: 120 blocks."""
    exp = loading.load_experiment("wan_t2v_1_3b_paper")
    return budget.of(exp, pipeline.blocks_of(exp, 120))


def test_the_paper_profile_has_the_papers_budget(paper):
    assert paper.wrong == []
    assert paper.blocks == 120
    assert counted(paper, "keys", *PARTS) == (
        12_480,
        2_912,
        6_240,
        21_632,
        6_240,
        27_872,
        182,
        28_160,
    )
    gigabytes = [
        figure / 1e9
        for figure in counted(paper, "bytes", "cached", "attended", "every block at full size")
    ]
    assert gigabytes == pytest.approx([3.987, 5.137, 138.02], abs=0.005)


def test_the_papers_archive_is_33_5_megabytes_a_block(paper):
    one, archive = counted(paper, "bytes", "one packed block", "archive of the last block")
    assert one == pytest.approx(33.5e6, rel=0.002)
    assert archive == 116 * one  # all but the sink, the block in `recent` and the block itself
    assert counted(
        paper, "last block", "packed blocks it chooses from", "packed blocks it attends"
    ) == (116, 16)


def test_operations_of_the_paper_profile(paper):
    step, decoding = counted(paper, "operations", "one step, keys attended", "decoding")
    assert step / 1e12 == pytest.approx(48.25, abs=0.005)
    assert decoding / 1e12 == pytest.approx(54.2, abs=0.05)
    assert counted(paper, "parameters", "transformer") == (1_418_996_800,)


def test_the_default_selection_costs_at_most_three_thousandths_of_a_block(paper):
    assert paper.experiment.cache.selection == "affinity"
    assert 0 < paper.rows["share/selection"].counted <= 0.003


def test_the_published_profile_attends_26312_keys():
    exp = loading.load_experiment("wan_t2v_1_3b")
    one_layer = dataclasses.replace(exp, dit=dataclasses.replace(exp.dit, layers=1))
    found = budget.of(one_layer, 160)
    assert found.wrong == []
    assert counted(found, "keys", "cached", "attended") == (21_632, 26_312)


def test_the_parts_of_the_paper_profile_in_memory(paper):
    """Row by row what a person with a card wants to know, in gigabytes."""
    gigabytes = {
        "weights": 3.134,
        "views": 5.190,
        "archive": 4.327,
        "un-rotated keys": 0.575,
        "keys and values": 10.093,
        "recent latents": 0.006,
        "text_kv": 0.094,
        "decoder": 1.889,
        "on the device": 15.216,
        "on the host": 0,
    }
    found = [figure / 1e9 for figure in counted(paper, "held", *gigabytes)]
    assert found == pytest.approx(list(gigabytes.values()), abs=5e-4)
    on_disk, read = counted(
        paper, "weights", "text encoder, on disk alone", "of it while prompts are read"
    )
    assert (on_disk / 1e9, read / 1e9) == pytest.approx((11.362, 0.772), abs=5e-4)
    phases = ("loading", "reading prompts", "denoising", "showing", "committing")
    peak = counted(paper, "peak", "on the device")[0]
    least = counted(paper, "held", "on the device")[0]
    assert (
        max(counted(paper, "peak", *phases)) == peak == counted(paper, "peak", "showing")[0] > least
    )


def test_the_compiler_counts_the_operations_of_the_full_size_step_too(paper):
    """XLA's own count of one unrolled pass over the whole room of the views, elementwise work included."""
    cfg = programs.plain(paper.experiment.step)
    held = programs.shapes_of(paper.experiment)

    def step(nets, latent, words, memory):
        none = NoiseLevel(timestep=jnp.zeros(()), sigma=jnp.zeros(()))
        layout = layouts.layout(cfg.cache, memory.progress)
        views = block_step.views_of(memory)
        denoiser = block_step.Denoiser(nets, cfg, words)
        return block_step.predict_x0(denoiser, layout, latent, none, views)

    lowered = jax.jit(step).lower(held.computed, held.latent, held.text_kv, held.memory)
    theirs = (lowered.cost_analysis() or {})["flops"]
    ours = paper.rows["operations/one step"].counted
    assert ours / 1e12 == pytest.approx(48.585, abs=5e-4)
    assert 1 < theirs / ours < 1.02


def test_attention_written_out_needs_far_more_workspace(paper):
    fused, written = counted(
        paper, "workspace", "denoising, fused attention", "denoising, attention written out"
    )
    logits = 12 * 6240 * 28160 * 4
    assert fused < logits < written - fused


def test_packed_blocks_on_the_host_are_not_on_the_device():
    exps = [
        tiny.with_cache(scope="shared", timing="late", archive=place)
        for place in ("device", "host")
    ]
    device, host = (budget.resident(exp, programs.shapes_of(exp)) for exp in exps)
    assert host["held/on the host"] == host["held/archive"] == device["held/archive"] > 0
    assert host["held/on the device"] + host["held/on the host"] == device["held/on the device"]
    assert device["held/on the host"] == 0


def test_budgets_are_counted_not_recited(monkeypatch):
    """What the step really does decides: queries that are not pooled, and a view with more room, are found out."""
    exp = tiny.with_cache(max_position=15)  # its programs were not traced before
    monkeypatch.setattr(selection, "pool", lambda q, grid, window: q)
    monkeypatch.setattr(
        view, "_pool_angles", lambda spec, layout: jnp.zeros((exp.cache.block * 8, 6))
    )
    monkeypatch.setattr(config.MemorySpec, "room", 125)
    wrong = {row.name for row in budget.of(exp, 6).wrong}
    assert {
        "operations/selection",
        "keys/room",
        "held/views",
        "operations/of it self-attention",
    } <= wrong
    assert not {"keys/attended", "bytes/cached", "operations/one step, keys attended"} & wrong


@pytest.mark.parametrize("exp", [tiny.EXP, FILM, tiny.with_cache(sink=0, top=1, capacity=2)])
def test_what_each_block_sees_by_formula_is_what_the_plan_says(exp):
    for blocks in range(1, 15):
        seen = layouts.layout(exp.cache, layouts.begin(blocks - 1))
        want = ((seen.ids >= 0).sum(), seen.num_selected, layouts.length(exp.memory, seen))
        assert tuple(formulas.last_block(exp, blocks).values()) == tuple(map(int, want)), blocks


def test_what_is_held_is_what_a_sampler_allocates():
    found = of(tiny.EXP, 9, batch=2, dtype="float32")
    memory = cache.init(tiny.EXP.memory, 2)
    real = {
        "views": [layer.view for layer in memory.layers],
        "archive": [layer.packed for layer in memory.layers],
        "un-rotated keys": [(layer.sink, layer.recent) for layer in memory.layers],
        "keys and values": [leaf for leaf in jax.tree.leaves(memory.layers) if leaf.ndim >= 4],
        "recent latents": memory.latents,
        "weights": tiny.nets(),
    }
    assert counted(found, "held", *real) == tuple(map(jaxpr_cost.nbytes, real.values()))


def test_compiling_adds_what_the_compiler_reserves():
    """Peaks are made of it then."""
    exp = dataclasses.replace(
        tiny.with_cache(top=0),
        dit=dataclasses.replace(tiny.EXP.dit, layers=1),
        sample=config.SampleConfig(steps=(1000,)),
    )
    found = budget.of(exp, 3, batch=2, compiled=True)
    names = [
        f"compiled/denoising, {what}"
        for what in ("temporary", "results", "arguments", "laid into arguments")
    ]
    temporary, results, arguments, reused = (found.rows[name].counted for name in names)
    assert min(temporary, results, arguments, reused) > 0
    assert reused == jaxpr_cost.nbytes(programs.shapes_of(exp, 2).memory)
    held = counted(found, "held", "on the device")[0]
    frames = 2 * 3 * 16 * 8 * 3 * 4
    assert counted(found, "peak", "denoising")[0] == pytest.approx(
        held + frames + temporary + results - reused, abs=32
    )


def test_nothing_is_allocated():
    before = sum(array.nbytes for array in jax.live_arrays())
    found = budget.of(SHARP, 12, dtype="float32")
    held = counted(found, "held", "on the device")[0]
    assert sum(array.nbytes for array in jax.live_arrays()) - before < 0.01 * held


@pytest.mark.parametrize(
    ("seconds", "blocks"), [(120, 120), (1 / 16, 1), (13 / 16, 1), (17 / 16, 2), (60.3, 61)]
)
def test_blocks_of_a_length(seconds, blocks):
    """The first of four latent frames is one frame, each of the others four."""
    assert pipeline.blocks_of(loading.load_experiment("wan_t2v_1_3b_paper"), seconds) == blocks


@pytest.mark.parametrize(
    ("act", "named"),
    [
        (lambda: budget.of(tiny.EXP, 0), "blocks=0"),
        (lambda: budget.of(tiny.EXP, 3, batch=0), "batch=0"),
        (lambda: pipeline.blocks_of(tiny.EXP, float("nan")), "seconds=nan"),
        (lambda: pipeline.blocks_of(tiny.EXP, -2), "seconds=-2"),
    ],
)
def test_impossible_lengths_are_refused_by_name(act, named):
    with pytest.raises(InputError, match=named):
        act()
