"""Sources of data: what is recognised, that examples are what was there, and what is left out or refused, by name."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from packforcing_jax import config
from packforcing_jax.errors import InputError
from packforcing_jax.io import model_folder, video
from packforcing_jax.networks import codec
from packforcing_jax.training import importing

BLOCKS = 5
PIXELS = (16, 8)  # of a frame of the tiny experiment
WAN = config.VAEConfig(
    dim=4,
    z_dim=12,
    dim_mult=(1, 1),
    num_res_blocks=1,
    temporal_downsample=(True,),
    mean=(0.1,) * 12,
    std=(1.3,) * 12,
)


def to_floats(frames: np.ndarray) -> np.ndarray:
    """uint8 frames as float32 in [-1, 1]."""
    return np.asarray(frames, np.float32) / 127.5 - 1


@pytest.fixture(scope="module")
def parts(folder):
    """The tiny model's codec and text encoder."""
    return importing.parts_of(tiny.EXP, model_folder.opened(folder))


def film(path, count=15, size=(10, 24), fps=5):
    """A video whose left and right halves change at their own pace, and its frames."""
    frames = np.zeros((count, *size, 3), np.uint8)
    steps = np.arange(count)[:, None, None, None]
    frames[:, :, : size[1] // 2] = 250 - 9 * steps
    frames[:, :, size[1] // 2 :] = 20 + 9 * steps
    with video.Writer(path, fps=fps, size=size[::-1], settings={}) as out:
        out.write(frames)
    return frames


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """A folder with two videos long enough, one too short, one that is none, and captions."""
    folder = tmp_path_factory.mktemp("films")
    (folder / "deep").mkdir()
    film(folder / "b.mp4", 21)
    film(folder / "deep" / "a.mp4", 15, size=(40, 20))
    film(folder / "short.mp4", 14)
    (folder / "broken.mov").write_bytes(b"no video at all")
    for name in ("b", "deep/a", "short", "broken"):
        (folder / f"{name}.txt").write_text(f"  a film\n called {name}  ")
    (folder / "notes.md").write_text("not a caption")
    return folder


def test_frames_are_scaled_and_cropped_around_the_middle(films):
    frames = importing.frames_of(films / "b.mp4", count=15, fps=5, size=PIXELS).astype(int)
    assert frames.shape == (15, *PIXELS, 3)
    times = 9 * np.arange(15)
    assert np.abs(frames[:, 3:13, :2].mean((1, 2, 3)) - (250 - times)).max() < 4
    assert np.abs(frames[:, 3:13, -2:].mean((1, 2, 3)) - (20 + times)).max() < 4
    slow = importing.frames_of(films / "b.mp4", count=100, fps=1, size=PIXELS)
    assert len(slow) in (4, 5)
    tall = importing.frames_of(films / "deep" / "a.mp4", count=2, fps=5, size=PIXELS).astype(int)
    assert np.abs(tall[0, :, :3].mean() - 250) < 4, "both halves stay, above and below is cut"
    assert np.abs(tall[0, :, -3:].mean() - 20) < 4


def test_a_video_becomes_its_latents_and_those_of_its_blocks_in_low_resolution(films, parts):
    (item,) = [
        item
        for item in importing.KINDS["videos"].items(films)
        if item.name.startswith("deep/a.mp4")
    ]
    assert item.prompt == "a film called deep/a"
    made = item.made(parts)
    frames = importing.frames_of(films / "deep" / "a.mp4", count=15, fps=5, size=PIXELS)
    clip = jnp.asarray(to_floats(frames))[None]
    wanted = codec.encode(parts.vae, clip)[0]
    assert made["latent"].dtype == np.float16
    np.testing.assert_allclose(made["latent"], wanted, atol=1e-3)
    for block in range(BLOCKS):
        low_res = codec.low_res_latents(
            parts.vae, clip[:, 3 * block : 3 * block + 3], latents=2, pool=(2, 2, 1)
        )
        np.testing.assert_allclose(made["low_res"][block], low_res[0], atol=1e-3)


def test_a_codec_that_groups_frames_is_run_as_a_stream(films, monkeypatch):
    """Three latent frames a block: five pixel frames first, six at a time then."""
    exp = dataclasses.replace(tiny.EXP, clip=6, codec=WAN)
    vae = tiny.filled(jax.eval_shape(lambda: codec.make(exp.codec, nnx.Rngs(0))))
    quick = tiny.jit(importing._encode_block.__wrapped__, static_argnames=("exp", "first"))
    monkeypatch.setattr(importing, "_encode_block", quick)
    monkeypatch.setattr(
        codec, "low_res_latents", lambda vae, video, **sizes: video.mean(1)
    )  # half the compiling
    item = next(
        item for item in importing.KINDS["videos"].items(films) if item.name.startswith("b.mp4")
    )
    made = item.made(importing.Parts(exp, vae))
    frames = importing.frames_of(films / "b.mp4", count=11, fps=5, size=PIXELS)
    clip = jnp.asarray(to_floats(frames))[None]
    np.testing.assert_allclose(
        made["latent"], tiny.jit(codec.encode)(vae, clip)[0], atol=2e-3, rtol=2e-3
    )
    assert np.abs(np.diff(made["latent"], axis=0)).max() > 0.05, (
        "frames tell one latent from the next"
    )
    np.testing.assert_allclose(
        made["low_res"], [clip[0, :5].mean(0), clip[0, 5:].mean(0)], atol=1e-3
    )


@pytest.mark.parametrize(
    ("name", "why"),
    [("short", "has 14 frames at 5 a second, 15 are needed"), ("broken", "cannot be decoded")],
)
def test_videos_that_cannot_be_used_say_why(films, parts, name, why):
    (item,) = [
        item for item in importing.KINDS["videos"].items(films) if item.name.startswith(name)
    ]
    with pytest.raises(importing.LeftOut, match=f"{name}.*{why}"):
        item.made(parts)


def test_videos_come_in_the_same_order_however_they_are_listed(films, tmp_path):
    names = [item.name.split()[0] for item in importing.KINDS["videos"].items(films)]
    assert names == ["b.mp4", "broken.mov", "deep/a.mp4", "short.mp4"]
    listed = films / "list.jsonl"
    listed.write_text(
        '{"file": "short.mp4", "prompt": " one "}\n\n{"file": "b.mp4", "prompt": "two"}\n'
    )
    items = importing.KINDS["videos"].items(listed)
    assert [(item.name.split()[0], item.prompt) for item in items] == [
        ("short.mp4", "one"),
        ("b.mp4", "two"),
    ]
    assert importing.recognised(listed) == "videos"
    listed.unlink()


def no_caption(folder):
    (folder / "x.mp4").write_bytes(b"x")


def empty_caption(folder):
    no_caption(folder)
    (folder / "x.txt").write_text(" \n")


def lists(text):
    def write(folder):
        (folder / "x.mp4").write_bytes(b"x")
        (folder / "list.jsonl").write_text(text)
        return folder / "list.jsonl"

    return write


WRONG = {
    "no caption": (no_caption, "1 of 1 videos have no caption .*x.mp4.* write each into"),
    "empty caption": (empty_caption, "x.txt is empty"),
    "no such video": (lists('{"file": "y.mp4", "prompt": "a"}'), "video 1: .*y.mp4 does not exist"),
    "no prompt": (lists('{"file": "x.mp4", "prompt": ""}'), "video 1: prompt is empty"),
    "misspelt": (lists('{"file": "x.mp4", "promt": "a"}'), "video 1: .*promt.* is not"),
    "no table": (lists('{"file": "x.mp4", "prompt": "a"}\n[1]'), "more than tables"),
    "not JSON": (lists('{"file": "x.mp4", '), "cannot be read"),
}


@pytest.mark.parametrize("case", WRONG)
def test_videos_without_what_they_need_are_refused(tmp_path, case):
    make, named = WRONG[case]
    source = make(tmp_path) or tmp_path
    with pytest.raises(InputError, match=named):
        importing.KINDS["videos"].items(source)


def test_sources_are_told_by_what_they_hold(films, tmp_path):
    (tmp_path / "prompts.txt").write_text("a film")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a film"}')
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "data.mdb").write_bytes(b"")
    (tmp_path / "blank").mkdir()
    assert importing.recognised(films) == "videos"
    assert importing.recognised(tmp_path / "prompts.txt") == "prompts"
    assert importing.recognised(tmp_path / "prompts.jsonl") == "prompts"
    assert importing.recognised(tmp_path / "base") == "lmdb"
    assert importing.recognised(tmp_path) == "lmdb"
    (tmp_path / "one.mp4").write_bytes(b"")
    for name, named in (
        ("blank", "nothing that can be prepared"),
        ("one.mp4", "nothing"),
        ("nowhere", "does not"),
    ):
        with pytest.raises(InputError, match=named):
            importing.recognised(tmp_path / name)


def test_prompts_of_a_file(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n{"timeline": [[0, "b"]]}\n')
    items = importing.KINDS["prompts"].items(path)
    assert [item.prompt for item in items] == ["a", "b"]
    path.write_text('{"timeline": [[0, "b"], [2, "c"]]}')
    with pytest.raises(InputError, match="line 1 is a timeline.*kind=prompts"):
        importing.KINDS["prompts"].items(path)


def test_every_prompt_is_read_once_and_only_as_far_as_it_goes(parts, monkeypatch):
    walks = []
    walk = importing.Texts._walk
    monkeypatch.setattr(
        importing.Texts, "_walk", lambda self, new: walks.append(new) or walk(self, new)
    )
    said = ["a red disc walks", "a lime square walks slowly", "a red disc walks", "a red disc"]
    read = importing.Texts(parts, [*said, said[0]])
    states = read(said)
    assert np.array_equal(read([said[0]])[0], states[0])
    assert walks == [[said[0], said[1], said[3]]]
    assert [len(each) for each in states] == [5, 6, 5, 4]
    ids, mask = parts.tokenizer.encode(said[:2])
    whole = np.asarray(parts.text(ids, mask))
    assert np.array_equal(states[1], whole[1, :6])
    assert not whole[1, 6:].any()
    assert read._known == {}


def test_a_digest_changes_with_names_prompts_and_order():
    items = [
        importing.Item(str(name), prompt, lambda parts: {}) for name, prompt in ((1, "a"), (2, "b"))
    ]
    changed = [items[::-1], items[:1], [dataclasses.replace(items[0], prompt="c"), items[1]]]
    assert len({importing.digest(each) for each in (items, *changed)}) == 4


def test_a_model_gives_what_it_has(folder, tmp_path):
    parts = importing.parts_of(tiny.EXP, None)
    assert parts.vae is not None, "an exact codec needs no weights"
    assert parts.text is None
    wan = dataclasses.replace(tiny.EXP, codec=WAN)
    assert importing.parts_of(wan, None).vae is None
    with pytest.raises(InputError, match="other sizes than --config asks for"):
        importing.parts_of(wan, model_folder.opened(folder))


def base(path, form, prompts, *, change=lambda entries: entries):
    """An LMDB folder as the public ones are, and its latents."""
    lmdb = pytest.importorskip("lmdb")
    latents = np.random.default_rng(len(prompts)).normal(size=form).astype(np.float16)
    entries = {
        "latents_shape": " ".join(map(str, form)).encode(),
        "prompts_shape": str(len(prompts)).encode(),
    }
    for index, prompt in enumerate(prompts):
        entries |= {
            f"latents_{index}_data": latents[index].tobytes(),
            f"prompts_{index}_data": prompt.encode(),
        }
    with lmdb.open(str(path), map_size=2**24) as database, database.begin(write=True) as writing:
        for key, value in change(entries).items():
            writing.put(key.encode(), value)
    return latents


def test_public_trajectories_are_turned_into_ours(tmp_path, parts):
    latents = base(tmp_path / "base", (2, 4, 17, 12, 8, 4), ["a red disc", "ein Käse"])
    items = importing.KINDS["lmdb"].items(tmp_path / "base")
    assert [item.prompt for item in items] == ["a red disc", "ein Käse"]
    made = items[1].made(parts)
    assert made["trajectory"].shape == (4, 15, 8, 4, 12)
    assert np.array_equal(made["trajectory"][2, 7, 5, 3], latents[1, 2, 7, :, 5, 3])
    assert np.array_equal(made["latent"], made["trajectory"][-1])
    assert made["latent"].dtype == np.float16
    clip = codec.decode(parts.vae, jnp.asarray(made["latent"], jnp.float32)[None])
    low_res = codec.low_res_latents(parts.vae, clip[:, 3:6], latents=2, pool=(2, 2, 1))
    np.testing.assert_allclose(made["low_res"][1], low_res[0], atol=2e-3)


def test_a_teacher_is_guided_away_from_the_negative_prompt_as_its_encoder_reads_it(folder):
    model = model_folder.opened(folder)
    train = config.TrainConfig(negative_prompt="blue")
    told = importing.parts_of(tiny.EXP, model, ("text", "teacher"), train)
    (states,) = importing.Texts(told, ["blue"])(["blue"])
    np.testing.assert_array_equal(told.null_text, states)
    assert importing.parts_of(tiny.EXP, model, ("text", "teacher")).null_text is None
    assert importing.parts_of(tiny.EXP, model, ("text",), train).null_text is None


def test_clips_without_states_and_folders_of_folders(tmp_path):
    for name, count in (("shard_b", 1), ("shard_a", 2)):
        base(
            tmp_path / name, (count, 15, 12, 8, 4), [f"{name} {number}" for number in range(count)]
        )
    items = importing.KINDS["lmdb"].items(tmp_path)
    assert [item.prompt for item in items] == ["shard_a 0", "shard_a 1", "shard_b 0"]
    made = items[2].made(importing.Parts(tiny.EXP))
    assert set(made) == {"latent"}
    assert made["latent"].shape == (15, 8, 4, 12)


BROKEN = {
    "no prompt": (
        lambda held: {key: held[key] for key in held if not key.startswith("prompts_0")},
        "has no entry",
    ),
    "no shape": (lambda held: {}, "has no entry latents_shape"),
    "odd shape": (lambda held: held | {"latents_shape": b"1 x 12 8 4"}, "latents_shape="),
    "cut latents": (lambda held: held | {"latents_0_data": b"12"}, "latents_0_data has 2 bytes"),
    "wide": (
        lambda held: held | {"latents_shape": b"1 15 12 4 8"},
        r"15 frames of \[4, 8, 12\], but clip=15",
    ),
    "short": (lambda held: held | {"latents_shape": b"1 3 5 12 8 4"}, "holds 5 frames"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_databases_that_lack_something_are_refused(tmp_path, case):
    change, named = BROKEN[case]
    base(tmp_path / "base", (1, 15, 12, 8, 4), ["a"], change=change)
    with pytest.raises(InputError, match=named):
        importing.KINDS["lmdb"].items(tmp_path / "base")[0].made(importing.Parts(tiny.EXP))


def test_a_damaged_database_is_refused(tmp_path):
    pytest.importorskip("lmdb")
    (tmp_path / "data.mdb").write_bytes(b"x" * 5000)
    with pytest.raises(InputError, match="is no LMDB file"):
        importing.KINDS["lmdb"].items(tmp_path)


def test_without_its_library_a_database_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lmdb", None)
    (tmp_path / "data.mdb").write_bytes(b"")
    with pytest.raises(InputError, match=r"install packforcing-jax\[lmdb\]"):
        importing.KINDS["lmdb"].items(tmp_path)


def test_tables_may_be_long(tmp_path):
    (tmp_path / "x.mp4").write_bytes(b"x")
    line = json.dumps({"file": "x.mp4", "prompt": "word " * 5000})
    (tmp_path / "list.jsonl").write_text(line)
    assert len(importing.KINDS["videos"].items(tmp_path / "list.jsonl")[0].prompt) == 24_999
