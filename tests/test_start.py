"""A video that begins with a picture or a clip: what is given is what it begins with, and the model goes on from it."""

import dataclasses

import imageio.v3
import jax
import numpy as np
import pytest
import tiny
from flax import nnx

from packforcing_jax import config
from packforcing_jax.cli import main
from packforcing_jax.errors import InputError
from packforcing_jax.io import video
from packforcing_jax.methods.method import Method
from packforcing_jax.networks import codec
from packforcing_jax.sampling import opening, video_notes
from packforcing_jax.sampling.pipeline import Pipeline
from packforcing_jax.stage import captions, data, metrics, oracle, world

RED = "a red disc"
BLUE = "the blue figure walks"
WAN = config.VAEConfig(
    dim=2,
    z_dim=12,
    dim_mult=(1, 2),
    num_res_blocks=1,
    temporal_downsample=(True,),
    mean=(0.0,) * 12,
    std=(1.0,) * 12,
)
ROLLING = Method(
    "rolling", "", sink=3, window=12, settings={"rope_adjustment": "sink_only"}, joint=True
)


@pytest.fixture(scope="module")
def pipe(folder):
    return Pipeline.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(pipe):
    """The tiny model with an autoencoder that groups frames by two."""
    vae = tiny.filled(jax.eval_shape(lambda: codec.make(WAN, nnx.Rngs(0))), seed=3)
    return dataclasses.replace(
        pipe, experiment=dataclasses.replace(pipe.experiment, codec=WAN), vae=vae
    )


def frames(count, height=16, width=8, seed=0):
    """Random frames in uint8."""
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), np.uint8)


def test_a_clip_is_what_the_video_begins_with(pipe):
    """Its blocks are shown as they were given, and noise and seed do not enter them."""
    clip = frames(6)
    made = [pipe.session(seed=seed).start(clip, RED) for seed in (1, 2)]
    for blocks in made:
        assert [block.index for block in blocks] == [0, 1]
        shown = np.concatenate([block.frames for block in blocks])
        np.testing.assert_array_equal(video.to_uint8(shown), clip)
    np.testing.assert_array_equal(made[0][1].latent, made[1][1].latent)


def test_what_follows_looks_back_at_it(pipe):
    """The same seed behind two starts gives two videos; and the same start twice one."""

    def rest(clip):
        session = pipe.session(seed=1)
        session.start(clip, RED)
        return [block.latent for block in session.run(RED, blocks=3)]

    one, again, other = (rest(frames(3, seed=seed)) for seed in (0, 0, 5))
    np.testing.assert_array_equal(one, again)
    assert all(np.abs(a - b).max() > 1e-3 for a, b in zip(one, other))


def test_a_start_is_a_block_like_any_other(pipe, tmp_path):
    """What was drawn, given back as a start, is gone on from as it was: to the rounding of 8 bits not even."""
    drawn = list(pipe.stream([RED] * 4, seed=6))
    session = pipe.session(seed=6)
    session.start(np.concatenate([block.frames for block in drawn[:2]]), RED)
    for block in drawn[2:]:
        clipped = np.abs(drawn[0].latent).max() > 1  # pixels end at 1, latents do not
        tolerance = 1.0 if clipped else 1e-4
        np.testing.assert_allclose(session.next(RED).latent, block.latent, atol=tolerance)
    assert session.prompts == [RED] * 4
    session.save(tmp_path / "state")
    back = pipe.restore(tmp_path / "state")
    np.testing.assert_array_equal(back.next(BLUE).latent, session.next(BLUE).latent)


def test_a_picture_stands_still_for_a_block(pipe, model):
    picture = frames(1)[0]
    for each, count in ((pipe, 3), (model, 5)):  # three latents: 3 frames, or 1 + 2 * 2
        found = opening.of_frames(each.experiment, picture)
        assert (found.blocks, len(found.frames)) == (1, count)
        assert (
            found.said
            == f"one picture, which stands still for the {count} frames of the first block"
        )
        assert (found.frames == found.frames[:1]).all()
        made = each.session().start(picture, RED)
        assert [len(block.frames) for block in made] == [count]
    exp = tiny.with_cache(block=1, sink=1, recent=1, top=0, capacity=0)
    alone = opening.of_frames(exp, picture)  # a frame-wise model takes one
    assert (len(alone.frames), alone.said) == (1, "one picture, the first frame")


@pytest.mark.parametrize(
    ("given", "taken", "blocks"), [(5, 5, 1), (9, 5, 1), (11, 11, 2), (14, 11, 2)]
)
def test_of_a_clip_the_last_frames_that_fill_blocks_are_taken(model, given, taken, blocks):
    clip = frames(given)
    found = opening.of_frames(model.experiment, clip)
    assert (len(found.frames), found.blocks) == (taken, blocks)
    np.testing.assert_array_equal(video.to_uint8(found.frames), clip[-taken:])
    part = f"the last {taken} of " if taken != given else ""
    assert found.said == f"{part}{given} frames, the first {blocks} block{'s' * (blocks > 1)}"


def test_an_autoencoder_goes_on_behind_the_start(model):
    session = model.session()
    made = session.start(frames(11), RED)
    assert [len(block.frames) for block in made] == [5, 6]
    assert len(session.next(RED).frames) == 6


def test_a_rolling_window_begins_anew_behind_the_start(pipe):
    """Its blocks have the noise of their numbers: what follows is that of the video, and looks back at the start."""
    rolling = pipe.with_method(ROLLING)
    session = rolling.session(seed=2)
    session.start(frames(3), RED)
    assert int(session._live().window.begun) == 0
    first = rolling.session(seed=2, identity=session.identity)
    first.next(RED)
    noise = rolling.session(seed=2, identity=session.identity)
    noise.start(frames(3, seed=9), RED)
    np.testing.assert_array_equal(session._live().window.noisy, noise._live().window.noisy)
    start = np.asarray(rolling.start(seed=2, videos=[session.identity]).window.noisy)
    block = rolling.experiment.cache.block
    np.testing.assert_array_equal(  # the noise of blocks 1 and 2, behind that of block 0
        np.asarray(session._live().window.noisy)[:, : 2 * block], start[:, block:]
    )
    made = [block.latent for block in session.run(RED, blocks=4)]
    assert np.isfinite(made).all()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (frames(3, 8, 16), "start has 16x8 pixels and tiny makes 8x16; scale and crop it"),
        (frames(3, 24, 12), "has 12x24 pixels"),
        (frames(2), "has 2 frames, and a block has 3; give one picture, or 3 frames or more"),
        (frames(16), "has 16 frames, and the model was trained on clips of 15; give 15 at most"),
        (frames(3) / 255 * 3 - 1, "holds float64 beyond .-1, 1."),
        (frames(3).astype(np.int32), "holds int32 beyond"),
        (frames(3)[..., 0], "has the shape .*; give frames"),
        (frames(3)[:0], "has the shape"),
    ],
)
def test_what_the_model_cannot_begin_with_is_refused(pipe, given, said):
    session = pipe.session()
    with pytest.raises(InputError, match=said):
        session.start(given, RED)
    assert session.position == 0


def test_a_start_is_the_beginning(pipe):
    session = pipe.session()
    session.next(RED)
    with pytest.raises(InputError, match="the video has 1 blocks, and a picture or a clip is what"):
        session.start(frames(3), RED)
    session.rewind(to_block=0)
    with pytest.raises(InputError, match="3 prompts were given for the 1 blocks of the start"):
        session.start(frames(3), [RED] * 3)
    with pytest.raises(InputError, match="purpel"):
        session.start(frames(3), "a purpel disc")
    assert len(session.start(frames(3), RED)) == 1


# The command


def sample(capsys, folder, *words):
    code = main.main(["sample", "--weights", str(folder), "--prompt", RED, *map(str, words)])
    return code, *capsys.readouterr()


def test_a_picture_file_is_the_first_block(capsys, folder, pipe, tmp_path):
    picture = frames(1)[0]
    imageio.v3.imwrite(tmp_path / "p.png", picture)
    words = ("--start", tmp_path / "p.png", "--blocks", 3, "--out", tmp_path / "v.mp4")
    code, _, err = sample(capsys, folder, *words)
    assert code == 0
    assert "begins with one picture, which stands still for the 3 frames of the first block" in err
    assert "were trained to make video from text" in err
    session = pipe.session()
    made = session.start(picture, RED) + list(session.run(RED, blocks=2))
    record = video_notes.read(tmp_path / "v.mp4")
    assert record.latents == tuple(block.latent_hash for block in made)
    assert [told.given for told in record.told] == [True, False, False]


def test_a_run_that_began_with_a_clip_goes_on_and_is_made_again(capsys, folder, tmp_path):
    clip = tmp_path / "clip.mp4"  # enlarged as `sample` enlarges what it writes
    with video.Writer(clip, fps=5, size=(8, 16), scale=24, settings={}) as writer:
        writer.write(frames(6))
    files = ("--state", tmp_path / "state", "--every", 1, "--out", tmp_path / "v.mp4")
    assert (
        sample(capsys, folder, "--blocks", 5, "--start", clip, "--out", tmp_path / "w.mp4")[0] == 0
    )
    assert sample(capsys, folder, "--blocks", 3, "--start", clip, *files)[0] == 0
    code, _, err = sample(capsys, folder, "--blocks", 5, *files)
    assert (code, "began with another picture or clip; give the same --start" in err) == (2, True)
    code, _, err = sample(capsys, folder, "--blocks", 5, "--start", clip, *files)
    assert (code, "goes on behind block 3" in err) == (0, True)
    assert (tmp_path / "v.mp4").read_bytes()[-900:] == (tmp_path / "w.mp4").read_bytes()[-900:]
    assert (
        video_notes.read(tmp_path / "v.mp4").latents == video_notes.read(tmp_path / "w.mp4").latents
    )
    replay = ["replay", str(tmp_path / "w.mp4")]
    assert main.main(replay) == 2
    assert "began with a picture or a clip; give it as --start FILE" in capsys.readouterr().err
    assert main.main([*replay, "--start", str(clip)]) == 0
    with video.Writer(tmp_path / "other.mp4", fps=5, size=(8, 16), settings={}) as writer:
        writer.write(frames(6, seed=1))
    assert main.main([*replay, "--start", str(tmp_path / "other.mp4")]) == 2
    assert "is not what" in capsys.readouterr().err
    words = ["fork", str(tmp_path / "state"), "--at", "1", "--out", str(tmp_path / "branch")]
    assert main.main(words) == 2
    assert (
        "began with a picture or a clip, which the state does not hold" in capsys.readouterr().err
    )


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Files that a video does not begin with."""
    place = tmp_path_factory.mktemp("clips")

    def write(name, count, fps=5, size=(8, 16)):
        with video.Writer(place / name, fps=fps, size=size, scale=2, settings={}) as writer:
            writer.write(frames(count, size[1], size[0]))

    write("fast.mp4", 6, fps=24)
    write("wide.mp4", 6, size=(16, 16))
    write("short.mp4", 2)
    write("long.mp4", 18)
    write("good.mp4", 6)
    imageio.v3.imwrite(place / "wide.jpg", frames(1, 16, 9)[0])
    (place / "text.png").write_text("no picture")
    return place


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fast.mp4"], "has 24 frames a second and tiny makes 5; convert it: ffmpeg -i"),
        (["wide.mp4"], "has 32x32 pixels and tiny makes 8x16"),
        (["wide.jpg"], "has 9x16 pixels and tiny makes 8x16"),
        (["short.mp4"], "has 2 frames, and a block has 3"),
        (["long.mp4"], "has 18 frames, and the model was trained on clips of 15"),
        (["text.png"], "holds no picture or clip that can be decoded"),
        (["none.png"], "does not exist"),
        (["notes.gif"], "ends in .gif; give a file that ends in .png, .jpg, .jpeg, .mp4"),
        (["good.mp4", "--blocks", 2], "fills 2 blocks and the video has 2; ask for a longer one"),
        (
            ["good.mp4", "--method", "bidirectional"],
            "denoises all frames of a clip together; leave",
        ),
    ],
)
def test_a_file_that_is_no_start_is_refused_with_a_sentence(
    capsys, folder, clips, tmp_path, words, said
):
    given = [clips / words[0], "--out", tmp_path / "v.mp4", *words[1:]]
    code, _, err = sample(capsys, folder, "--start", *given)
    assert (code, said in err) == (2, True), err
    assert [*tmp_path.iterdir()] == []


# What the model that ships makes of it


@pytest.fixture(scope="module")
def stage():
    return Pipeline.from_pretrained()


@pytest.mark.parametrize("story", [1, 3])
def test_the_oracle_reads_the_attributes_of_the_start_in_the_blocks_behind_it(stage, story):
    """Most frames show its mark, which no prompt names, and all else; without it the mark is another one."""
    told = data.draw_clip(np.random.default_rng(100 + story))
    prompt = captions.caption(told, 0)
    given = world.render(told)
    wanted = oracle.read(given)

    def read(start):
        session = stage.session(seed=story, keep=0)
        if start is not None:
            session.start(start, prompt)
        return oracle.read(
            np.concatenate([block.frames for block in session.run(prompt, blocks=6)])
        )

    for start in (given[0], given[:8]):
        found = read(start)
        for name in ("mark", "colour", "shape", "backdrop", "scene"):
            shown = getattr(found, name)
            assert metrics.majority(shown) == getattr(wanted, name)[0], name
            assert np.mean(shown == getattr(wanted, name)[0]) > 0.75, name
        assert np.median(np.abs(found.hue - wanted.hue[0])) < 10  # of 45 degrees between colours
        assert np.median(np.abs(found.gain - wanted.gain[0])) < 0.05
    assert metrics.majority(read(None).mark) != wanted.mark[0]
