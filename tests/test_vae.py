"""The autoencoder against the original's numbers, in one piece and in chunks, and the weights' three sets of names."""

import dataclasses
import functools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from packforcing_jax.convert import rules, wan_vae
from safetensors import safe_open

from packforcing_jax import pytrees
from packforcing_jax.config import WAN_MEAN, VAEConfig
from packforcing_jax.errors import InputError
from packforcing_jax.networks import vae, vae_layers

GOLDEN = pathlib.Path(__file__).parent / "golden"
TOLERANCE = 2e-5
ODD = VAEConfig(
    dim=6,
    z_dim=3,
    dim_mult=(1, 2, 3),
    num_res_blocks=1,
    temporal_downsample=(True, False),
    mean=(0.3, -0.2, 0.1),
    std=(1.5, 0.7, 2.0),
)

jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)  # compiles three times faster
encode = jit(vae.encode)
decode = jit(vae.decode)
encode_both = jit(lambda net, video: (vae.encode(net, video), *vae.encode_moments(net, video)))
encode_chunk = jit(vae.encode_chunk, static_argnames="first")
decode_chunk = jit(vae.decode_chunk, static_argnames="first")
step = jit(lambda layer, x, past, first: layer(x, past, first=first), static_argnames="first")


@dataclasses.dataclass(frozen=True)
class Golden:
    meta: dict
    arrays: dict[str, np.ndarray]
    vae: vae.WanVAE

    def __getitem__(self, name: str) -> np.ndarray:
        """Channels last."""
        return np.moveaxis(self.arrays[name], 1, -1)


def weights(arrays):
    return {
        name.removeprefix("weights/"): a
        for name, a in arrays.items()
        if name.startswith("weights/")
    }


def shapes_of(cfg):
    return jax.eval_shape(lambda: vae.WanVAE(cfg, nnx.Rngs(0)))


def wanted(cfg):
    return {path: leaf.shape for path, leaf in pytrees.flatten(shapes_of(cfg)).items()}


@functools.cache
def golden(name: str) -> Golden:
    with safe_open(GOLDEN / f"{name}.safetensors", "np") as file:
        meta = json.loads(file.metadata()["meta"])
        arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    cfg = wan_vae.vae_config(meta["config"])
    tensors = weights(arrays)
    if name.startswith("diffusers"):
        cfg = wan_vae.unscaled(cfg)
        tensors = rules.rename(tensors, wan_vae.diffusers_names(cfg).items())
    flat = rules.convert(tensors, wan_vae.WAN_VAE, wanted(cfg))
    return Golden(
        meta,
        arrays,
        pytrees.fill(shapes_of(cfg), {path: jnp.asarray(a) for path, a in flat.items()}),
    )


def drawn(build):
    """The module with random weights that keep the size of features; NumPy draws, as JAX compiles once per shape."""
    shapes = jax.eval_shape(build)
    rng = np.random.default_rng(0)
    draws = {
        path: rng.normal(size=leaf.shape) / math.sqrt(math.prod(leaf.shape[:-1]))
        for path, leaf in pytrees.flatten(shapes).items()
    }
    return pytrees.fill(
        shapes, {path: jnp.asarray(draw, jnp.float32) for path, draw in draws.items()}
    )


@functools.cache
def odd() -> vae.WanVAE:
    return drawn(lambda: vae.WanVAE(ODD, nnx.Rngs(0)))


def noise(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def error(ours, reference):
    assert ours.shape == reference.shape
    return float(np.abs(ours - reference).max() / np.abs(reference).max())


OUTPUTS = {
    "encode.latent": lambda g: encode_both(g.vae, g["inputs/video"])[0],
    "encode.mu_unscaled": lambda g: encode_both(g.vae, g["inputs/video"])[1],
    "encode.logvar": lambda g: encode_both(g.vae, g["inputs/video"])[2],
    "encode_first_frame.latent": lambda g: encode(g.vae, g["inputs/video"][:, :1]),
    "decode.video": lambda g: decode(g.vae, g["inputs/latent"]),
    "decode_first_frame.video": lambda g: decode(g.vae, g["inputs/latent"][:, :1]),
    "roundtrip.video": lambda g: decode(g.vae, encode_both(g.vae, g["inputs/video"])[0]),
    "mu": lambda g: encode_both(g.vae, g["inputs/video"])[1],
    "logvar": lambda g: encode_both(g.vae, g["inputs/video"])[2],
    "decode_clamped": lambda g: decode(g.vae, g["inputs/latent"]).clip(-1, 1),
}


@pytest.mark.parametrize("name", ["vae_tiny", "vae_realflags", "diffusers_vae_tiny"])
def test_every_output_of_the_original(name):
    file = golden(name)
    outputs = [key.removeprefix("outputs/") for key in file.arrays if key.startswith("outputs/")]
    errors = {output: error(OUTPUTS[output](file), file[f"outputs/{output}"]) for output in outputs}
    assert len(errors) in (3, 7)
    assert {output: value for output, value in errors.items() if not value <= TOLERANCE} == {}


def stream(chunk, net, state, x, sizes):
    """Outputs of `chunk` over consecutive pieces of `x` of these sizes, joined, and the last state."""
    parts = []
    done = 0
    for size in sizes:
        part, state = chunk(net, state, x[:, done : done + size], first=done == 0)
        parts.append(part)
        done += size
    return parts, state


@pytest.mark.parametrize("name", ["vae_tiny", "vae_realflags"])
def test_the_originals_groups_give_its_frames_and_its_cache(name):
    file = golden(name)
    latent = file["inputs/latent"]
    state = vae.init_decoder(file.vae, 1, *latent.shape[2:4])
    parts, state = stream(
        decode_chunk, file.vae, state, latent, file.meta["config"]["stream_groups"]
    )
    assert [part.shape[1] for part in parts] == file.arrays[
        "aux/decode.stream_chunk_frames"
    ].tolist()
    assert error(np.concatenate(parts, axis=1), file["outputs/decode.video"]) <= TOLERANCE
    assert error(state[0], file["aux/decode.feat_cache_final.0"]) <= TOLERANCE


def test_the_encoder_streams_in_the_originals_groups():
    file = golden("vae_tiny")
    video = file["inputs/video"]
    for sizes in [(1, 4, 4), (5, 4)]:
        state = vae.init_encoder(file.vae, 1, *video.shape[2:4])
        parts, _ = stream(encode_chunk, file.vae, state, video, sizes)
        assert error(np.concatenate(parts, axis=1), file["outputs/encode.latent"]) <= TOLERANCE


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1), (2, 1, 2)])
def test_decoding_in_chunks_equals_decoding_at_once(sizes):
    latent = noise(2, 5, 3, 5, 3)
    whole = decode(odd(), latent)
    parts, _ = stream(decode_chunk, odd(), vae.init_decoder(odd(), 2, 3, 5), latent, sizes)
    assert whole.shape == (2, 1 + 2 * 4, 12, 20, 3)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=1e-5)


@pytest.mark.parametrize("sizes", [(1, 2, 2, 2), (3, 2, 2)])
def test_encoding_in_chunks_equals_encoding_at_once(sizes):
    video = noise(2, 7, 12, 20, 3)
    whole = encode(odd(), video)
    parts, _ = stream(encode_chunk, odd(), vae.init_encoder(odd(), 2, 12, 20), video, sizes)
    assert whole.shape == (2, 4, 3, 5, 3)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=1e-5)


def test_state_keeps_its_shapes_so_that_it_can_be_scanned():
    latent = noise(2, 5, 3, 5, 3)
    state = vae.init_decoder(odd(), 2, 3, 5)
    first, after = decode_chunk(odd(), state, latent[:, :1], first=True)
    rest = jnp.moveaxis(latent[:, 1:, None], 1, 0)

    @jit
    def scan(net, state, rest):
        return jax.lax.scan(
            lambda s, z: vae.decode_chunk(net, s, z, first=False)[::-1], state, rest
        )

    _, frames = scan(odd(), after, rest)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, after)
    np.testing.assert_allclose(
        np.concatenate([first, *frames], axis=1), decode(odd(), latent), atol=1e-5
    )


def test_frames_that_do_not_fill_a_group_are_ignored():
    video = noise(2, 8, 12, 20, 3)
    np.testing.assert_array_equal(encode(odd(), video), encode(odd(), video[:, :7]))


@pytest.mark.parametrize(("count", "first"), [(4, True), (3, False), (0, True), (0, False)])
def test_a_chunk_of_incomplete_latents_is_refused(count, first):
    state = vae.init_encoder(odd(), 1, 8, 12)
    with pytest.raises(InputError, match=f"{count} frames"):
        vae.encode_chunk(odd(), state, noise(1, count, 8, 12, 3), first=first)


def test_no_pixel_sees_a_later_latent_and_no_latent_a_later_pixel():
    latent = noise(2, 5, 3, 5, 3)
    video = noise(2, 7, 12, 20, 3)
    groups = [0, 1, 1, 2, 2, 3, 3, 4, 4]  # the latent of each frame
    for z in range(5):
        changed = changed_by(decode, latent, z)
        np.testing.assert_array_equal(changed[0], [z <= group for group in groups])
    for frame in range(7):
        changed = changed_by(encode, video, frame)
        np.testing.assert_array_equal(changed[0], [groups[frame] <= z for z in range(4)])


def changed_by(coder, x, time):
    """Which (video, time) of the outputs change with this time of the first input video; the others must not."""
    moved = x.at[0, time].add(noise(*x.shape[2:], seed=1))
    changed = np.abs(coder(odd(), moved) - coder(odd(), x)).max((2, 3, 4)) > 0
    assert not changed[1:].any()
    return changed


def test_half_precision_parameters_keep_a_half_precision_state():
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), odd())
    latent = noise(2, 5, 3, 5, 3)
    video, state = decode_chunk(half, vae.init_decoder(half, 2, 3, 5), latent[:, :2], first=True)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype(jnp.bfloat16)}
    assert video.dtype == jnp.float32
    assert 0 < error(video, decode(odd(), latent)[:, :3]) < 0.1


# Layers ---------------------------------------------------------------------------------------------------------------


def test_norm_gives_every_voxel_the_length_root_channels_however_small():
    norm = vae_layers.RMSNorm(5)
    x = noise(1, 2, 3, 2, 5) * jnp.asarray([1e4, 1.0, 1e-6])[None, None, :, None, None]
    np.testing.assert_allclose(jnp.linalg.norm(norm(x), axis=-1), math.sqrt(5), rtol=1e-5)


def test_norm_divides_by_at_least_a_tiny_length():
    gamma = np.asarray([1.0, 2.0, 3.0, -1.0])
    layer = vae_layers.RMSNorm(4)
    layer.gamma[...] = jnp.asarray(gamma, jnp.float32)
    norm = jit(layer)
    x = jnp.full((1, 1, 1, 1, 4), 1e-13)  # length 2e-13, below 1e-12
    np.testing.assert_allclose(norm(x).ravel(), 0.1 * 2 * gamma, rtol=1e-5)
    slope = jit(jax.grad(lambda x: layer(x).sum()))(jnp.zeros((1, 1, 1, 1, 4)))
    np.testing.assert_allclose(slope.ravel(), 2e12 * gamma, rtol=1e-5)


def test_norm_of_half_precision_is_taken_in_float32():
    x = noise(1, 1, 2, 3, 300).astype(jnp.bfloat16)
    norm = jit(vae_layers.RMSNorm(300))
    assert norm(x).dtype == jnp.bfloat16
    np.testing.assert_array_equal(norm(x), norm(x.astype(jnp.float32)).astype(jnp.bfloat16))


def ones(conv: nnx.Conv):
    conv.kernel[...] = jnp.ones_like(conv.kernel[...])
    conv.bias[...] = jnp.zeros_like(conv.bias[...])


def test_downsampling_pads_right_and_bottom_only():
    layer = drawn(lambda: vae_layers.Downsample(1, temporal=False, rngs=nnx.Rngs(0)))
    ones(layer.conv)
    y, past = step(layer, jnp.ones((1, 2, 4, 6, 1)), (), first=True)
    np.testing.assert_array_equal(y[0, 1, :, :, 0], [[9, 9, 6], [6, 6, 4]])
    assert past == ()


@pytest.mark.parametrize("first", [True, False])
def test_halving_frames_spans_the_chunks(first):
    layer = drawn(lambda: vae_layers.Downsample(1, temporal=True, rngs=nnx.Rngs(0)))
    ones(layer.time_conv)
    ones(layer.conv)
    layer.conv.kernel[...] = jnp.pad(layer.conv.kernel[:1, :1], ((0, 2), (0, 2), (0, 0), (0, 0)))
    x = 10.0 ** jnp.arange(4 + first).reshape(1, -1, 1, 1, 1) * jnp.ones((1, 1, 2, 4, 1))
    y, past = step(layer, x, jnp.full((1, 1, 1, 2, 1), 0.5), first=first)
    np.testing.assert_allclose(
        y[0, :, 0, 0, 0], [1, 111, 11100] if first else [11.5, 1110], rtol=1e-6
    )
    np.testing.assert_array_equal(past, x[:, -1:, :1, :2])


def test_doubling_frames_alternates_the_two_halves_of_the_channels():
    layer = drawn(lambda: vae_layers.Upsample(2, temporal=True, rngs=nnx.Rngs(0)))
    layer.time_conv.kernel[...] = jnp.zeros((3, 1, 1, 2, 4))
    layer.time_conv.bias[...] = jnp.asarray([1.0, 2.0, 3.0, 4.0])
    past, _ = layer.start((1, 1, 1))
    x, _ = layer.lengthen(jnp.full((1, 3, 1, 1, 2), 9.0), past, first=True)
    np.testing.assert_array_equal(x[0, :, 0, 0], [[9, 9], [1, 2], [3, 4], [1, 2], [3, 4]])


def test_the_first_latent_enters_no_convolution_in_time():
    layer = drawn(lambda: vae_layers.Upsample(4, temporal=True, rngs=nnx.Rngs(0)))
    past, size = layer.start((1, 2, 3))
    x = noise(1, 3, 2, 3, 4)
    alone, untouched = step(layer, x[:, :1], past, first=True)
    whole, after = step(layer, x, past, first=True)
    other, _ = step(layer, x.at[:, 0].add(1.0), past, first=True)
    assert (size, alone.shape, whole.shape) == ((1, 4, 6), (1, 1, 4, 6, 2), (1, 5, 4, 6, 2))
    np.testing.assert_array_equal(untouched, jnp.zeros_like(past))
    np.testing.assert_array_equal(after, x[:, 1:])
    np.testing.assert_array_equal(whole[:, 1:], other[:, 1:])
    np.testing.assert_allclose(
        step(layer, x[:, 1:2], past, first=False)[0], whole[:, 1:3], atol=1e-6
    )


def test_attention_stays_within_a_frame_and_adds_to_it():
    layer = drawn(lambda: vae_layers.Attention(6, nnx.Rngs(0)))
    x = noise(2, 3, 2, 5, 6)
    y, _ = step(layer, x, (), first=True)
    other, _ = step(layer, x.at[0, 1].add(noise(2, 5, 6, seed=1)), (), first=True)
    changed = np.abs(y - other).max((2, 3, 4)) > 0
    np.testing.assert_array_equal(changed, [[False, True, False], [False, False, False]])
    layer.proj.kernel[...] = jnp.zeros_like(layer.proj.kernel[...])
    added = step(layer, x, (), first=True)[0] - x
    np.testing.assert_allclose(added, jnp.broadcast_to(layer.proj.bias[...], x.shape), atol=1e-6)


# Names ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vae_tiny", "vae_realflags"])
def test_weights_go_there_and_back_unchanged(name):
    file = golden(name)
    tensors = weights(file.arrays)
    shapes = {key: tensor.shape for key, tensor in tensors.items()}
    back = rules.invert(pytrees.flatten(file.vae), wan_vae.WAN_VAE, shapes)
    assert back.keys() == tensors.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(back[key], tensor, err_msg=key)


def test_diffusers_names_are_those_of_its_own_converter():
    given = golden("diffusers_vae_tiny").meta["name_map_original_to_diffusers"]["vae_tiny"]
    assert wan_vae.diffusers_names(golden("vae_tiny").vae.cfg) == given


def test_full_size_has_the_originals_tensors():
    cfg = VAEConfig()
    shapes = wanted(cfg)
    names = wan_vae.diffusers_names(cfg)
    assert (len(shapes), sum(math.prod(shape) for shape in shapes.values())) == (194, 126_892_531)
    assert len(set(names)) == len(set(names.values())) == 194
    assert shapes["encoder/down/6/shortcut/kernel"] == (1, 1, 1, 192, 384)
    assert shapes["decoder/up/7/time_conv/kernel"] == (3, 1, 1, 384, 768)
    assert (
        names["decoder.upsamples.11.resample.1.weight"]
        == "decoder.up_blocks.2.upsamplers.0.resample.1.weight"
    )
    assert (
        names["decoder.upsamples.14.residual.6.bias"] == "decoder.up_blocks.3.resnets.2.conv2.bias"
    )


def test_configs_are_read_from_both_sources():
    assert golden("vae_realflags").vae.cfg == VAEConfig(dim=6)
    diffusers = golden("diffusers_vae_tiny").meta["config"]
    assert (
        wan_vae.vae_config(diffusers).mean == (0.0,) * 4
    )  # sixteen means are given for four channels
    real = wan_vae.vae_config(diffusers | {"z_dim": 16})
    assert real.mean == WAN_MEAN
    assert set(wan_vae.unscaled(real).std) == {1.0}


@pytest.mark.parametrize(
    "other", [{"is_residual": True}, {"patch_size": 2}, {"decoder_base_dim": 16}]
)
def test_other_architectures_are_refused(other):
    with pytest.raises(InputError, match=next(iter(other))):
        wan_vae.vae_config(golden("diffusers_vae_tiny").meta["config"] | other)
