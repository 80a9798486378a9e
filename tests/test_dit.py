"""The transformer: who may see whom, what enters and leaves in which order, and that a cached rollout is one pass."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from packforcing_jax import pytrees
from packforcing_jax.config import DiTConfig
from packforcing_jax.memory import cache
from packforcing_jax.memory import layout as layouts
from packforcing_jax.networks import dit
from packforcing_jax.policies import attention
from packforcing_jax.sampling import block_step
from packforcing_jax.sampling.schedules import NoiseLevel
from packforcing_jax.types import KV

MODEL = tiny.nets().dit
APART = tiny.apart()  # its layers one by one
CFG = tiny.EXP.dit
ENDS = (1, 3, 4, 7)
OWNER = np.array([0, 1, 1, 2, 3, 3, 3])
CLIP = tiny.normal(0, 2, 7, 4, 6, 12)
CLEAN = tiny.normal(1, 2, 7, 4, 6, 12)
TIMES = jnp.asarray([[999.0, 500, 500, 0, 12.5, 700, 3], [0, 1000, 900, 800, 437.5, 1, 250]])
CONTEXT = tiny.normal(2, 2, 15, 10)

parallel = tiny.jit(dit.parallel, static_argnames="block_ends")
bidirectional = tiny.jit(dit.bidirectional)
embed_latent = tiny.jit(dit.WanDiT.embed)
embed_time = tiny.jit(dit.WanDiT.embed_time)
head = tiny.jit(dit.WanDiT.output, static_argnums=3)


def states(e):
    """Time states of which the head alone is asked."""
    return dit.TimeStates(e=e, rows=jnp.zeros((*e.shape[:2], 6, e.shape[2])))


def by_block(output):
    """One number for each block of ENDS, in which no direction of its output cancels."""
    weighed = (output * tiny.normal(3, *output.shape)).sum(axis=(0, 2, 3, 4))
    return jax.ops.segment_sum(weighed, OWNER, num_segments=4)


# who sees whom --------------------------------------------------------------------------------------------------------


def test_block_of_frame_follows_the_ends():
    np.testing.assert_array_equal(dit.block_of_frame(ENDS), OWNER)


def test_a_block_depends_on_itself_and_earlier_blocks_only():
    def outputs(clip):
        return by_block(dit.parallel(MODEL, clip, TIMES, CONTEXT, block_ends=ENDS))

    jacobian = tiny.jit(jax.jacrev(outputs))(CLIP)
    np.testing.assert_array_equal(tiny.reaches(jacobian, OWNER), np.tri(4, dtype=bool))


def test_teacher_forced_blocks_see_earlier_clean_blocks_and_their_own_noisy_one():
    def outputs(noisy, clean):
        return by_block(dit.parallel(MODEL, noisy, TIMES, CONTEXT, block_ends=ENDS, clean=clean))

    noisy, clean = tiny.jit(jax.jacrev(outputs, argnums=(0, 1)))(CLIP, CLEAN)
    np.testing.assert_array_equal(tiny.reaches(noisy, OWNER), np.eye(4, dtype=bool))
    np.testing.assert_array_equal(tiny.reaches(clean, OWNER), np.tri(4, k=-1, dtype=bool))


def test_with_one_block_everything_sees_everything():
    whole = bidirectional(MODEL, CLIP, TIMES, CONTEXT)
    np.testing.assert_allclose(
        parallel(MODEL, CLIP, TIMES, CONTEXT, block_ends=(7,)), whole, atol=1e-5
    )
    causal = parallel(MODEL, CLIP, TIMES, CONTEXT, block_ends=ENDS)
    assert np.abs(causal - whole)[:, 0].max() > 1e-3
    assert whole.shape == CLIP.shape


def test_videos_of_a_batch_do_not_meet():
    both = parallel(MODEL, CLIP, TIMES, CONTEXT, block_ends=ENDS)
    other = parallel(
        MODEL, CLIP.at[1].add(1.0), TIMES.at[1].set(33.0), CONTEXT.at[1].set(0.0), block_ends=ENDS
    )
    np.testing.assert_array_equal(both[0], other[0])
    assert (both[1] != other[1]).any()


# one pass equals the cached rollout -----------------------------------------------------------------------------------

BLOCKS = 4
FULL = tiny.with_cache(top=0, capacity=0, recent=9, sink=3)


@partial(tiny.jit, static_argnames="exp")
def behind_memory(exp, memory, noisy, clean, times, text):
    """The output for a noisy block behind the memory, and the memory after its clean twin."""
    layout = layouts.layout(exp.cache, memory.progress)
    past = pytrees.zipped(memory.layers, [jnp.zeros((2, 0))] * exp.dit.layers)
    denoiser = block_step.Denoiser(APART, exp.step, text)
    level = NoiseLevel(timestep=times, sigma=times / 1000)
    choosing = block_step.Access(attends=block_step.choosing)
    output, kept = block_step.predict_x0(denoiser, layout, noisy, level, past, choosing)
    views, selection = pytrees.unzip(kept)
    memory = block_step.with_views(memory, views)
    after, _ = block_step.commit_block(denoiser, memory, clean, clean, selection)
    return output, after


@pytest.mark.parametrize(("rope_adjustment", "sink"), [("none", 3), ("sink", 3), ("sink", 1)])
def test_blocks_behind_a_full_memory_equal_one_teacher_forced_pass(rope_adjustment, sink):
    exp = tiny.with_cache(FULL, rope_adjustment=rope_adjustment, sink=sink, recent=12 - sink)
    as_is = dataclasses.replace(exp.sample, prediction="clean")  # what the network returns
    exp = dataclasses.replace(exp, sample=as_is)
    noisy = tiny.latents(BLOCKS, seed=8)
    clean = tiny.latents(BLOCKS, seed=9)
    times = tiny.normal(4, 2, 3 * BLOCKS) ** 2 * 300
    text = tiny.text_kv(APART.dit, CONTEXT)
    memory = cache.init(exp.memory, 2)
    outputs = []
    for block in range(BLOCKS):
        now = times[:, 3 * block : 3 * block + 3]
        output, memory = behind_memory(exp, memory, noisy[block], clean[block], now, text)
        outputs.append(output)
    whole = parallel(
        MODEL,
        jnp.concatenate(noisy, axis=1),
        times,
        CONTEXT,
        block_ends=(3, 6, 9, 12),
        clean=jnp.concatenate(clean, axis=1),
    )
    np.testing.assert_allclose(
        jnp.concatenate(outputs, axis=1), whole, atol=1e-5 * np.abs(whole).max()
    )


# order in and out -----------------------------------------------------------------------------------------------------

SMALL = DiTConfig(
    dim=12,
    ffn_dim=5,
    heads=1,
    layers=1,
    text_dim=2,
    text_len=3,
    freq_dim=4,
    in_channels=3,
    out_channels=3,
)


@pytest.fixture(scope="module")
def plain():
    """A small network whose patch embedding and head hand every number on as it is."""
    model = tiny.filled(jax.eval_shape(lambda: dit.WanDiT(SMALL, nnx.Rngs(0))))
    for linear in (model.patch, model.head):
        linear.kernel = nnx.Param(jnp.eye(12))
        linear.bias = nnx.Param(jnp.zeros(12))
    model.head_modulation = nnx.Param(jnp.zeros((2, 12)))
    return model


def test_inside_a_patch_the_channel_is_slowest_on_the_way_in(plain):
    latent = np.asarray(tiny.normal(5, 2, 2, 4, 6, 3))
    tokens = np.asarray(embed_latent(plain, latent))
    for t, y, x, c, py, px in np.ndindex(2, 2, 3, 3, 2, 2):
        np.testing.assert_array_equal(
            tokens[:, (t * 2 + y) * 3 + x, (c * 2 + py) * 2 + px],
            latent[:, t, 2 * y + py, 2 * x + px, c],
        )


def test_inside_a_patch_the_channel_is_fastest_on_the_way_out(plain):
    tokens = np.asarray(tiny.normal(6, 1, 12, 12))
    latent = np.asarray(head(plain, tokens, states(jnp.zeros((1, 2, 12))), (2, 3)))
    exact = tokens - tokens.mean(-1, keepdims=True)
    normed = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + SMALL.eps)
    for t, y, x, py, px, c in np.ndindex(2, 2, 3, 2, 2, 3):
        np.testing.assert_allclose(
            latent[:, t, 2 * y + py, 2 * x + px, c],
            normed[:, (t * 2 + y) * 3 + x, (py * 2 + px) * 3 + c],
            atol=1e-6,
        )


def test_moving_the_picture_by_a_patch_moves_the_tokens():
    tokens = embed_latent(MODEL, CLIP).reshape(2, 7, 2, 3, 36)
    for axis, by in ((1, 1), (2, 2), (3, 2)):
        moved = embed_latent(MODEL, jnp.roll(CLIP, by, axis)).reshape(tokens.shape)
        np.testing.assert_array_equal(moved, jnp.roll(tokens, 1, axis))


def test_the_heads_shift_and_scale_are_those_of_the_frame():
    tokens = tiny.normal(7, 1, 3 * 6, 36)
    e = tiny.normal(8, 1, 3, 36)
    plain, moved = (head(MODEL, tokens, states(each), (2, 3)) for each in (e, e.at[:, 1].add(1.0)))
    np.testing.assert_array_equal((plain != moved).any(axis=(0, 2, 3, 4)), [False, True, False])


# time and text --------------------------------------------------------------------------------------------------------


def alone(q, k, v, past):
    """No token hears another."""
    return jnp.zeros_like(q), None


def test_a_timestep_is_felt_in_its_own_frame_only():
    def tokens(times):
        x = MODEL.embed(CLIP)
        time = MODEL.embed_time(times)
        text = MODEL.text_kv(CONTEXT)
        return MODEL.run(x, time, text, past=None, self_attention=alone)[0]

    every = tiny.jit(tokens)
    plain, moved = (
        every(times).reshape(2, 7, 6, 36) for times in (TIMES, TIMES.at[0, 4].add(50.0))
    )
    felt = (plain != moved).any(axis=(2, 3))
    assert felt[0, 4]
    assert felt.sum() == 1


def test_time_states_are_one_row_a_frame_and_six_for_the_blocks():
    states = embed_time(MODEL, TIMES)
    assert (states.e.shape, states.rows.shape) == ((2, 7, 36), (2, 7, 6, 36))
    again = embed_time(MODEL, TIMES[:, 3:5])
    np.testing.assert_allclose(states.rows[:, 3:5], again.rows, atol=1e-6)
    flat = MODEL.time_proj(jax.nn.silu(states.e))
    np.testing.assert_allclose(states.rows[:, :, 4], flat[..., 4 * 36 : 5 * 36], atol=1e-6)


def test_short_prompts_are_padded_with_zero_states_that_are_attended_to():
    short = tiny.text_kv(MODEL, CONTEXT)
    long = tiny.text_kv(MODEL, jnp.pad(CONTEXT, ((0, 0), (0, 2), (0, 0))))
    np.testing.assert_array_equal(short.k, long.k)
    assert short.k.shape == (2, 2, 17, 3, 12)
    np.testing.assert_array_equal(short.v[:, :, 15], short.v[:, :, 16])
    assert (short.v[:, :, 15] != 0).all()
    whole = bidirectional(MODEL, CLIP, TIMES, CONTEXT)
    np.testing.assert_array_equal(
        whole, bidirectional(MODEL, CLIP, TIMES, jnp.pad(CONTEXT, ((0, 0), (0, 2), (0, 0))))
    )
    fewer = jax.tree.map(jnp.asarray, MODEL)
    fewer.cfg = dataclasses.replace(CFG, text_len=15)
    assert np.abs(bidirectional(fewer, CLIP, TIMES, CONTEXT) - whole).max() > 1e-3


def test_each_video_hears_its_own_prompt():
    whole, other = (
        bidirectional(MODEL, CLIP, TIMES, context)
        for context in (CONTEXT, CONTEXT.at[1, 2].add(1.0))
    )
    np.testing.assert_array_equal(whole[0], other[0])
    assert np.abs(whole[1] - other[1]).max() > 1e-3


# the scan over layers -------------------------------------------------------------------------------------------------


def one_of(stacked, index):
    return jax.tree.map(lambda leaf: leaf[index], stacked)


def test_the_scan_is_a_loop_over_layers_and_stacks_what_they_keep():
    x = tiny.normal(9, 2, 2 * 6, 36)
    time = embed_time(MODEL, TIMES[:, :2])
    text = tiny.text_kv(MODEL, CONTEXT)

    def mix(q, k, v, past):
        return v * past, (q.sum(), k)

    one_layer = tiny.jit(lambda block, *inputs: block(*inputs, mix, attention.reference))
    gains = jnp.asarray([0.5, 2.0])
    scanned, (sums, keys) = tiny.jit(
        lambda: MODEL.run(x, time, text, past=gains, self_attention=mix)
    )()
    for layer in range(2):
        block = one_of(MODEL.blocks, layer)
        x, (total, k) = one_layer(
            block, x, time.rows, KV(k=text.k[layer], v=text.v[layer]), gains[layer]
        )
        np.testing.assert_allclose(sums[layer], total, rtol=1e-4)
        np.testing.assert_allclose(keys[layer], k, atol=1e-5)
    np.testing.assert_allclose(scanned, x, atol=1e-5)


def test_layers_one_by_one_are_the_scan_over_them():
    x = tiny.normal(9, 2, 2 * 6, 36)
    time = embed_time(MODEL, TIMES[:, :2])
    gains = jnp.asarray([0.5, 2.0])

    def mix(q, k, v, past):
        return v * past, (q.sum(axis=1), k)

    run = tiny.jit(
        lambda model, text, past: model.run(x, time, text, past=past, self_attention=mix)
    )
    scanned, stacked = run(MODEL, tiny.text_kv(MODEL, CONTEXT), gains)
    looped, listed = run(APART.dit, tiny.text_kv(APART.dit, CONTEXT), list(gains))
    assert isinstance(listed, list)
    np.testing.assert_allclose(scanned, looped, atol=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), stacked, pytrees.stack(listed))


def test_layers_come_apart_without_touching_the_model_or_its_numbers():
    before = pytrees.flatten(MODEL)
    apart = pytrees.flatten(MODEL.unrolled())
    assert pytrees.flatten(MODEL).keys() == before.keys()
    for name, leaf in before.items():
        if name.startswith("blocks/"):
            for layer in range(CFG.layers):
                np.testing.assert_array_equal(
                    apart.pop(name.replace("blocks", f"blocks/{layer}", 1)), leaf[layer]
                )
        else:
            np.testing.assert_array_equal(apart.pop(name), leaf)
    assert apart == {}


def test_words_of_layers_apart_are_those_of_the_stack():
    stacked = tiny.text_kv(MODEL, CONTEXT)
    listed = tiny.text_kv(APART.dit, CONTEXT)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), stacked, pytrees.stack(listed))


def test_projections_are_those_a_layer_hands_to_attention():
    """Caught on the way of a run through the first layer, which reads the very tokens."""
    x = tiny.normal(9, 2, 2 * 6, 36)
    time = embed_time(MODEL, TIMES[:, :2])
    text = tiny.text_kv(MODEL, CONTEXT)

    def keep(q, k, v, past):
        return jnp.zeros_like(v), KV(k=k, v=v)

    stacked = tiny.jit(dit.WanDiT.keys_values)(MODEL, x, time)
    listed = tiny.jit(dit.WanDiT.keys_values)(APART.dit, x, time)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), stacked, pytrees.stack(listed))
    _, caught = tiny.jit(lambda: MODEL.run(x, time, text, past=None, self_attention=keep))()
    jax.tree.map(
        lambda own, seen: np.testing.assert_allclose(own[0], seen[0], atol=1e-5), stacked, caught
    )
    assert np.abs(stacked.k[1] - caught.k[1]).max() > 0.01


def test_queries_and_keys_are_normed_over_all_heads_before_the_split():
    attn = one_of(MODEL.blocks, 0).attn
    attn.norm_q.scale = attn.norm_k.scale = nnx.Param(jnp.ones(36))
    x = tiny.normal(10, 2, 5, 36)
    for heads in (attn.queries(x), attn.keys_values(x).k):
        assert heads.shape == (2, 5, 3, 12)
        np.testing.assert_allclose((heads**2).mean(axis=(2, 3)), 1, atol=1e-4)
        assert np.abs((heads**2).mean(axis=3) - 1).max() > 0.01
    np.testing.assert_allclose(attn.keys_values(x).v[:, :, 1], attn.v(x)[..., 12:24], atol=1e-6)
