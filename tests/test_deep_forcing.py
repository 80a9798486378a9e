"""Deep Forcing: which tokens stay when the window is full, where they and the sink stand, and what that looks like."""

import dataclasses
import functools
import json
import pathlib
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from packforcing_jax import methods
from packforcing_jax.cli.main import main
from packforcing_jax.config import CacheConfig, loading
from packforcing_jax.errors import InputError
from packforcing_jax.memory import cache, tokens
from packforcing_jax.memory import layout as layouts
from packforcing_jax.methods import calls
from packforcing_jax.methods.method import Method, applied, memory_of, sized
from packforcing_jax.networks import rope
from packforcing_jax.sampling import player
from packforcing_jax.sampling.pipeline import Pipeline
from packforcing_jax.types import KV
from packforcing_jax.verify import kinds

RECORDED = (
    pathlib.Path(__file__).parent / "golden" / "methods" / "deep_forcing_variants.safetensors"
)
RED = "a red disc walks slowly before the moss curtain in scene one"
PASSES = 3  # of a block, the commit among them


def memory(block, sink, window, budget, recent, **settings):
    return CacheConfig(
        block=block,
        sink=sink,
        recent=window - sink - block,
        top=0,
        capacity=0,
        rope_adjustment="sink_only",
        budget=budget,
        budget_recent=recent,
        key_multiple=5,
        **settings,
    )


SIZES = {
    "published": memory(3, 10, 21, 16, 4),
    "sink alone": memory(3, 10, 21, 21, 11),
    "no multiple of the block": memory(2, 5, 15, 11, 3),
    "sink alone, no multiple": memory(2, 5, 15, 15, 10),
    "every block": memory(2, 2, 9, 8, 3),
    "recent longer than two blocks": memory(2, 3, 14, 11, 5),
    "single frames": memory(1, 3, 9, 6, 2),
}


# When, and where the sink goes: by the sentences of the method, block after block


def told(cfg, blocks):
    """(whether the window is compressed, frames seen, the sink's position) of each block, by going through them."""
    held, shift, last = 0, 0, None
    for block in range(blocks):
        due = held + cfg.block > cfg.full_frames
        if due:
            held = cfg.budget - cfg.block
            wanted = block * cfg.block - (cfg.budget - cfg.sink) - cfg.sink
            shift += cfg.full_frames - cfg.budget if last is None else wanted - last
            last = wanted
        yield due, held, shift
        held += cfg.block


@pytest.mark.parametrize("cfg", SIZES.values(), ids=SIZES)
def test_counters_alone_say_when_a_window_is_full_and_where_the_sink_goes(cfg):
    for block, (due, seen, shift) in enumerate(told(cfg, 40)):
        progress = layouts.begin(block)
        now, layout = layouts.compression(cfg, progress), layouts.layout(cfg, progress)
        assert (bool(now.due), int(now.seen)) == (due, seen)
        assert int(layout.sink + layout.chosen + layout.recent) == seen <= cfg.full_frames
        assert int(layout.sink_position) == shift
        before = layouts.compression(cfg, layouts.begin(max(block - 1, 0)))
        assert int(now.held) == (int(before.seen) + cfg.block if block else 0)


def test_a_cut_begins_a_window_anew():
    cfg = SIZES["published"]
    progress = layouts.cut(cfg, layouts.begin(20))
    for block, (due, seen, shift) in enumerate(told(cfg, 12)):
        now, layout = layouts.compression(cfg, progress), layouts.layout(cfg, progress)
        assert (bool(now.due), int(now.seen)) == (due, seen)
        assert int(layout.sink_position) == 60 + shift
        assert int(layout.start) == 60 + 3 * block
        progress = progress.after_block()


# Who stays: numbered tokens against a slow memory


@dataclasses.dataclass
class Token:
    number: int
    key: np.ndarray  # [n, h] without its position in time
    position: float
    count: int = 0


def rotated(spec, token):
    """A token's key at its position in time."""
    time, _, _ = spec.pairs
    turn = np.exp(1j * token.position * rope.frequencies(time, spec.rope_theta[0]))
    pairs = token.key.astype(np.float64).reshape(len(token.key), -1, 2)
    pairs = pairs[..., 0] + 1j * pairs[..., 1]
    pairs[:, :time] *= turn
    return np.stack([pairs.real, pairs.imag], axis=-1).reshape(token.key.shape)


def slow(cfg, spec, blocks, made):
    """The tokens that each block sees, from the keys and queries [block, ...] of `made`, one token at a time."""
    s, size = spec.tokens_per_frame, cfg.block
    window, queries, shift, place = [], [], 0.0, None
    scale = spec.head_dim**-0.5 / spec.heads

    for block, (due, _, moved) in enumerate(told(cfg, blocks)):
        keys, asked = made[block]
        queries += list(asked[0])
        if due:
            recent = (cfg.budget_recent - size) * s
            first, until = cfg.sink * s, len(window) - recent
            pool = np.stack(queries[-cfg.budget_recent * s :])
            scores = {}
            for i in range(first, until):
                products = np.einsum("qnh,nh->q", pool, rotated(spec, window[i]))
                scores[i] = (products.sum() if cfg.fusion == "sum" else products.max()) * scale
                if cfg.reuse_limit and window[i].count >= cfg.reuse_limit:
                    scores[i] = -np.inf
            best = sorted(sorted(scores, key=lambda i: -scores[i])[: cfg.chosen * s])
            for row, i in enumerate(best):
                window[i].count += 1
                start = block * size - cfg.budget_recent - cfg.chosen
                if cfg.token_positions == "token":
                    window[i].position = start + row // s
                elif cfg.token_positions == "segment" and place is not None:
                    window[i].position += start - place
            place = block * size - cfg.budget_recent - cfg.chosen
            window = window[:first] + [window[i] for i in best] + window[until:]
            for token in window[:first]:
                token.position += moved - shift
            shift = moved
        yield [dataclasses.replace(token) for token in window]
        for each in asked[1:]:
            queries += list(each)
        for i, key in enumerate(keys):
            number = block * size * s + i
            window.append(Token(number, key, float(number // s)))


@functools.partial(tiny.jit, static_argnums=0)
def block_of(spec, memory, keys, queries):
    """(the memory that a block sees, the memory behind it), its values the numbers of its tokens."""
    now = layouts.layout(spec.cache, memory.progress)
    compression = layouts.compression(spec.cache, memory.progress)
    following = layouts.layout(spec.cache, memory.progress.after_block())
    (layer,) = memory.layers
    layer = tokens.asked(spec, now, layer, queries[0])
    layer, _ = tokens.compressed(spec, now, compression, layer)
    seen = layer
    for each in queries[1:]:
        layer = tokens.asked(spec, now, layer, each)
    first = now.start * spec.tokens_per_frame
    values = jnp.broadcast_to(
        (first + jnp.arange(keys.shape[1]))[None, :, None, None].astype(jnp.float32), keys.shape
    )
    times = rope.time_angles(layouts.current_times(spec, now, spec.cache.block), spec)
    own = KV(k=rope.rotate(keys, times), v=values)
    layer = dataclasses.replace(layer, view=cache.extend(layer.view, own, tokens.end(spec, now)))
    layer = tokens.committed(spec, now, following, layer, keys)
    return seen, dataclasses.replace(memory, layers=[layer], progress=memory.progress.after_block())


def without_positions(spec, cfg, queries, start):
    """Queries [b, block*s, n, h] that, once the block rotates them, are these."""
    s = spec.tokens_per_frame
    times = rope.time_angles(start + jnp.arange(cfg.block * s, dtype=jnp.float32) // s, spec)
    grid = rope.grid(*(np.arange(size) for size in spec.grid), frames=cfg.block)
    return rope.rotate(queries, -times - rope.space_angles(jnp.asarray(grid), spec))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("published", {"reuse_limit": 7}),
        ("no multiple of the block", {"reuse_limit": 2, "token_positions": "token"}),
        ("recent longer than two blocks", {"fusion": "max", "token_positions": "segment"}),
        ("every block", {"reuse_limit": 1}),
        ("sink alone, no multiple", {}),
    ],
)
def test_the_tokens_stay_that_recent_queries_score_highest(name, settings):
    cfg = dataclasses.replace(SIZES[name], **settings)
    exp = dataclasses.replace(tiny.EXP, cache=cfg, latent=(4, 2))
    exp = dataclasses.replace(exp, dit=dataclasses.replace(exp.dit, layers=1))
    spec = exp.memory
    s, blocks = spec.tokens_per_frame, 16
    shape = (cfg.block * s, spec.heads, spec.head_dim)
    made = [
        (np.asarray(tiny.normal(2 * i, *shape)), np.asarray(tiny.normal(2 * i + 1, PASSES, *shape)))
        for i in range(blocks)
    ]
    state = cache.init(spec, 1)
    limit = cfg.reuse_limit or blocks
    for block, expected in enumerate(slow(cfg, spec, blocks, made)):
        keys, asked = made[block]
        queries = [without_positions(spec, cfg, one[None], block * cfg.block) for one in asked]
        seen, state = block_of(spec, state, jnp.asarray(keys)[None], jnp.stack(queries))
        known, count = tokens.record(seen), len(expected)
        numbers = [token.number for token in expected]
        assert known.ids[0, :count].tolist() == numbers
        np.testing.assert_array_equal(seen.view.v[0, :count, 0, 0], numbers)
        assert known.counts[0, :count].tolist() == [token.count for token in expected]
        np.testing.assert_allclose(known.positions[0, :count], [t.position for t in expected])
        turned = [rotated(spec, token) for token in expected]
        np.testing.assert_allclose(seen.view.k[0, :count], turned or seen.view.k[0, :0], atol=2e-5)

        # whatever scores: the sink and the newest frames are whole, and nothing is chosen too often
        frames = np.asarray(numbers) // s
        sink = min(block * cfg.block, cfg.sink)
        assert numbers[: sink * s] == list(range(sink * s))
        newest = range(max(0, block * cfg.block - cfg.budget_recent + cfg.block), block * cfg.block)
        assert all((frames == frame).sum() == s for frame in newest)
        assert known.counts.max() <= limit or name == "every block"  # too few others are there
        assert len(set(numbers)) == count


# Recorded numbers


@pytest.fixture(scope="module")
def recorded():
    return kinds.read(RECORDED), kinds.expected(RECORDED)


def test_a_token_more_or_elsewhere_is_noticed(recorded):
    """The recorded numbers against themselves, one of them changed."""
    fixture, expected = recorded
    assert all(row.ok for row in kinds.compare("", fixture.kind, expected, expected))
    for each in ("first_step", "commit"):
        for key in ("key_index", "key_pos", "query_frame"):
            name = f"layout.{each}.{key}"
            other = expected[name].copy()
            other[(9,) + (1,) * (other.ndim - 1)] += 1
            rows = kinds.compare("", fixture.kind, {**expected, name: other}, expected)
            assert [row.output for row in rows if not row.ok] == ["layout"]
    shuffled = {**expected}
    for key in ("key_index", "key_pos"):
        shuffled[f"layout.commit.{key}"] = expected[f"layout.commit.{key}"][..., ::-1]
    assert all(row.ok for row in kinds.compare("", fixture.kind, shuffled, expected))


def test_a_changed_weight_is_noticed(recorded):
    fixture, expected = recorded
    (name,) = [name for name in fixture.weights if name.endswith("blocks.0.self_attn.q.weight")]
    bent = {**fixture.weights, name: fixture.weights[name] * 1.01}
    short = {**fixture.config, "num_blocks": 1}
    one_block = dataclasses.replace(fixture, config=short, weights=bent, variants={})
    rows = kinds.compare("", fixture.kind, kinds.compute(one_block), expected)
    assert {f"block0.step{i}.x0" for i in range(4)} <= {row.output for row in rows if not row.ok}


# Sizes


def test_at_full_size_blocks_attend_what_was_published(capsys):
    flags = ["--config", "wan_t2v_1_3b", "--method", "deep-forcing", "--blocks", "60"]
    assert main(["layout", *flags, "--json"]) == 0
    steps = json.loads(capsys.readouterr().out)["steps"]
    sizes = [step["tokens"] for step in steps]
    assert sizes[:7] == [4_680 * n for n in range(1, 8)]
    assert sizes[7:] == [24_960, 29_640] * 26 + [24_960]
    for step in steps[7:]:
        (chosen,) = [key for key in step["keys"] if key["frames"] is None]
        assert (chosen["kind"], chosen["tokens"]) == ("mid", 3_120)
        assert step["tokens"] == sum(key["tokens"] for key in step["keys"])
    assert main(["layout", *flags]) == 0
    assert "3,120 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "sizes"), [("deep-forcing", (8, 20, 16, 4)), ("deep-sink", (8, 20, 20, 12))]
)
def test_on_stage_everything_keeps_its_share_of_the_window(name, sizes):
    cfg = applied(methods.METHODS[name], loading.load_experiment("stage")).cache
    assert (cfg.sink, cfg.full_frames, cfg.budget, cfg.budget_recent) == sizes
    own = dataclasses.replace(loading.load_experiment("wan_t2v_1_3b").cache, block=1)
    assert sized(methods.METHODS[name], own) == methods.METHODS[name]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("deep-forcing", []),
        ("deep-forcing", ["cache.fusion=max", "cache.recent=7"]),
        ("deep-sink", []),
    ],
)
def test_a_plan_counts_what_its_formulas_say(name, settings, capsys):
    flags = [flag for each in settings for flag in ("--set", each)]
    assert main(["plan", "--method", name, "--config", "stage", "--blocks", "13", *flags]) == 0
    assert ", 0 differ" in capsys.readouterr().out


def test_calls_show_what_a_layer_attends_to():
    cfg = memory_of(methods.DEEP_FORCING, tiny.EXP.cache, 3)
    exp = dataclasses.replace(tiny.EXP, cache=cfg)
    for call in calls.calls(exp.memory, methods.DEEP_FORCING, [0] * 12):
        layout = layouts.layout(cfg, layouts.begin(call.block))
        assert call.tokens == int(layouts.length(exp.memory, layout))


# On Stage


@pytest.fixture(scope="module")
def model():
    return Pipeline.from_pretrained(method="deep-forcing", overrides=["sample.steps=(1000, 400)"])


def compiled() -> int:
    programs: Any = (player.denoise_program, player.commit_program)
    return sum(program._cache_size() for program in programs)


def test_a_video_goes_on_from_a_state_as_if_it_had_never_stopped(model):
    before = compiled()
    whole = [block.latent for block in model.stream([RED] * 10, seed=3)]
    state = list(islice(model.stream([RED] * 10, seed=3), 6))[-1].state
    kept = jax.tree.map(np.asarray, player.strip_scratch(model, state))
    form = player.abstract_state(model)
    ours, theirs = ([(x.shape, x.dtype) for x in jax.tree.leaves(tree)] for tree in (kept, form))
    assert ours == theirs
    state = player.with_scratch(model, kept)
    rest = [block.latent for block in model.stream([RED] * 10, state=state)]
    np.testing.assert_array_equal(rest, whole[6:])
    assert compiled() - before == 2  # denoising and committing, once each


def test_a_cut_forgets_and_what_takes_frames_out_is_refused(model):
    blocks = list(model.stream([RED] * 8, seed=3, changes={6: "cut"}))
    assert (blocks[5].layout["chosen"], blocks[6].layout["sink"]) == (4, 0)
    assert all(np.isfinite(block.latent).all() for block in blocks)
    with pytest.raises(InputError, match="block 6: 'flush' takes whole frames out"):
        model.stream([RED] * 8, changes={6: "flush"})
    with pytest.raises(InputError, match="choose one of keep, cut"):
        Method("mine", "", settings={"budget": 16}, at_prompt_change="recache")


# Wrong use


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("cache.budget=22", "no more than the window of 21 frames"),
        ("cache.budget_recent=2", "at least a block of 3"),
        ("cache.budget_recent=7", "must hold sink=10 and budget_recent=7"),
        ("cache.rope_adjustment=none", "behind a sink that moves alone"),
        ("cache.fusion=summ", "did you mean sum"),
        ("cache.token_positions=all", "choose one of none, token, segment"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(setting, sentence):
    own = applied(methods.DEEP_FORCING, loading.load_experiment("wan_t2v_1_3b"))
    with pytest.raises(InputError, match=sentence):
        loading.override(own, [setting])


def test_a_trace_is_refused(tmp_path, capsys):
    files = ["--trace", str(tmp_path / "t"), "--out", str(tmp_path / "a.mp4")]
    assert main(["sample", "--method", "deep-forcing", "--blocks", "2", *files]) == 2
    assert "makes or keeps them otherwise" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
