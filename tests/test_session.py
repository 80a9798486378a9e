"""A session is told block by block, branches, goes back and survives its process: bit for bit, whatever its memory."""

import dataclasses
import itertools
import json
import math
import subprocess
import sys

import jax
import numpy as np
import pytest

from packforcing_jax.errors import InputError, MachineError
from packforcing_jax.methods.method import Method
from packforcing_jax.sampling import pipeline, player, snapshots
from packforcing_jax.sampling.pipeline import Pipeline
from packforcing_jax.sampling.snapshots import Keep

RED = "a red disc"
BLUE = "the blue figure walks"
LIME = "lime square"
STORY = [RED] * 3 + [BLUE] * 5
TRUE = {"rope_adjustment": "none"}
ALONE = {"rope_adjustment": "sink_only"}
DEEP = ALONE | {"budget": 9, "budget_recent": 3, "key_multiple": 5}
METHODS = {
    "rolling": Method("rolling", "", sink=3, window=12, settings=ALONE, joint=True),
    "clips": Method("clips", "", window=9, settings=TRUE, overlap=3),
    "budget": Method("budget", "", sink=3, window=12, settings=DEEP),
    "recache": Method("recache", "", sink=3, window=9, settings=TRUE, at_prompt_change="recache"),
    "unbounded": Method("unbounded", "", window=9, settings=TRUE, unbounded=True),
}
SETTINGS = {
    "own": [],
    "host": ["cache.scope=shared", "cache.timing=late", "cache.archive=host"],
}
ENDS = ("rolling", "clips")  # whose last blocks are made as the last ones


@pytest.fixture(scope="module")
def pipe(folder):
    return Pipeline.from_pretrained(folder)


@pytest.fixture(scope="module", params=[*SETTINGS, *METHODS])
def model(request, pipe):
    """The tiny model under every sort of memory."""
    if request.param in SETTINGS:
        return pipe.with_settings(SETTINGS[request.param])
    return pipe.with_method(METHODS[request.param]).for_length(len(STORY))


def latents(blocks):
    return [np.asarray(block.latent) for block in blocks]


def same(one, other):
    assert len(one) == len(other)
    for number, pair in enumerate(zip(one, other)):
        np.testing.assert_array_equal(*pair, err_msg=f"block {number}")


def test_forks_returns_and_saves_are_one_unbroken_run(model, tmp_path):
    """With the same prompts; other ones share every block before the fork and none behind it."""
    longer = STORY + [BLUE] * 3  # a rolling window that runs empty does so behind what is compared
    unbroken = model.for_length(len(longer)) if not model.method.unbounded else model
    story = STORY if model.method.unbounded else longer
    whole = latents(itertools.islice(unbroken.stream(story, seed=3), len(STORY)))
    session = model.session(seed=3, keep=None)
    made = latents(session.next(prompt) for prompt in STORY[:4])
    branch, other, early = session.fork(), session.fork(), session.fork(at=2)
    session.save(tmp_path / "state")
    made += latents(session.run(STORY[4:]))
    same(made, whole)
    same(latents(branch.run(BLUE, blocks=4)), whole[4:])
    same(latents(early.run(STORY[2:])), whole[2:])
    differs = latents(other.run([LIME] * 2))
    assert all(np.abs(one - two).max() > 0 for one, two in zip(differs, whole[4:]))
    assert other.prompts == STORY[:4] + [LIME] * 2
    session.rewind(to_block=1)
    assert (session.position, session.prompts) == (1, [RED])
    same(latents(session.run(STORY[1:])), whole[1:])
    session.rewind(to_block=0)
    same(latents(session.run(STORY[:2])), whole[:2])
    back = model.restore(tmp_path / "state")
    assert (back.position, back.prompts, back.seed) == (4, STORY[:4], 3)
    assert back.identity == pipeline.video_id(RED)
    same(latents(back.run(STORY[4:])), whole[4:])


def test_the_end_of_a_video_is_made_as_the_stream_makes_it_and_nothing_follows_it(pipe):
    for name in ENDS:
        model = pipe.with_method(METHODS[name])
        whole = list(model.stream(STORY, seed=3))
        session = model.session(seed=3, keep=2)
        ended = list(session.run(STORY, ends=True))
        for one, two in zip(ended, whole, strict=True):
            np.testing.assert_array_equal(one.frames, two.frames)
        with pytest.raises(InputError, match="ended with block 7, .*; go on from an earlier state"):
            session.next(BLUE)
        session.rewind(to_block=6)
        if name == "clips":  # the window of the other one is running empty there
            assert session.next(BLUE).index == 6
        open_one = latents(model.session(seed=3).run(STORY))
        same(open_one[:6], latents(whole[:6]))


def test_another_process_goes_on_bit_for_bit(pipe, folder, tmp_path):
    session = pipe.session(seed=5, identity=77)
    list(session.run([(0, RED), (2, BLUE, "cut")], blocks=3))
    session.save(tmp_path / "state")
    code = (
        "import sys, json, quick, conftest, numpy as np\n"
        "from packforcing_jax import Pipeline\n"
        "session = Pipeline.from_pretrained(sys.argv[1]).restore(sys.argv[2])\n"
        "hashes = [block.latent_hash for block in session.run('lime square', blocks=3)]\n"
        "print(json.dumps([session.identity, session.prompts, session.changes, hashes]))\n"
    )
    words = [sys.executable, "-c", code, str(folder), str(tmp_path / "state")]
    done = subprocess.run(words, capture_output=True, text=True, cwd="tests", check=True)
    here = [block.latent_hash for block in session.run(LIME, blocks=3)]
    told = [RED, RED, BLUE, LIME, LIME, LIME]
    assert json.loads(done.stdout) == [77, told, {"2": "cut"}, here]


def test_kept_states_are_the_newest_few_and_forks_share_them(pipe):
    session = pipe.session(seed=1, keep=2)
    for prompt in STORY[:5]:
        session.next(prompt)
    assert session.kept == (0, 3, 4, 5)
    forms = jax.tree.leaves(player.abstract_state(pipe))  # which `plan` counts
    one = sum(math.prod(form.shape) * form.dtype.itemsize for form in forms)
    assert session.snapshot_bytes == 2 * one
    branch = session.fork(at=4)
    assert branch.kept == (0, 3, 4)
    assert branch._kept[3] is session._kept[3]
    for position in (2, 6, -1, 1.5, True, None):
        with pytest.raises(InputError, match=r"cannot be gone back to: .*\(0, 3, 4, 5\); choose"):
            session.rewind(position)
    assert session.position == 5


def test_small_states_are_all_kept_and_large_ones_a_few():
    class Size:
        def __init__(self, size):
            self.bytes = size

    def kept(size, keep, count=9):
        return [*snapshots.newest({at: Size(size) for at in range(count)}, keep)]

    assert kept(10**6, snapshots.AUTO) == [*range(9)]
    assert kept(10**10, snapshots.AUTO) == [7, 8]
    assert kept(1 << 26, snapshots.AUTO) == [5, 6, 7, 8]
    assert kept(1, Keep(3)) == [6, 7, 8]
    assert kept(10**12, Keep(None)) == [*range(9)]
    assert kept(1, Keep(0)) == []


def test_states_on_the_disk_come_back_and_their_files_go(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(snapshots.tempfile, "tempdir", str(tmp_path))
    model = pipe.with_settings(["dtypes.cache=bfloat16"])
    session = model.session(seed=1, keep=Keep(2, place="disk"))
    made = latents(session.run(STORY[:4]))
    assert len([*tmp_path.iterdir()]) == 2
    session.rewind(to_block=2)
    same(latents(session.run(STORY[2:4])), made[2:])
    branch = session.fork(at=3)
    del session
    assert len([*tmp_path.iterdir()]) == 2  # 2 and 3, which the branch can go back to
    same([branch.next(STORY[3]).latent], made[3:])
    earlier = branch.fork(at=2)
    del branch
    (file,) = tmp_path.iterdir()  # of block 2
    file.unlink()
    with pytest.raises(InputError, match="snapshot .* cannot be read .*; go on from another block"):
        earlier.next(RED)
    earlier.rewind(to_block=0)
    same([earlier.next(RED).latent], made[:1])


@pytest.mark.parametrize(
    ("keep", "said"),
    [(-1, "keep=-1 is no number"), (1.5, "keep=1.5 is no number"), ("all", "keep='all' is no num")],
)
def test_what_is_no_number_of_states_is_refused(pipe, keep, said):
    with pytest.raises(InputError, match=said):
        pipe.session(keep=keep)
    with pytest.raises(InputError, match="cannot lie in 'cloud'; choose one of host, disk"):
        Keep(place="cloud")


def test_a_block_that_fails_leaves_the_session_where_it_was(pipe, monkeypatch):
    whole = latents(pipe.stream([RED] * 3, seed=2))
    session = pipe.session(seed=2, keep=1)
    bare = pipe.session(seed=2, keep=0)
    for each in (session, bare):
        each.next(RED), each.next(RED)
    with monkeypatch.context() as broken:
        broken.setattr(player, "commit_program", lambda *_: 1 / 0)
        for each in (session, bare):
            with pytest.raises(ZeroDivisionError):
                each.next(RED)
    assert session.position == 2
    same([session.next(RED).latent], whole[2:])
    with pytest.raises(
        InputError, match="state behind block 1 is gone: .* no state was kept; rewi"
    ):
        bare.next(RED)
    bare.rewind(to_block=0)
    same([bare.next(RED).latent], whole[:1])


def test_a_blank_block_is_not_told(pipe):
    nets = jax.tree.map(lambda leaf: leaf * np.nan, pipe.nets)
    session = dataclasses.replace(pipe, nets=nets).session()
    with pytest.raises(MachineError, match="not finite"):
        session.next(RED)
    assert (session.position, session.identity) == (0, None)


def test_a_state_that_was_used_up_says_so(pipe):
    session = pipe.session(keep=0)
    first = session.next(RED)
    list(pipe.stream([RED] * 2, state=first.state))
    with pytest.raises(InputError, match="was used up by the block that was drawn behind it"):
        session.next(RED)


def test_a_batch_is_its_videos(pipe):
    """Video `i` has the seed `seed + i`, one prompt or its own."""
    batch = pipe.session(seed=4, batch=2, identity=[8, 9])
    made = [batch.next(RED), batch.next([RED, BLUE]), batch.next([RED, BLUE])]
    assert batch.prompts == [(RED, RED), (RED, BLUE), (RED, BLUE)]
    assert (batch.seed, batch.identity) == (4, (8, 9))
    for video, prompts in enumerate(([RED] * 3, [RED, BLUE, BLUE])):
        alone = list(pipe.stream(prompts, seed=4 + video, identity=8 + video))
        for one, other in zip(made, alone, strict=True):
            np.testing.assert_allclose(one[video].latent, other.latent, atol=1e-4)
            assert one[video].index == other.index
            np.testing.assert_array_equal(one[video].block_ids, other.block_ids)
    alike = pipe.session(batch=2).next(RED)
    assert np.abs(alike[0].latent - alike[1].latent).max() > 0.1


def test_a_batch_begins_with_the_same_clip(pipe):
    clip = np.random.default_rng(0).integers(0, 256, (3, 16, 8, 3), np.uint8)
    batch = pipe.session(seed=1, batch=2)
    (made,) = batch.start(clip, [[RED, BLUE]])
    np.testing.assert_array_equal(made[0].frames, made[1].frames)
    later = batch.next([RED, BLUE])
    assert np.abs(later[0].latent - later[1].latent).max() > 0.1


def test_a_batch_survives_on_the_disk(pipe, tmp_path):
    batch = pipe.session(seed=4, batch=2)
    batch.next([RED, BLUE])
    batch.save(tmp_path / "state")
    back = pipe.restore(tmp_path / "state")
    assert (back.prompts, back.identity) == (batch.prompts, batch.identity)
    for one, other in zip(batch.next(LIME), back.next(LIME), strict=True):
        np.testing.assert_array_equal(one.latent, other.latent)


def test_what_a_prompt_does_to_the_memory_can_be_said(pipe):
    """As the stream does it, in every form of telling."""
    told = pipe.stream(STORY[:6], changes={3: "flush", 5: "cut"})
    whole = latents(told)
    changes = {3: "flush", 5: "cut"}
    timeline = [(0, RED), (3, BLUE, "flush"), (5, BLUE, "cut")]
    same(latents(pipe.session().run(STORY[:6], changes=changes)), whole)
    same(latents(pipe.session().run(timeline, blocks=6)), whole)
    session = pipe.session()
    made = [session.next(prompt, change=changes.get(at)) for at, prompt in enumerate(STORY[:6])]
    same(latents(made), whole)
    assert session.changes == changes
    plain = latents(pipe.stream(STORY[:6]))
    assert np.abs(plain[3] - whole[3]).max() > 0
    with pytest.raises(InputError, match="'forget' is nothing a new prompt can do"):
        session.next(RED, change="forget")
    with pytest.raises(InputError, match="block 0 has no memory to cut"):
        pipe.session().next(RED, change="cut")


def test_a_batch_whose_memory_only_one_prompt_would_change_is_refused(pipe):
    batch = pipe.with_method(METHODS["recache"]).session(batch=2)
    batch.next(RED)
    with pytest.raises(InputError, match="'recache' to the memory, which is one for all videos"):
        batch.next([RED, BLUE])
    assert batch.next([RED, BLUE], change="keep")[1].prompt == BLUE


def test_a_timeline_counts_from_the_beginning_and_lengths_from_here(pipe):
    session = pipe.session()
    list(session.run(RED, blocks=2))
    list(session.run([(0, RED), (3, BLUE)], seconds=1.9))  # 3 frames a block, 5 a second
    assert session.prompts == [RED, RED, RED, BLUE, BLUE, BLUE]
    assert [block.prompt for block in session.run(iter([LIME, LIME]))] == [LIME] * 2
    endless = session.run(itertools.repeat(RED))
    assert next(endless).index == 8
    assert len(list(session.run(itertools.repeat(RED), blocks=2))) == 2


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"prompts": RED}, "is one prompt; say seconds= or blocks="),
        ({"prompts": RED, "seconds": 1, "blocks": 2}, "seconds and blocks exclude each other"),
        ({"prompts": RED, "blocks": 0}, "blocks=0, which is not a length"),
        ({"prompts": [(0, RED)]}, "a timeline has no end; say seconds= or blocks="),
        ({"prompts": [(1, RED)], "blocks": 2}, "starts at block 1"),
        ({"prompts": 3}, "prompts=3 are none"),
        ({"prompts": [RED, 3]}, "3 is no prompt for 1 video; give one string"),
        ({"prompts": [RED, "a purpel disc"]}, "purpel"),
        ({"prompts": iter([RED]), "ends": True}, "a video that ends needs its prompts as a list"),
    ],
)
def test_what_cannot_be_told_is_refused_before_a_block_is_made(pipe, how, said):
    session = pipe.session()
    with pytest.raises(InputError, match=said):
        list(session.run(**how))
    assert session.position == 0


def test_stream_and_generate_take_one_prompt_and_a_length(pipe):
    whole = pipe.generate([RED] * 3, seed=1)
    np.testing.assert_array_equal(whole, pipe.generate(RED, seed=1, blocks=3))
    np.testing.assert_array_equal(whole, pipe.generate(RED, seed=1, seconds=1.7))
    np.testing.assert_array_equal(whole, pipe.generate(iter([RED] * 3), seed=1))
    with pytest.raises(InputError, match="seconds and blocks exclude each other"):
        pipe.stream(RED, seconds=1, blocks=2)
    with pytest.raises(InputError, match="blocks stand beside one prompt for each block"):
        pipe.stream([RED], blocks=2)


# On the disk


def test_a_future_that_was_taken_back_goes_from_the_folder(pipe, tmp_path):
    place = tmp_path / "state"
    session = pipe.session(seed=1, keep=None)
    for at, prompt in enumerate(STORY[:5], start=1):
        session.next(prompt)
        session.save(place, keep=3)
        assert sorted(int(each.name) for each in place.iterdir()) == [
            *range(max(1, at - 2), at + 1)
        ]
    session.rewind(to_block=3)
    session.next(LIME)
    session.save(place, keep=3)
    assert sorted(each.name for each in place.iterdir()) == ["3", "4"]
    back = pipe.restore(place)
    assert back.prompts == [*STORY[:3], LIME]
    assert pipe.restore(place, at=3).prompts == STORY[:3]
    with pytest.raises(InputError, match=r"states behind \[3, 4\] blocks and none behind 5"):
        pipe.restore(place, at=5)
    np.testing.assert_array_equal(back.next(LIME).latent, session.next(LIME).latent)


def test_a_session_is_saved_before_its_first_block_too(pipe, tmp_path):
    pipe.session(seed=9).save(tmp_path / "state")
    back = pipe.restore(tmp_path / "state")
    assert (back.position, back.identity, back.seed) == (0, None, 9)
    np.testing.assert_array_equal(back.next(BLUE).latent, next(pipe.stream([BLUE], seed=9)).latent)


def test_a_state_brings_its_settings_and_asks_for_its_weights(pipe, tmp_path):
    session = pipe.session(method="longlive", overrides=["cache.key_multiple=3"])
    session.next(RED)
    session.save(tmp_path / "state")
    back = pipe.restore(tmp_path / "state")
    assert back.pipeline.experiment == session.pipeline.experiment
    assert back.pipeline.method.name == "longlive"
    np.testing.assert_array_equal(back.next(BLUE).latent, session.next(BLUE).latent)
    other = dataclasses.replace(pipe, nets=jax.tree.map(lambda leaf: leaf + 1e-3, pipe.nets))
    with pytest.raises(InputError, match="belongs to other weights .*; give the model folder that"):
        other.restore(tmp_path / "state")
    with pytest.raises(InputError, match="holds no state; check the path"):
        pipe.restore(tmp_path / "nothing")


def test_a_damaged_or_foreign_state_says_so(pipe, tmp_path):
    session = pipe.session()
    session.next(RED)
    session.save(tmp_path / "state")
    largest = max((tmp_path / "state").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with pytest.raises(InputError, match="is damaged"):
        pipe.restore(tmp_path / "state")


# What has no session


def test_methods_of_one_length_say_how_far_they_go(pipe):
    short = dataclasses.replace(METHODS["unbounded"], name="short", unbounded=False, one_clip=True)
    session = pipe.with_method(short).session()
    list(session.run(RED, blocks=3))
    with pytest.raises(
        InputError, match="room for 3 blocks here, and block 3 is behind them; take"
    ):
        session.next(RED)
    unbounded = pipe.with_method(METHODS["unbounded"])
    with pytest.raises(InputError, match=r"room for it: pipeline.for_length\(4\).session"):
        unbounded.session().run(RED, blocks=4)
    assert len(list(unbounded.for_length(4).session().run(RED, blocks=4))) == 4


def test_a_clip_that_is_denoised_as_a_whole_has_no_session(pipe):
    with pytest.raises(InputError, match="all frames of a clip together, so there is no session"):
        pipe.with_method("bidirectional").session()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"batch": 0}, "batch=0 is no number of videos"),
        ({"batch": 2, "identity": [1]}, "names 1 videos and batch=2"),
        ({"batch": 2, "seed": 2**32 - 1}, "seed=4294967296 must be a whole number"),
        ({"identity": -1}, "a video's id=-1 must be a whole number"),
        ({"method": "longlif"}, "longlif"),
        ({"overrides": ["cache.tpo=1"]}, "tpo"),
    ],
)
def test_a_session_that_cannot_be_is_refused(pipe, how, said):
    with pytest.raises(InputError, match=said):
        pipe.session(**how)
