"""A model folder becomes video, block by block: the same whatever follows, compiled once, stopped when broken."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from packforcing_jax import pytrees
from packforcing_jax.errors import InputError, MachineError
from packforcing_jax.sampling import pipeline, player

RED = "a red disc"
BLUE = "the blue figure walks"
LIME = "lime square"


@pytest.fixture(scope="session")
def pipe(folder):
    return pipeline.Pipeline.from_pretrained(folder)


def copied(state):
    """A state that the next block of its own run cannot touch."""
    return jax.tree.map(np.array, state)


def latents(pipe, prompts, **how):
    return np.stack([block.latent for block in pipe.stream(prompts, **how)])


def test_a_folder_comes_back_as_it_was_saved(pipe):
    assert pipe.experiment == tiny.EXP
    saved = pytrees.flatten(tiny.apart())
    loaded = pytrees.flatten(pipe.nets)
    assert saved.keys() == loaded.keys()
    for name, leaf in saved.items():
        np.testing.assert_array_equal(leaf, loaded[name], err_msg=name)


def test_blocks_say_what_they_are(pipe):
    blocks = list(pipe.stream([RED, RED, BLUE, BLUE, BLUE], seed=4))
    assert [block.index for block in blocks] == [0, 1, 2, 3, 4]
    assert [block.prompt for block in blocks] == [RED, RED, BLUE, BLUE, BLUE]
    assert all(
        block.frames.shape == (3, 16, 8, 3) and abs(block.frames).max() <= 1 for block in blocks
    )
    assert (blocks[1].block_ids == -1).all()  # nothing is packed yet
    assert [set(block.block_ids.ravel().tolist()) for block in blocks[3:]] == [{1, -1}, {1, 2}]


def test_a_longer_run_begins_with_the_shorter_one(pipe):
    """Bit for bit, and a changed later prompt leaves what came before alone."""
    long = latents(pipe, [RED] * 6 + [BLUE] * 5, seed=2)
    np.testing.assert_array_equal(long[:7], latents(pipe, [RED] * 6 + [BLUE], seed=2))
    other = latents(pipe, [RED] * 6 + [LIME] * 2, seed=2)
    np.testing.assert_array_equal(long[:6], other[:6])
    assert (long[6] != other[6]).any()


def test_two_prompts_in_two_orders_give_the_same_videos(pipe):
    there = [latents(pipe, [prompt] * 4) for prompt in (RED, BLUE)]
    back = [latents(pipe, [prompt] * 4) for prompt in (BLUE, RED)][::-1]
    np.testing.assert_array_equal(there, back)
    assert (there[0] != there[1]).any()


def test_noise_follows_the_seed_and_the_first_prompt_unless_told_otherwise(pipe):
    same = latents(pipe, [RED] * 2, seed=1, identity=pipeline.video_id(RED))
    np.testing.assert_array_equal(same, latents(pipe, [RED] * 2, seed=1))
    for changed in ({"seed": 2}, {"seed": 1, "identity": 77}):
        assert (latents(pipe, [RED] * 2, **changed) != same).any()
    assert pipeline.video_id("  a   red disc ") == pipeline.video_id(RED) != pipeline.video_id(BLUE)


def test_one_compilation_serves_every_block(pipe):
    """Warm-up, saturation of every partition, and changes of prompt."""
    jitted = (player.denoise_program, player.commit_program, player.text_program)
    latents(pipe, [RED])
    before = [function._cache_size() for function in jitted]
    latents(pipe, [RED] * 7 + [BLUE] * 7 + [LIME] * 6, seed=9)
    assert [function._cache_size() for function in jitted] == before


def test_a_state_can_be_kept_and_continued(pipe):
    def run(state, first, count):
        found = []
        for _ in range(first, first + count):
            state, block = player.next_block(pipe, state, words)
            found.append(np.asarray(block.latent))
        return state, found

    words = pipe.text_kv([RED, BLUE])
    start = {"seed": 3, "videos": [5, 8]}
    _, whole = run(pipe.start(**start), 0, 7)
    half, first = run(pipe.start(**start), 0, 4)
    _, second = run(copied(half), 4, 3)
    np.testing.assert_array_equal(whole, first + second)


PROMPTS = [RED] * 4 + [BLUE] * 5
SETTINGS = {"plain": [], "incremental": ["cache.rope_adjustment=incremental"]}


@pytest.fixture(scope="module")
def streams(pipe):
    """For each of `SETTINGS`: the model, its blocks of one video, and copies of the state after each."""
    found = {}
    for name, overrides in SETTINGS.items():
        model = pipe.with_settings(overrides)
        pairs = [(block, copied(block.state)) for block in model.stream(PROMPTS, seed=3)]
        found[name] = (model, *zip(*pairs, strict=True))
    return found


@pytest.mark.parametrize(("name", "after"), [("plain", 0), ("plain", 6), ("incremental", 6)])
def test_a_stream_goes_on_from_the_state_a_block_left(streams, name, after):
    model, whole, states = streams[name]
    rest = list(model.stream(PROMPTS, state=copied(states[after])))  # which knows its seed
    assert [block.index for block in rest] == list(range(after + 1, len(PROMPTS)))
    for block, expected in zip(rest, whole[after + 1 :], strict=True):
        assert (block.prompt, block.layout, block.sink_sum) == (
            expected.prompt,
            expected.layout,
            expected.sink_sum,
        )
        for field in ("frames", "latent", "block_ids", "scores", "positions"):
            np.testing.assert_array_equal(
                getattr(block, field), getattr(expected, field), err_msg=field
            )
    assert len({block.block_ids.tobytes() for block in rest}) > 1


def test_a_state_at_the_end_of_its_prompts_has_nothing_left_to_draw(streams):
    model, _, states = streams["plain"]
    assert list(model.stream(PROMPTS, state=copied(states[-1]))) == []


@pytest.mark.parametrize("name", SETTINGS)
def test_the_sinks_checksum_stays_once_the_sink_is_full(streams, name):
    model, blocks, _ = streams[name]
    assert (
        model.experiment.cache.sink == model.experiment.cache.block
    )  # full behind the first block
    assert len({block.sink_sum for block in blocks}) == 1
    assert blocks[0].sink_sum > 0


def test_the_sinks_checksum_tells_other_videos_apart(pipe):
    assert len({next(pipe.stream([RED], seed=seed)).sink_sum for seed in range(4)}) == 4


@pytest.mark.parametrize(
    ("name", "kept"), [("plain", ["view/k", "view/v"]), ("incremental", ["view/v"])]
)
def test_one_number_of_the_sink_changes_its_checksum_and_none_of_another_store_does(
    streams, name, kept
):
    model, blocks, states = streams[name]
    memory = states[-1].memory
    exp = model.experiment
    sink = exp.cache.sink * exp.tokens_per_frame
    for path, token in (("view/k", 1), ("view/v", sink - 1), ("view/k", sink), ("packed/k", 0)):
        changed = copied(memory)
        store, part = path.split("/")
        numbers = getattr(getattr(changed.layers[1], store), part)
        numbers[0, token, ..., 2, 3] = np.nextafter(numbers[0, token, ..., 2, 3], np.float32(9))
        same = (
            int(player.sink_sums(exp.memory, changed)[0])
            == int(player.sink_sums(exp.memory, memory)[0])
            == blocks[-1].sink_sum
        )
        assert same == (path not in kept or token >= sink), path


@pytest.mark.parametrize("name", SETTINGS)
def test_partitions_lie_behind_one_another_without_a_hole(streams, name):
    model, blocks, _ = streams[name]
    cfg = model.experiment.cache
    for block in blocks:
        layout = block.layout
        count = int(block.layout["num_selected"])
        assert layout["block"] == layout["step"] == 3
        assert layout["mid_position"] == layout["sink_position"] + layout["sink"]
        assert layout["recent_position"] == layout["mid_position"] + count * layout["step"]
        assert layout["current_position"] == layout["recent_position"] + layout["recent"]
        begin = (
            block.index * 3 if cfg.rope_adjustment == "incremental" else layout["current_position"]
        )
        assert layout["current_position"] == begin
        assert layout["sink_position"] == 0 or cfg.rope_adjustment == "incremental"
        np.testing.assert_array_equal((block.block_ids >= 0).sum(axis=1), count)
        in_row = np.broadcast_to(layout["mid_position"] + 3 * np.arange(count), (2, count))
        np.testing.assert_array_equal(block.positions[:, :count], in_row)
        assert np.isfinite(block.scores[:, :count]).all()
    assert max(int(block.layout["num_selected"]) for block in blocks) == cfg.top


def test_keys_left_turned_in_place_show_the_same_video(streams):
    """`incremental`, its memory donated from block to block, against a memory that turns every key afresh."""
    dropped = 0
    for one, other in zip(streams["plain"][1], streams["incremental"][1], strict=True):
        np.testing.assert_array_equal(one.block_ids, other.block_ids)
        np.testing.assert_allclose(one.latent, other.latent, atol=1e-4)
        dropped += (np.diff(one.block_ids, axis=-1) > 1).sum()
    assert dropped > 0
    first, second = (
        layer.packed_positions for layer in streams["incremental"][2][-1].memory.layers
    )
    assert (first != second).any()  # layers that chose differently turned differently


def test_videos_of_a_batch_do_not_meet(pipe):
    def drawn(prompts, videos):
        state = pipe.start(seed=3, videos=videos)
        found = []
        for _ in range(5):
            state, block = player.next_block(pipe, state, pipe.text_kv(prompts))
            found.append(np.asarray(block.latent))
        return np.stack(found)

    pair = drawn([RED, BLUE], [5, 8])
    np.testing.assert_allclose(pair[:, ::-1], drawn([BLUE, RED], [8, 5]), atol=1e-5)
    np.testing.assert_allclose(pair[:, :1], drawn([RED], [5]), atol=1e-5)


def test_a_broken_model_stops_before_its_block_is_shown(pipe):
    nets = jax.tree.map(lambda leaf: leaf * np.nan, pipe.nets)
    with pytest.raises(MachineError, match="Frame 0 holds values that are not finite"):
        next(dataclasses.replace(pipe, nets=nets).stream([RED]))


def test_every_prompt_is_checked_before_the_first_block(pipe):
    for prompts, named in (
        ([RED, "a purpel disc"], "purpel"),
        ([RED, " "], "empty"),
        ([], "at least one block"),
    ):
        with pytest.raises(InputError, match=named):
            pipe.stream(prompts)


def test_generate_is_the_stream_in_one_piece(pipe):
    whole = pipe.generate([RED, BLUE], seed=6)
    np.testing.assert_array_equal(
        whole, np.concatenate([b.frames for b in pipe.stream([RED, BLUE], seed=6)])
    )


def test_memory_profiles_are_names(pipe):
    own = pipe.experiment.cache
    changed = dataclasses.replace(own, top=0, capacity=0)
    assert pipe.with_memory("no-mid").experiment.cache == changed
    for wrong, remedy in (("papre", "did you mean paper"), ("qqq", "known: .*no-mid")):
        with pytest.raises(InputError, match=f"'{wrong}' is unknown; {remedy}"):
            pipe.with_memory(wrong)


def test_settings_change_the_experiment_and_keep_the_weights(pipe):
    changed = pipe.with_settings(["cache.top=1"])
    assert changed.experiment.cache.top == 1
    kept = zip(jax.tree.leaves(changed.nets), jax.tree.leaves(pipe.nets), strict=True)
    assert all(mine is theirs for mine, theirs in kept)
    with pytest.raises(InputError, match="tpo"):
        pipe.with_settings(["cache.tpo=1"])


@pytest.mark.parametrize(("seconds", "blocks"), [(0.1, 1), (0.6, 1), (0.61, 2), (7.0, 12)])
def test_a_length_in_seconds_is_rounded_up_to_blocks(seconds, blocks):
    assert pipeline.blocks_of(tiny.EXP, seconds) == blocks  # 3 frames a block, 5 a second


@pytest.mark.parametrize("seconds", [0, -2.0, float("nan"), float("inf")])
def test_a_length_that_is_none_is_refused(seconds):
    with pytest.raises(InputError, match="is not a length"):
        pipeline.blocks_of(tiny.EXP, seconds)


# Number formats


def bits(pipe, blocks=3):
    return [block.latent for block in pipe.stream(["a red disc"] * blocks, seed=4)]


def test_weights_cast_when_used_are_weights_cast_when_read(pipe):
    held = bits(pipe.with_settings(["dtypes.params=bfloat16", "dtypes.compute=bfloat16"]))
    used = bits(pipe.with_settings(["dtypes.compute=bfloat16"]))
    for one, other, exact in zip(held, used, bits(pipe), strict=True):
        # Two programs, of which one casts: the last bit of float32 may differ (1.2e-7 was seen).
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)
        assert 1e-4 < np.abs(one - exact).max() < 0.5


def test_keys_and_values_are_stored_as_asked(pipe):
    model = pipe.with_settings(["dtypes.cache=bfloat16"])
    state = model.start(seed=0, videos=[3])
    kept = [(each.view, each.packed, each.sink, each.recent) for each in state.memory.layers]
    assert {leaf.dtype for leaf in jax.tree.leaves(kept)} == {jnp.dtype(jnp.bfloat16)}
    for rounded, exact in zip(bits(model), bits(pipe), strict=True):
        assert rounded.dtype == exact.dtype
        assert np.abs(rounded - exact).max() < 0.5
    assert np.abs(bits(model)[2] - bits(pipe)[2]).max() > 0


@pytest.mark.parametrize("prompts", [RED, "", [RED, 3], [None], b"a red disc"], ids=repr)
def test_one_string_is_no_list_of_prompts(pipe, prompts):
    with pytest.raises(InputError, match=r"is no list of prompts.*\[prompt\] \* blocks"):
        pipe.stream(prompts)
    with pytest.raises(InputError, match="is no list of prompts"):
        pipe.generate(prompts)


@pytest.mark.parametrize("seed", [1.5, -1, 2**32, 10**30, True, "7", np.float32(1)], ids=repr)
def test_a_seed_is_a_whole_number_of_32_bits(pipe, seed):
    with pytest.raises(InputError, match=r"seed=.* must be a whole number from 0 to 4294967295"):
        pipe.stream([RED], seed=seed)
    with pytest.raises(InputError, match="a video's id=.* must be a whole number"):
        pipe.stream([RED], identity=seed)


def test_seeds_of_numpy_are_numbers_too(pipe):
    one, other = (latents(pipe, [RED], seed=seed) for seed in (7, np.int64(7)))
    np.testing.assert_array_equal(one, other)


def test_a_state_holds_its_seed_and_identity(streams):
    model, _, states = streams["plain"]
    for beside in ({"seed": 3}, {"identity": 4}, {"seed": 0}):
        with pytest.raises(InputError, match="stand beside a state, which holds both already"):
            model.stream(PROMPTS, state=copied(states[0]), **beside)


def test_a_state_that_was_used_up_is_refused(pipe):
    first, _ = pipe.stream([RED] * 2)
    with pytest.raises(InputError, match="used up by the block that was drawn behind it"):
        pipe.stream([RED] * 3, state=first.state)


def test_a_state_of_another_memory_is_refused(pipe, streams):
    _, _, states = streams["plain"]
    others = [
        pipe.with_memory("no-mid"),
        pipe.with_settings(["cache.recent=6"]),
        pipe.with_settings(["dtypes.cache=bfloat16"]),
        pipe.with_method("longlive"),
    ]
    for other in others:
        with pytest.raises(InputError, match="(left by|belongs to) another memory"):
            other.stream(PROMPTS, state=copied(states[0]))
    with pytest.raises(InputError, match="a dict is no state"):
        pipe.stream(PROMPTS, state={"memory": 3})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["cache.sink=0", "cache.recent=6"], "cache.sink=0, cache.recent=6"),  # of the same shapes
        (["cache.top=1"], "cache.top=1"),
        (["cache.span=fit"], "cache.span='fit'"),
        (["cache.rope_adjustment=none"], "cache.rope_adjustment='none'"),
    ],
)
def test_a_state_of_a_memory_of_the_same_shapes_is_refused_too(pipe, streams, changes, told):
    _, _, states = streams["plain"]
    with pytest.raises(InputError, match=f"another memory than this one of {told}; go on"):
        pipe.with_settings(changes).stream(PROMPTS, state=copied(states[0]))


def test_a_state_may_go_on_with_another_choice(pipe, streams):
    _, _, states = streams["plain"]
    other = pipe.with_settings(["cache.selection=recency"])
    assert len(list(other.stream(PROMPTS, state=copied(states[0])))) > 0


@pytest.mark.parametrize("setting", ["dit.eps=0.5", "text.heads=1", "compressor.channels=(5,7,9)"])
def test_settings_of_loaded_networks_cannot_change(pipe, setting):
    with pytest.raises(InputError, match=f"{setting.partition('=')[0]} .*when it is loaded"):
        pipe.with_settings([setting])


def test_a_method_is_not_a_setting(pipe):
    for change in (pipe.with_settings, lambda sets: pipeline.with_overrides(tiny.EXP, None, sets)):
        with pytest.raises(InputError, match="would leave the memory as it is; give --method NAME"):
            change(["method=longlive"])


def test_bytes_that_are_no_text_are_no_prompt(pipe):
    with pytest.raises(InputError, match="holds bytes that are no text; write it in UTF-8"):
        pipe.stream(["a red \udcff disc"])
