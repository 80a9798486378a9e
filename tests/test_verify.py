"""Every reference file passes, and none passes with a weight, an output or a number of it changed."""

import dataclasses
import functools
import json
import math
import pathlib
import re

import einops
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from safetensors.numpy import load_file, save_file

from packforcing_jax.cli import main
from packforcing_jax.config import DiTConfig
from packforcing_jax.errors import InputError
from packforcing_jax.memory import cache, view
from packforcing_jax.memory import layout as layouts
from packforcing_jax.types import KV
from packforcing_jax.verify import kinds, parts, transformer

GOLDEN = pathlib.Path(__file__).parent / "golden"
FILES = sorted(
    path for path in GOLDEN.glob("*.safetensors") if kinds.read(path).kind in kinds.CASES
)
ONE_PERCENT = np.float32(1.01)


@functools.cache
def computed(path):
    """What the file asks for and our answer, once for all tests."""
    fixture = kinds.read(path)
    return fixture, kinds.compute(fixture), kinds.expected(path)


def compared(path, *, ours=None, theirs=None):
    fixture, answer, right = computed(path)
    ours = answer if ours is None else ours
    theirs = right if theirs is None else theirs
    return kinds.compare(path.name, fixture.kind, ours, theirs)


def failed(rows):
    return {row.output for row in rows if not row.ok}


def changed(value):
    """`value` off by one percent, or by one if it counts."""
    return value + 1 if np.issubdtype(value.dtype, np.integer) else value * ONE_PERCENT


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_reference_file_passes(path):
    rows = compared(path)
    assert [row.output for row in rows] == sorted(computed(path)[2])
    assert failed(rows) == set(), max(rows, key=lambda row: row.error)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_changed_output_is_noticed_and_no_other(path):
    theirs = computed(path)[2]
    for name, value in theirs.items():
        assert failed(compared(path, theirs=theirs | {name: changed(value)})) == {name}
        if value.dtype.kind == "f":
            one = value.copy()
            one.flat[np.abs(value).argmax()] = np.nan
            assert failed(compared(path, theirs=theirs | {name: one})) == {name}


def with_weight(path, name, factor):
    """The rows of the file once one weight is multiplied by `factor`."""
    fixture = computed(path)[0]
    weights = {**fixture.weights, name: fixture.weights[name] * factor}
    return compared(path, ours=kinds.compute(dataclasses.replace(fixture, weights=weights)))


WEIGHED = [path for path in FILES if kinds.read(path).weights]
NORMED = re.compile(
    r".*(self_attn\.|attn1\.to_)[qk]\.(weight|bias)"
)  # the norm behind these forgets their scale


@pytest.mark.parametrize("path", WEIGHED, ids=lambda path: path.stem)
def test_a_weight_scaled_by_one_percent_is_noticed(path):
    names = sorted(name for name in computed(path)[0].weights if not NORMED.fullmatch(name))
    count = 2 if "vae" in path.stem else 8  # what takes longer gets fewer draws
    for name in np.random.default_rng(len(path.stem)).choice(names, count, replace=False):
        assert failed(with_weight(path, name, ONE_PERCENT)), f"{name} scaled by 1.01 went unnoticed"


@pytest.mark.parametrize("path", WEIGHED, ids=lambda path: path.stem)
def test_a_weight_before_a_norm_is_noticed_when_its_channels_change(path):
    for name in sorted(filter(NORMED.fullmatch, computed(path)[0].weights))[::3]:
        odd = np.arange(computed(path)[0].weights[name].shape[0], dtype=np.float32) % 2
        factor = 1 + 0.1 * odd.reshape(-1, *(1 for _ in computed(path)[0].weights[name].shape[1:]))
        assert failed(with_weight(path, name, factor)), (
            f"{name} with every other channel scaled by 1.1 went unnoticed"
        )


def test_all_kinds_of_files_have_an_example():
    missing = set(kinds.CASES) - {kinds.read(path).kind for path in GOLDEN.glob("**/*.safetensors")}
    same_code = {  # as files that are here: what they add is run by `make verify-methods`
        "method_causal_forcing_chunkwise",
        "method_causal_forcing_longvideo",
        "method_longlive_infinity",
        "method_self_forcing_rolling",
        "method_packforcing_unofficial_compressor",
        "method_packforcing_unofficial_train_rollout",
    }
    assert missing <= {"wan_dit_headdim128"} | same_code, "only what is too large to ship is absent"


def small():
    return GOLDEN / "unipc_solver.safetensors"


def test_an_output_that_is_not_computed_fails_and_one_too_many_is_ignored():
    ours = dict(computed(small())[1])
    dropped = sorted(ours)[0]
    del ours[dropped]
    rows = compared(small(), ours=ours | {"extra": np.zeros(3)})
    assert failed(rows) == {dropped}
    assert math.isinf(next(row.error for row in rows if row.output == dropped))


def test_not_a_number_on_our_side_fails():
    ours = dict(computed(small())[1])
    name = "steps8_shift5.latent_after_each_step"
    ours[name] = np.asarray(ours[name]) * np.nan
    assert failed(compared(small(), ours=ours)) == {name}


@pytest.mark.parametrize(
    ("ours", "theirs", "error"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 2.5], [1.0, 2.0], 0.25),
        ([1.5, -2.0], [1.0, -2.0], 0.25),
        ([1.0], [1.0, 1.0], math.inf),
        ([[1.0]], [1.0], math.inf),
        ([0.0], [0.0], 0.0),
        ([1e-9], [0.0], math.inf),
        ([np.inf], [np.inf], math.inf),
        ([np.nan], [np.nan], math.inf),
        ([1.0], [np.nan], math.inf),
        ([], [], 0.0),
    ],
)
def test_error_is_the_largest_gap_over_the_largest_expected_value(ours, theirs, error):
    assert kinds.difference(np.array(ours), np.array(theirs)) == error


def test_integers_must_agree_exactly_whatever_their_size():
    big = np.array([10**9], np.int64)
    (row,) = kinds.compare("f", "scheduler", {"id": big + 1}, {"id": big})
    assert not row.ok
    assert row.tolerance == 0
    (row,) = kinds.compare("f", "scheduler", {"id": big.astype(np.int32)}, {"id": big})
    assert row.ok


@pytest.mark.parametrize("kind", ["dmd_math", "self_forcing_train_rollout"])
def test_losses_and_gradients_may_be_further_off_than_what_they_are_made_of(kind):
    allowed = {
        name: kinds.CASES[kind].allowed(name)
        for name in computed(GOLDEN / f"{kind}.safetensors")[2]
    }
    derived = {name for name, tolerance in allowed.items() if tolerance == 2e-4}
    assert derived == {name for name in allowed if "loss" in name or "grad" in name}
    assert {allowed[name] for name in allowed.keys() - derived} == {5e-5}


def test_other_kinds_have_one_tolerance():
    for case in kinds.CASES.values():
        if case.derived is None:
            assert (
                case.allowed("grad_wrt_noise")
                == case.allowed("loss")
                == case.allowed("latents")
                == case.tolerance
            )


def test_an_unknown_kind_fails_in_every_output(caplog):
    fixture, ours, theirs = computed(small())
    assert kinds.compute(dataclasses.replace(fixture, kind="novelty")) == {}
    assert "'novelty'" in caplog.text
    rows = kinds.compare("f", "novelty", ours, theirs)
    assert failed(kinds.compare("f", "novelty", {}, theirs)) == {row.output for row in rows}


@pytest.mark.parametrize("spoil", [lambda w: np.full_like(w, np.nan), lambda w: w[..., :-1], None])
def test_weights_that_do_not_convert_fail_the_file_and_say_why(spoil, caplog):
    fixture, _, theirs = computed(GOLDEN / "wan_dit_tiny.safetensors")
    weights = dict(fixture.weights)
    taken = weights.pop("head.head.weight")
    if spoil is not None:
        weights["head.head.weight"] = spoil(taken)
    assert kinds.compute(dataclasses.replace(fixture, weights=weights)) == {}
    assert "head" in caplog.text
    assert failed(kinds.compare("f", fixture.kind, {}, theirs)) == set(theirs)


# files on disk --------------------------------------------------------------------------------------------------------


def rewrite(source, path, *, change=None, **meta):
    """A copy of a reference file with tensors and metadata entries replaced; an entry of None is removed."""
    with safetensors.safe_open(source, "np") as archive:
        told = json.loads(archive.metadata()["meta"]) | meta
    told = {key: value for key, value in told.items() if value is not None}
    save_file(
        load_file(source) | (change or {}),
        path,
        metadata={"meta": json.dumps(told), "format": "pt"},
    )
    return path


def test_the_computation_does_not_see_the_expected_values(tmp_path):
    blank = {
        f"outputs/{name}": np.zeros_like(value) for name, value in computed(small())[2].items()
    }
    hidden = kinds.compute(
        kinds.read(rewrite(small(), tmp_path / "blank.safetensors", change=blank))
    )
    for name, value in computed(small())[1].items():
        np.testing.assert_array_equal(hidden[name], value)


@pytest.mark.parametrize(
    "meta", [{"fixture": None}, {"config": None}, {"fixture": 7}, {"config": "large"}]
)
def test_a_file_that_does_not_say_what_it_is_about_is_refused(meta, tmp_path):
    with pytest.raises(InputError, match="does not say what it is about"):
        kinds.read(rewrite(small(), tmp_path / "mute.safetensors", **meta))


def test_files_without_metadata_or_outputs_are_refused(tmp_path):
    path = tmp_path / "bare.safetensors"
    save_file({"outputs/x": np.ones(2)}, path)
    with pytest.raises(InputError, match="does not say what it is about"):
        kinds.read(path)
    save_file(
        {"inputs/x": np.ones(2)},
        path,
        metadata={"meta": json.dumps({"fixture": "scheduler", "config": {}})},
    )
    with pytest.raises(InputError, match="no tensor under outputs/"):
        kinds.read(path)


@pytest.mark.parametrize(
    "make",
    [
        lambda path: None,
        lambda path: path.mkdir(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("not tensors at all"),
        lambda path: path.write_bytes(small().read_bytes()[:-7]),
    ],
)
def test_an_unreadable_file_is_exit_code_2_and_stops_before_anything_runs(make, tmp_path, capsys):
    make(tmp_path / "x.safetensors")
    assert main.main(["verify", str(small()), str(tmp_path / "x.safetensors")]) == 2
    captured = capsys.readouterr()
    assert "x.safetensors" in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_command_line_prints_one_line_per_output_and_a_count(capsys):
    assert main.main(["verify", str(small())]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    theirs = computed(small())[2]
    assert last == f"{len(theirs)} outputs, 0 failed"
    assert len(lines) == len(theirs)
    for text, name in zip(lines, sorted(theirs), strict=True):
        file, output, error, tolerance, verdict = text.split()
        assert (file, output, verdict) == (str(small()), name, "ok")
        assert 0 <= float(error) <= float(tolerance) <= 5e-5


def test_json_tells_the_same_and_failures_are_exit_code_1(tmp_path, capsys):
    name = "steps8_shift5.sigmas"
    wrong = {
        f"outputs/{name}": computed(small())[2][name] * ONE_PERCENT,
        "outputs/novelty": np.ones(2, np.float32),
    }
    path = rewrite(small(), tmp_path / "wrong.safetensors", change=wrong)
    assert main.main(["verify", str(small()), str(path), "--json"]) == 1
    out = json.loads(
        capsys.readouterr().out, parse_constant=lambda word: pytest.fail(f"{word} is not JSON")
    )
    assert out["failed"] == 2
    assert out["count"] == len(out["outputs"]) == 2 * len(computed(small())[2]) + 1
    assert all(set(row) == {"file", "output", "error", "tolerance", "ok"} for row in out["outputs"])
    bad = {row["output"]: row["error"] for row in out["outputs"] if not row["ok"]}
    assert bad == {name: pytest.approx(0.01, rel=0.02), "novelty": None}
    assert {row["file"] for row in out["outputs"] if not row["ok"]} == {str(path)}


def test_an_unknown_kind_on_the_command_line_is_exit_code_1(tmp_path, capsys):
    path = rewrite(small(), tmp_path / "other.safetensors", fixture="novelty")
    assert main.main(["verify", str(path)]) == 1
    out = capsys.readouterr().out
    assert out.count("FAIL") == len(computed(small())[2])
    assert "inf" in out


# sizes that no file here has ------------------------------------------------------------------------------------------


def rolling(blocks, *, block, window, sink):
    """Self-Forcing's rule on frame numbers: (frames seen by each block, held after it)."""
    held = []
    history = []
    for start in range(0, blocks * block, block):
        over = len(held) + block - window
        if window != -1 and over > 0:
            held = held[:sink] + held[sink + over :]
        history.append((list(held), held := [*held, *range(start, start + block)]))
    return history


WINDOWS = [(3, 10, 1), (2, 5, 0), (4, 13, 6), (2, -1, 3)]


@pytest.mark.parametrize(("block", "window", "sink"), WINDOWS)
def test_cache_settings_see_and_hold_the_frames_of_the_rolling_cache(block, window, sink):
    blocks = 6
    config = {
        "dim": 12,
        "num_heads": 2,
        "ffn_dim": 8,
        "num_layers": 1,
        "in_dim": 5,
        "out_dim": 5,
        "frames_per_block": block,
        "local_attn_size": window,
        "sink_size": sink,
    }
    exp = transformer.experiment(config, frames=blocks * block, latent=(2, 6))
    spec = exp.memory
    memory = cache.init(spec, 1)
    latent = jnp.zeros((1, block, *spec.latent))
    for number, (seen, held) in enumerate(rolling(blocks, block=block, window=window, sink=sink)):
        layout = layouts.layout(exp.cache, memory.progress)
        q = np.zeros((1, block * 3, 2, 6), np.float32)
        no_scores = np.zeros((1, 0), np.float32)
        recalled, _ = view.recall(spec, layout, memory.layers[0], q, no_scores)
        own = number * block + np.arange(block)
        slots = layouts.frame_slots(exp.cache, layout, jnp.asarray(own, jnp.int32))
        length = int(layouts.length(spec, layout)) // 3
        past = np.setdiff1d(
            np.arange(length), np.asarray(slots)
        )  # the rest is the block's own room
        frames = np.asarray(recalled.v[0, :, 0, 0]).reshape(-1, 3)[past]
        assert sorted(frames[:, 0]) == seen
        assert (frames == frames[:, :1]).all()
        frames = np.repeat(np.arange(block) + number * block, 3).astype(np.float32)
        values = jnp.broadcast_to(frames[None, :, None, None], (1, block * 3, 2, 6))
        memory = cache.commit(spec, memory, latent, [KV(k=values, v=values)], None)
        np.testing.assert_array_equal(
            cache.export(spec, memory).v[0, 0, :, 0, 0], np.repeat(held, 3)
        )
        np.testing.assert_array_equal(
            cache.end_indices(spec, memory), [(number + 1) * block * 3, len(held) * 3]
        )


def test_ragged_prompts_are_padded_in_order_of_number():
    texts = {f"context_{i}": np.full((1 + i % 3, 2), i, np.float32) for i in (0, 2, 10, 1)}
    fixture = parts.Fixture(kind="", config={}, weights={}, inputs=texts, wanted=())
    padded = transformer._context(fixture, DiTConfig(text_dim=2, text_len=4))
    np.testing.assert_array_equal(padded[:, 0, 0], [0, 1, 2, 10])
    np.testing.assert_array_equal(padded.sum(axis=(1, 2)), [0, 4, 12, 40])


@pytest.mark.parametrize(
    ("frames", "size", "ends"), [(6, 2, (2, 4, 6)), (7, 3, (3, 6, 7)), (2, 5, (2,))]
)
def test_the_last_block_may_be_shorter(frames, size, ends):
    assert transformer._block_ends(frames, size) == ends


def test_step_counts_and_lists_are_read_from_names():
    names = (
        "shift2.5.inference7.sigmas",
        "shift2.5.denoising_step_list_900_30_warped",
        "shift2.5.step_of_samples_0_2",
    )
    inputs = {
        name: np.ones((3, 2, 5), np.float32)
        for name in ("clean", "noise", "xt", "flow_pred", "x0_pred")
    }
    inputs |= {
        "timestep": np.array([999.0, 40.0, 500.0], np.float32),
        "raw_timestep_int": np.array([3, 980]),
    }
    fixture = parts.Fixture(
        kind="scheduler", config={"shifts": [2.5]}, weights={}, inputs=inputs, wanted=names
    )
    out = kinds.compute(fixture)
    assert set(names) <= set(out)
    assert out[names[0]].shape == (7,)
    assert out[names[1]].shape == (2,)
    assert out[names[2]].shape == (2, 2, 5)


ODD = {
    "dim": 36,
    "num_heads": 3,
    "ffn_dim": 20,
    "num_layers": 3,
    "text_dim": 10,
    "text_len": 7,
    "freq_dim": 14,
    "in_dim": 5,
    "out_dim": 5,
    "frames_per_block": 2,
    "local_attn_size": -1,
    "sink_size": 0,
}


def odd_weights(draw):
    """Random weights of the network `ODD` under original names, the shapes worked out from its sizes."""
    dim = ODD["dim"]
    ffn = ODD["ffn_dim"]
    dense = {
        "text_embedding.0": (dim, ODD["text_dim"]),
        "text_embedding.2": (dim, dim),
        "head.head": (20, dim),
        "time_embedding.0": (dim, ODD["freq_dim"]),
        "time_embedding.2": (dim, dim),
        "time_projection.1": (6 * dim, dim),
    }
    shapes = {
        "patch_embedding.weight": (dim, 5, 1, 2, 2),
        "patch_embedding.bias": (dim,),
        "head.modulation": (1, 2, dim),
    }
    for block in (f"blocks.{i}" for i in range(ODD["num_layers"])):
        shapes |= {
            f"{block}.modulation": (1, 6, dim),
            f"{block}.norm3.weight": (dim,),
            f"{block}.norm3.bias": (dim,),
        }
        shapes |= {
            f"{block}.{a}_attn.norm_{x}.weight": (dim,) for a in ("self", "cross") for x in "qk"
        }
        dense |= {f"{block}.{a}_attn.{x}": (dim, dim) for a in ("self", "cross") for x in "qkvo"}
        dense |= {f"{block}.ffn.0": (ffn, dim), f"{block}.ffn.2": (dim, ffn)}
    for name, shape in dense.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return {name: (0.3 * draw(shape)).astype(np.float32) for name, shape in shapes.items()}


def test_cached_blocks_equal_one_teacher_forced_pass_at_odd_sizes():
    draw = np.random.default_rng(5).standard_normal
    clips = {
        name: draw((3, 2, 5, 2, 4, 6)).astype(np.float32) for name in ("noisy", "clean")
    }  # [block, b, c, t, y, x]
    shared = {"context": draw((2, 7, 10)).astype(np.float32)}
    times = np.array([[990, 12.5], [625, 625], [3, 800]], np.float32)
    cached = parts.Fixture(
        kind="causal_dit_kvcache",
        config=ODD,
        weights=odd_weights(draw),
        inputs=clips | shared | {"t": times},
        wanted=(),
    )
    whole = {
        name: einops.rearrange(clip, "block b c t y x -> b c (block t) y x")
        for name, clip in clips.items()
    }
    parallel = dataclasses.replace(
        cached,
        kind="causal_dit_blockmask",
        inputs=whole | shared | {"t": np.tile(times.reshape(1, 6), (2, 1))},
    )
    ours = kinds.compute(cached)
    theirs = kinds.compute(parallel)
    flows = np.concatenate([ours[f"block{block}.flow_noisy"] for block in range(3)], axis=2)
    assert kinds.difference(flows, np.asarray(theirs["flow_teacher_forcing"])) < 1e-5
    assert ours["block2.after_clean.kv.2.k"].shape == (2, 36, 3, 12)
