"""Every parameter lies where one rule says, what does not fit is refused, and no mesh changes what is learned."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import meshed
import numpy as np
import optax
import pytest
import tiny
from flax import nnx, struct
from hypothesis import given, settings
from hypothesis import strategies as some
from jax.sharding import PartitionSpec as P

from packforcing_jax import pytrees, sharding
from packforcing_jax.config import CacheConfig, MeshConfig, TrainConfig, loading
from packforcing_jax.errors import InputError
from packforcing_jax.networks import codec, mesh
from packforcing_jax.sharding import AXES
from packforcing_jax.training import batches

CONFIGS = loading.names()
Q = "dit/blocks/attn/q/kernel"
NORM = "dit/blocks/norm3/scale"


def described(data=1, fsdp=1, tensor=1, context=1):
    """A mesh of devices that this machine does not have."""
    return jax.sharding.AbstractMesh((data, fsdp, tensor, context), AXES)


NOTHING_PACKED = CacheConfig(top=0, capacity=0)


def shapes(exp):
    """Every parameter that training or its data may load, by path."""
    return of_sizes(dataclasses.replace(exp, name="", cache=NOTHING_PACKED))


@functools.cache
def of_sizes(exp):
    model = jax.eval_shape(lambda: batches.new_model(exp, jax.random.key(0)))
    vae = jax.eval_shape(lambda: codec.make(exp.codec, nnx.Rngs(0)))
    return pytrees.flatten(model) | pytrees.flatten({"codec": vae})


def held(tree, where):
    """Bytes of `tree` on each device."""
    parts = jax.tree.map(
        lambda leaf, at: math.prod(at.shard_shape(leaf.shape)) * leaf.dtype.itemsize, tree, where
    )
    return sum(jax.tree.leaves(parts))


def bytes_of(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


# the table ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_is_matched_by_exactly_one_rule(name):
    stages = [shapes(stage.experiment) for stage in loading.load_recipe(name)]
    for path, leaf in [each for stage in stages for each in stage.items()]:
        found = [spec for pattern, spec in mesh._PATTERNS if pattern.fullmatch(path)]
        assert len(found) == 1, path
        assert len(found[0]) <= leaf.ndim, path


def test_every_rule_is_of_use():
    paths = {path for name in CONFIGS for path in shapes(loading.load_experiment(name))}
    assert all(any(pattern.fullmatch(path) for path in paths) for pattern, _ in mesh._PATTERNS)


def test_a_parameter_without_a_rule_or_with_two_is_refused(monkeypatch):
    with pytest.raises(InputError, match="dit/blocks/attn/w/kernel is matched by 0 sharding rules"):
        mesh.rule("dit/blocks/attn/w/kernel")
    with pytest.raises(InputError, match="matched by 0"):
        mesh.shardings({"teacher": {"dit/patch/weight": jnp.zeros(3)}}, described())
    monkeypatch.setattr(mesh, "_PATTERNS", [*mesh._PATTERNS, mesh._PATTERNS[0]])
    with pytest.raises(InputError, match="is matched by 2 sharding rules"):
        mesh.rule(Q)


def test_layers_are_never_divided():
    for path, leaf in shapes(tiny.EXP).items():
        if "/blocks/" in path:
            assert tuple(mesh.spec(path, leaf.shape, described(fsdp=2, tensor=2)))[:1] in (
                (),
                (None,),
            ), path


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"tensor": 4}])
def test_the_transformer_at_full_size_falls_into_equal_parts(sizes):
    exp = loading.load_experiment("wan_t2v_1_3b")
    over = described(**sizes)
    params = {path: leaf for path, leaf in shapes(exp).items() if path.startswith("dit/")}
    share = (
        bytes_of(params) / held(params, mesh.shardings(params, over)) / math.prod(sizes.values())
    )
    assert 0.98 < share <= 1


def test_heads_and_inner_widths_are_divided_where_they_are_made_and_along_where_they_are_read():
    over = described(fsdp=4, tensor=3)
    assert mesh.spec(Q, (2, 36, 36), over) == P(None, "fsdp", "tensor")
    assert mesh.spec("dit/blocks/cross/o/kernel", (2, 36, 36), over) == P(None, "tensor", "fsdp")
    assert mesh.spec("dit/blocks/ffn_in/bias", (2, 21), over) == P(None, "tensor")


def test_what_an_axis_does_not_divide_stays_whole_on_it():
    over = described(fsdp=8, tensor=3)
    assert mesh.spec(Q, (2, 36, 36), over) == P(None, None, "tensor")
    assert mesh.spec("dit/blocks/ffn_in/kernel", (2, 36, 20), over) == P(None, None, None)


# what is beside the parameters ----------------------------------------------------------------------------------------

FLAT = {Q: jnp.ones((2, 36, 36)), "dit/patch/kernel": jnp.ones((48, 36)), NORM: jnp.ones((2, 36))}


@struct.dataclass
class State:
    params: dict
    ema: dict
    opt: dict
    step: jax.Array


@pytest.mark.parametrize("kind", ["adamw", "muon", "several"])
def test_moments_and_averages_lie_where_their_parameter_does(kind):
    optimiser = {
        "adamw": optax.adamw(1e-3),
        "muon": optax.contrib.muon(1e-3),
        "several": optax.MultiSteps(
            optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)), 3
        ),
    }[kind]
    state = State(
        params={"generator": FLAT, "critic": FLAT},
        ema=FLAT,
        opt={"compressor": optimiser.init(FLAT)},
        step=jnp.int32(0),
    )
    over = described(data=2, fsdp=3, tensor=2)
    where = pytrees.flatten(mesh.shardings(state, over))
    seen = dict.fromkeys(FLAT, 0)
    for path, leaf in pytrees.flatten(state).items():
        own = [each for each in FLAT if path.endswith(each)]
        if leaf.shape and own:
            assert where[path].spec == mesh.spec(own[0], FLAT[own[0]].shape, over), path
            seen[own[0]] += 1
        else:
            assert where[path].spec == P(), path
    assert min(seen.values()) >= 4  # two networks, the average, one moment at least


def test_what_has_fewer_axes_than_its_parameter_is_kept_whole():
    optimiser = optax.adafactor(1e-3, min_dim_size_to_factor=8)
    state = jax.eval_shape(optimiser.init, FLAT)
    where = mesh.shardings(state, described(fsdp=3, tensor=2))
    for leaf, at in zip(jax.tree.leaves(state), jax.tree.leaves(where), strict=True):
        at.shard_shape(leaf.shape)  # raises if it does not fit


def test_a_state_is_born_divided():
    over = mesh.make(MeshConfig(fsdp=2))
    where = mesh.shardings(jax.eval_shape(lambda: FLAT), over)
    born = jax.jit(
        lambda: {path: jnp.ones(leaf.shape) for path, leaf in FLAT.items()}, out_shardings=where
    )()
    assert born[Q].addressable_shards[1].data.shape == (2, 18, 36)
    assert born[NORM].is_fully_replicated


# the mesh -------------------------------------------------------------------------------------------------------------


def test_data_takes_what_the_other_axes_leave():
    assert mesh.sizes(MeshConfig(fsdp=2, tensor=3), 12) == (2, 2, 3, 1)
    assert mesh.sizes(MeshConfig(data=3, context=2), 6) == (3, 1, 1, 2)
    assert dict(mesh.make(MeshConfig()).shape) == {"data": 2, "fsdp": 1, "tensor": 1, "context": 1}
    assert mesh.make(MeshConfig(), jax.devices()[1:]).devices.tolist() == [[[[jax.devices()[1]]]]]


def test_the_axes_are_left_to_the_compiler():
    assert set(mesh.make(MeshConfig(tensor=2)).axis_types) == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize(
    ("asked", "count", "sentence"),
    [
        (
            MeshConfig(data=3, fsdp=2),
            8,
            "data=3, fsdp=2, tensor=1, context=1 takes 6 devices, but there are 8; "
            "data=4, fsdp=2, tensor=1, context=1 would fit",
        ),
        (
            MeshConfig(fsdp=8),
            2,
            "takes 8 devices, but there are 2; data=1, fsdp=2, tensor=1, context=1 would fit",
        ),
        (
            MeshConfig(tensor=3),
            4,
            "takes 3 devices, but there are 4; data=4, fsdp=1, tensor=1, context=1 would fit",
        ),
        (MeshConfig(tensor=0), 4, "train.mesh.tensor=0 is no size; give 1 or more"),
        (MeshConfig(data=-2), 4, "train.mesh.data=-2 is no size; give 0 or more"),
    ],
)
def test_a_mesh_that_does_not_fit_names_one_that_would(asked, count, sentence):
    with pytest.raises(InputError) as refused:
        mesh.sizes(asked, count)
    assert sentence in str(refused.value)


@settings(max_examples=200, deadline=None)
@given(some.tuples(some.integers(0, 9), *[some.integers(1, 9)] * 3), some.integers(1, 64))
def test_sizes_multiply_to_the_devices_or_are_refused_for_sizes_that_do(asked, count):
    try:
        found = mesh.sizes(MeshConfig(*asked), count)
    except InputError:
        found = mesh._near(asked, count)
        assert found != asked
        assert mesh.sizes(MeshConfig(*found), count) == found
    assert math.prod(found) == count


def test_a_batch_is_divided_over_copies_and_shards():
    over = mesh.make(MeshConfig(fsdp=2))
    x = jax.device_put(np.arange(12).reshape(6, 2), mesh.batch_sharding(over))
    assert [shard.data[:, 0].tolist() for shard in x.addressable_shards] == [[0, 2, 4], [6, 8, 10]]


# what cannot be divided -----------------------------------------------------------------------------------------------


def test_twelve_heads_over_eight_devices_are_refused_with_the_sizes_that_work():
    exp = loading.load_experiment("wan_t2v_1_3b")
    train = TrainConfig(batch=8)
    with pytest.raises(
        InputError, match=r"12 heads.* tensor x context = 8 x 1 = 8 .*work: 1, 2, 3, 4, 6, 12\."
    ):
        mesh.check(exp, train, described(tensor=8))
    with pytest.raises(InputError, match="tensor x context = 4 x 2 = 8 does not divide"):
        mesh.check(exp, train, described(tensor=4, context=2))
    for tensor in (1, 2, 3, 4, 6, 12):
        mesh.check(exp, train, described(tensor=tensor))


def test_a_batch_that_is_not_divisible_is_refused_with_one_that_is():
    exp = tiny.EXP
    train = TrainConfig(batch=10, accumulate=2)
    mesh.check(exp, train, described(data=5))
    with pytest.raises(InputError, match=r"train.batch=10 .* 2 x 3 x 2 = 12; make it 12\."):
        mesh.check(exp, train, described(data=2, fsdp=3))


def test_tokens_that_are_not_divisible_are_refused_with_sizes_that_work():
    exp = tiny.with_cache(block=1, score_pool=(1, 2, 1))
    train = TrainConfig(batch=1)
    with pytest.raises(InputError, match=r"8 tokens in a block, .*context=3 .*work: 1, 2, 4, 8\."):
        mesh.check(exp, train, described(context=3))
    mesh.check(tiny.EXP, train, described(context=3))


# inside the networks --------------------------------------------------------------------------------------------------


def test_without_a_mesh_nothing_is_constrained():
    x = jnp.ones((4, 3))
    assert sharding.constrain(x, sharding.BATCH, None) is x
    assert "sharding" not in str(jax.make_jaxpr(lambda x: sharding.constrain(x, "data", None))(x))


def test_arrays_are_laid_out_over_the_mesh_in_force():
    with jax.set_mesh(mesh.make(MeshConfig(tensor=2))):
        laid = jax.jit(lambda x: sharding.constrain(x, sharding.BATCH, "context", "tensor"))(
            jnp.ones((3, 5, 4))
        )
        whole = jax.jit(lambda x: sharding.constrain(x, None, "tensor"))(jnp.ones((4, 3)))
    assert [shard.data.shape for shard in laid.addressable_shards] == [(3, 5, 2)] * 2
    assert whole.is_fully_replicated


# what is learned ------------------------------------------------------------------------------------------------------

MESHES = [
    (1, 1, 1, 1),
    (2, 1, 1, 1),
    (1, 2, 1, 1),
    (1, 1, 2, 1),
    (1, 1, 1, 2),
    (2, 2, 1, 1),
    (1, 1, 4, 1),
    (8, 1, 1, 1),
    (1, 2, 2, 2),
]


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["forcing", "dmd"])
def test_every_mesh_learns_the_same_over_twenty_steps(objective):
    found = meshed.told(meshed.child(objective=objective, steps=20, meshes=MESHES), patience=3600)
    assert {
        mesh: meshed.apart(found[MESHES[0]], steps) < 1e-4 for mesh, steps in found.items()
    } == dict.fromkeys(MESHES, True)
