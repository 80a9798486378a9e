"""Operations, writes and bytes are counted exactly, through every kind of loop and call, and nothing is allocated."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from packforcing_jax import config
from packforcing_jax.networks import dit
from packforcing_jax.plan import jaxpr_cost
from packforcing_jax.policies import attention
from packforcing_jax.types import KV


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


SQUARE = shape(5, 5)
ONCE = 2 * 5**3  # operations of one product of two SQUAREs


def operations(f, *args):
    return jaxpr_cost.operations(jaxpr_cost.trace(f, *args))


@pytest.mark.parametrize(
    ("subscripts", "shapes", "expected"),
    [
        ("ab,bc->ac", [(3, 5), (5, 7)], 2 * 3 * 5 * 7),
        ("bqnh,bknh->bnqk", [(2, 3, 5, 7), (2, 11, 5, 7)], 2 * 2 * 3 * 5 * 7 * 11),
        ("abc,acd->abd", [(3, 5, 7), (3, 7, 2)], 2 * 3 * 5 * 7 * 2),
        (
            "ab,cd->abcd",
            [(3, 5), (7, 2)],
            0,
        ),  # nothing is summed: elementwise work, which is not counted
    ],
)
def test_a_product_counts_two_for_each_multiplication(subscripts, shapes, expected):
    assert (
        operations(lambda x, y: jnp.einsum(subscripts, x, y), *(shape(*each) for each in shapes))
        == expected
    )


@pytest.mark.parametrize(
    ("groups", "stride", "padding", "frames"), [(1, 1, 1, 9), (1, 2, 0, 4), (3, 3, 0, 3)]
)
def test_a_convolution_counts_one_kernel_for_each_output(groups, stride, padding, frames):
    conv = nnx.eval_shape(
        lambda: nnx.Conv(
            6,
            15,
            (3,),
            strides=stride,
            padding=padding,
            feature_group_count=groups,
            rngs=nnx.Rngs(0),
        )
    )
    assert (
        operations(lambda conv, x: conv(x), conv, shape(2, 9, 6))
        == 2 * 2 * frames * 15 * 3 * 6 // groups
    )


@jax.custom_jvp
def with_own_jvp(x):
    return x @ x


with_own_jvp.defjvp(lambda primals, tangents: (primals[0] @ primals[0], tangents[0]))


@jax.custom_vjp
def with_own_vjp(x):
    return x @ x


with_own_vjp.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x,))


@pytest.mark.parametrize(
    ("f", "times"),
    [
        (lambda x: jnp.sin(x) + x, 0),
        (lambda x: x @ x @ x, 2),
        (lambda x: (x @ x, jnp.cos(x @ x @ x), x)[::2], 1),  # what no result needs is not done
        (jax.jit(lambda x: x @ x), 1),
        (with_own_jvp, 1),
        (with_own_vjp, 1),
        (jax.checkpoint(lambda x: x @ x), 1),
        (lambda x: jax.lax.scan(lambda c, _: (c @ x, None), x, None, length=7)[0], 7),
        (
            lambda x: jax.lax.fori_loop(
                2, 5, lambda _, c: jax.lax.fori_loop(0, 4, lambda _, d: d @ x, c), x
            ),
            12,
        ),
        (lambda x: jax.lax.cond(x.sum() > 0, lambda y: y @ y @ y, lambda y: y @ y, x), 2),
        (lambda x: jax.lax.cond(x.sum() > 0, lambda y: y, lambda y: y @ y @ y, x), 2),
        (lambda x: jax.lax.while_loop(lambda c: c.sum() < 3, lambda c: c @ x, x), 1),
        (lambda x: jax.vmap(lambda y: y @ x)(jnp.stack([x, x, x])), 3),
        (jax.value_and_grad(lambda x: (x @ x).sum()), 3),
        (jax.value_and_grad(jax.checkpoint(lambda x: jnp.sin(x @ x).sum())), 4),  # computed again
    ],
)
def test_loops_and_calls_are_followed(f, times):
    assert operations(f, SQUARE) == times * ONCE


def test_a_product_with_nothing_costs_nothing():
    assert operations(lambda x, y: x @ y, shape(3, 0), shape(0, 5)) == 0


def test_pieces_laid_into_a_view_are_found_in_order():
    def lay(view, short, long, other):
        for piece in (short, long):
            view = jax.lax.dynamic_update_slice_in_dim(view, piece, 1, axis=1)
        view = jax.lax.fori_loop(
            0, 2, lambda i, v: jax.lax.dynamic_update_slice_in_dim(v, short, i, axis=1), view
        )
        rows = jax.lax.dynamic_update_slice_in_dim(view, view[:1], 1, axis=0)
        return rows, jax.lax.dynamic_update_slice_in_dim(other, short, 0, axis=1)

    program = jaxpr_cost.trace(lay, shape(2, 13, 3), shape(2, 4, 3), shape(2, 5, 3), shape(2, 9, 3))
    assert jaxpr_cost.writes(program, (2, 13, 3)) == [
        4,
        5,
        4,
        4,
        13,
    ]  # a write along another axis is as long as the view
    assert jaxpr_cost.writes(program, (2, 13, 3), axis=0) == [2, 2, 2, 2, 1]
    assert jaxpr_cost.writes(program, (2, 9, 3)) == [4]
    assert jaxpr_cost.writes(program, (13, 2, 3)) == []


def test_operations_on_arrays_of_one_shape():
    def f(x, y, z):
        return jax.lax.map(lambda row: (row @ y).sum(), x) + (y.T @ z).sum()

    program = jaxpr_cost.trace(f, shape(2, 4, 3), shape(3, 7), shape(3, 5))
    assert jaxpr_cost.operations(program) == 2 * 2 * 4 * 3 * 7 + 2 * 7 * 3 * 5
    assert jaxpr_cost.operations(program, on=(3, 7)) == 2 * 2 * 4 * 3 * 7
    assert jaxpr_cost.operations(program, on=(3, 5)) == 2 * 7 * 3 * 5
    assert jaxpr_cost.operations(program, on=(4, 7)) == 0  # a result is no operand


def test_walk_says_how_often_each_equation_runs():
    program = jaxpr_cost.trace(
        lambda x: jax.lax.fori_loop(
            0, 3, lambda _, c: jnp.sin(jax.lax.map(jnp.cos, c)), jnp.exp(x)
        ),
        SQUARE,
    )
    times = {eqn.primitive.name: times for eqn, times in jaxpr_cost.walk(program)}
    assert {name: times[name] for name in ("exp", "sin", "cos")} == {"exp": 1, "sin": 3, "cos": 15}


@pytest.mark.parametrize(
    ("f", "arrays"),
    [
        (lambda x: x + 1, 1),
        (lambda x: jnp.cos(jnp.sin(x)), 2),  # one is made while the other is read
        (lambda x: jnp.exp(jnp.cos(jnp.sin(x))), 2),
        (lambda x: (lambda a, b, c: a * b * c)(jnp.sin(x), jnp.cos(x), jnp.exp(x)), 4),
        (lambda x: [jnp.sin(x), jnp.cos(x), jnp.exp(x)][1], 1),  # what nobody needs is not made
        (lambda x: (jnp.sin(x), jnp.cos(jnp.exp(x))), 3),  # results stay
        (lambda x: jnp.sin(x) * jax.jit(lambda y: jnp.exp(jnp.cos(jnp.exp(y))))(x), 3),
        (lambda x: jax.lax.dynamic_update_slice_in_dim(x, jnp.sin(x), 0, axis=0), 2),
    ],
)
def test_peak_is_what_lives_at_once(f, arrays):
    assert jaxpr_cost.peak(jaxpr_cost.trace(f, SQUARE)) == arrays * 5 * 5 * 4


def test_arrays_of_given_shapes_do_not_count_for_the_peak():
    def f(x, y):
        return (jnp.sin(x @ y) @ y.T).sum(axis=1)

    program = jaxpr_cost.trace(f, shape(3, 5), shape(5, 101))
    wide = 3 * 101 * 4
    tall = 5 * 101 * 4
    small = 3 * 5 * 4
    assert jaxpr_cost.peak(program) == wide + tall + small
    assert jaxpr_cost.peak(program, besides=[(3, 101)]) == tall + small


def test_trees_are_weighed_by_shape_and_dtype():
    tree = {"a": shape(3, 5, dtype=jnp.bfloat16), "b": (shape(7), shape())}
    assert jaxpr_cost.count(tree) == 23
    assert jaxpr_cost.nbytes(tree) == 3 * 5 * 2 + 8 * 4


@pytest.mark.parametrize(
    ("queries", "keys", "teraflop"), [(6240, 27_872, 48.25), (4680, 32_760, 40.41)]
)
def test_one_pass_of_the_1_3b_transformer_costs_what_its_matrix_products_cost(
    queries, keys, teraflop
):
    """With the paper's memory full, and with Self-Forcing's cache full: shapes only, in a second."""
    cfg = config.DiTConfig()
    model = jax.eval_shape(lambda: dit.WanDiT(cfg, nnx.Rngs(0)))
    heads = (cfg.layers, 1, keys - queries, cfg.heads, cfg.head_dim)
    words = (cfg.layers, 1, cfg.text_len, cfg.heads, cfg.head_dim)

    def mix(q, k, v, past):
        k, v = (jnp.concatenate(both, axis=1) for both in ((past.k, k), (past.v, v)))
        return attention.reference(q, k, v), None

    def forward(model, latent, text, past):
        time = model.embed_time(jnp.zeros(latent.shape[:2]))
        x, _ = model.run(model.embed(latent), time, text, past=past, self_attention=mix)
        return model.output(x, time, dit.token_grid(cfg, latent))

    latent = shape(1, queries // 1560, 60, 104, 16)
    views = (
        jax.eval_shape(lambda each=each: KV(k=jnp.zeros(each), v=jnp.zeros(each)))
        for each in (words, heads)
    )
    assert operations(forward, model, latent, *views) / 1e12 == pytest.approx(teraflop, abs=0.005)
