"""What a run keeps is its own: the sampler's state, how far its files go, and the story told so far."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from packforcing_jax import pytrees
from packforcing_jax.errors import InputError
from packforcing_jax.io import checkpoints, video
from packforcing_jax.memory import layout as layouts
from packforcing_jax.sampling import pipeline, resume, state_folder
from packforcing_jax.sampling.pipeline import Pipeline

RED = "a red disc"
BLUE = "the blue figure walks"
LIME = "lime square"
STORY = [RED] * 5 + [BLUE] * 6
HOST = ["cache.scope=shared", "cache.timing=late", "cache.archive=host"]


@pytest.fixture(scope="module")
def pipe(folder):
    return Pipeline.from_pretrained(folder)


@dataclasses.dataclass
class File:
    """A writer whose position is known only once it is on the disk."""

    far: object
    synced: bool = False

    def sync(self):
        self.synced = True
        return self.far


@dataclasses.dataclass
class Block:
    """What `keep` reads of a finished block."""

    index: int
    state: pipeline.State


def scrambled(model, blocks, seed=0):
    """A state behind so many blocks in which every number is another one."""
    rng = np.random.default_rng(seed)
    start = model.start(seed=3, videos=[5])

    def draws(leaf):
        drawn = rng.normal(size=leaf.shape).astype(leaf.dtype)
        return drawn if isinstance(leaf, np.ndarray) else jnp.asarray(drawn)

    memory = jax.tree.map(draws, start.memory).replace(progress=layouts.begin(blocks))
    return start.replace(memory=memory, archive=jax.tree.map(draws, start.archive))


def keep(keeper, blocks, *, written=video.Position(70, 8, 3), traced=900, seed=0):  # noqa: B008
    """Keeps a scrambled state behind so many blocks; the state and the two files."""
    state = scrambled(keeper.model, blocks, seed)
    files = (File(written), File(traced) if traced else None)
    keeper.keep(Block(blocks - 1, state), *files)
    keeper.close()
    return state, files


def keeper(folder, model, **changed):
    notes = state_folder.Notes(changed.pop("prompts", STORY))
    return resume.Keeper(folder, model, notes, **({"every": 4, "seed": 3} | changed))


def same_bits(one, two):
    """The same in all that is kept: scratch is what views hold behind sink and recent frames."""

    def kept(state):
        full = tiny.EXP.memory.full_res  # no settings here change it
        layers = [
            each.replace(view=jax.tree.map(lambda x: x[:, :full], each.view))
            for each in state.memory.layers
        ]
        return pytrees.flatten(state.replace(memory=state.memory.replace(layers=layers)))

    one = kept(one)
    two = kept(two)
    assert one.keys() == two.keys()
    for name, leaf in one.items():
        assert type(leaf) is type(two[name]), name
        np.testing.assert_array_equal(leaf, two[name], err_msg=name)


def test_a_run_is_kept_after_every_few_blocks_and_behind_its_last(pipe, tmp_path):
    one = keeper(tmp_path / "saves", pipe)
    kept = []
    for blocks in range(1, 12):
        before = checkpoints.Checkpoints(tmp_path / "saves").latest()
        _, files = keep(one, blocks)
        if checkpoints.Checkpoints(tmp_path / "saves").latest() != before:
            kept.append(blocks)
        assert all(file.synced == (blocks in kept) for file in files)
    assert kept == [4, 8, 11]


@pytest.mark.parametrize(
    "overrides",
    [[], ["cache.rope_adjustment=incremental"], HOST, ["cache.top=0"], ["cache.selection=paper"]],
)
def test_what_was_kept_comes_back_with_new_scratch(pipe, tmp_path, overrides):
    model = pipe.with_settings(overrides)
    state, _ = keep(keeper(tmp_path, model), 8)
    at = keeper(tmp_path, model).resume()
    same_bits(at.state, state)
    assert (at.written, at.traced) == (video.Position(70, 8, 3), 900)
    fresh = model.start(seed=0, videos=[0])
    for ours, theirs in zip(jax.tree.leaves(at.state), jax.tree.leaves(fresh), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    assert all(leaf.flags.writeable for leaf in jax.tree.leaves(at.state.archive))


def test_the_newest_state_is_the_one_that_comes_back(pipe, tmp_path):
    one = keeper(tmp_path, pipe)
    for blocks in (4, 8):
        state, _ = keep(
            one, blocks, written=video.Position(blocks, blocks, 1), traced=blocks, seed=blocks
        )
    at = keeper(tmp_path, pipe).resume()
    same_bits(at.state, state)
    assert (at.written.bytes, at.traced) == (8, 8)


def test_a_run_that_is_not_traced_says_so(pipe, tmp_path):
    keep(keeper(tmp_path, pipe), 4, traced=None)
    assert keeper(tmp_path, pipe).resume().traced == 0


def test_without_a_save_a_run_starts_and_leaves_no_folder(pipe, tmp_path):
    assert keeper(tmp_path / "saves", pipe).resume() == resume.Resumed(
        state=None, written=None, traced=0
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("story", [STORY[:8] + [LIME] * 9, STORY[:8], STORY[:9]])
def test_what_follows_the_kept_blocks_may_be_told_anew(pipe, tmp_path, story):
    state, _ = keep(keeper(tmp_path, pipe), 8)
    later = keeper(tmp_path, pipe, prompts=story)
    same_bits(later.resume().state, state)
    keep(later, len(story)) if len(story) > 8 else None
    assert keeper(tmp_path, pipe, prompts=story).saved.notes()["prompts"] == (
        story if len(story) > 8 else STORY
    )


@pytest.mark.parametrize(
    ("story", "named"),
    [
        ([LIME, *STORY[1:]], "tells another story from block 0 on, and holds 8 blocks"),
        (STORY[:7] + [LIME] * 4, "tells another story from block 7 on, and holds 8 blocks"),
        ([RED] + STORY, "tells another story from block 5 on"),
        ([LIME] * 3, "tells another story from block 0 on"),
        (STORY[:7], "holds 8 blocks of this story, and 7 are asked for; ask for 8 or more"),
        (STORY[:1], "holds 8 blocks of this story, and 1 are asked for"),
    ],
)
def test_another_story_is_refused_and_a_shorter_run_is_not_called_one(pipe, tmp_path, story, named):
    keep(keeper(tmp_path, pipe), 8)
    with pytest.raises(InputError, match=f"^Checkpoint folder .* {named}"):
        keeper(tmp_path, pipe, prompts=story).resume()


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"seed": 4}, "seed: 3 saved, 4 wanted"),
        ({"overrides": ["cache.top=1"]}, "experiment.cache.top: 2 saved, 1 wanted"),
        (
            {"overrides": ["fps=6", "cache.selection=random"]},
            'selection: "affinity" saved, "random" wanted; experiment.fps: 5',
        ),
    ],
)
def test_another_run_is_refused_by_what_differs(pipe, tmp_path, changed, named):
    keep(keeper(tmp_path / "saves", pipe), 4)
    model = pipe.with_settings(changed.pop("overrides", []))
    with pytest.raises(
        InputError, match=f"saves.4 belongs to another run .*{named}.*; continue with the settings"
    ):
        keeper(tmp_path / "saves", model, **changed).resume()


def test_other_weights_are_refused(pipe, tmp_path):
    keep(keeper(tmp_path / "saves", pipe), 4)
    nets = jax.tree.map(lambda leaf: leaf + 1e-3, pipe.nets)
    differs = 'weights: "[0-9a-f]+" saved, "[0-9a-f]+" wanted'
    with pytest.raises(InputError, match=f"saves.4 belongs to another run .*{differs}"):
        keeper(tmp_path / "saves", dataclasses.replace(pipe, nets=nets)).resume()


@pytest.mark.parametrize("every", [0, -3])
def test_a_pace_that_is_none_is_refused(pipe, tmp_path, every):
    with pytest.raises(InputError, match=f"every={every} must be at least 1"):
        keeper(tmp_path / "saves", pipe, every=every)
