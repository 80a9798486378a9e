"""`extend`, `fork` and `replay`: what is made later is what one run makes, and a file says what it was made of."""

import json
import shutil
import struct

import pytest

from packforcing_jax.cli import main
from packforcing_jax.io import video
from packforcing_jax.sampling import video_notes

RED = "a red disc"
BLUE = "the blue figure walks"
SEED = ("--seed", 3)


@pytest.fixture(scope="module")
def told(folder):
    """What runs a command with the tiny model: (exit code, stdout, stderr)."""

    def run(capsys, verb, *words, weights=True):
        given = ["--weights", str(folder)] * weights
        code = main.main([verb, *map(str, words), *given])
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """One run of ten blocks, the prompt changed behind six."""
    place = tmp_path_factory.mktemp("whole")
    (place / "story.txt").write_text(f"0: {RED}\n6: {BLUE}\n")
    words = ["--timeline", place / "story.txt", "--blocks", 10, *SEED, "--out", place / "v.mp4"]
    assert main.main(["sample", "--weights", str(folder), *map(str, words)]) == 0
    return place / "v.mp4"


@pytest.fixture
def begun(capsys, told, tmp_path):
    """The first six blocks of it, with their state; the folder."""
    words = ("--state", tmp_path / "state", "--every", 2, "--out", tmp_path / "v.mp4")
    assert told(capsys, "sample", "--prompt", RED, "--blocks", 6, *SEED, *words)[0] == 0
    return tmp_path


def hashes(path):
    return video_notes.read(path).latents


def fragments(path):
    """All of a file behind its header: notes and frames."""
    content = path.read_bytes()
    return content[next(each.before.bytes for each in video.notes(path)[1:]) :]


def test_an_extended_video_is_that_of_one_run(capsys, told, begun, whole):
    """In two goes, to the byte; where the model lies is known from the state."""
    state = begun / "state"
    code, said, _ = told(capsys, "extend", state, "--prompt", BLUE, "--blocks", 1, weights=False)
    assert (code, said.split(",")[0]) == (0, f"{begun / 'v.mp4'}: blocks 6 to 6")
    code, said, _ = told(capsys, "extend", state, "--seconds", 1.7, "--json", "--keep", 3)
    made = json.loads(said)
    assert (code, made["blocks"], made["new_blocks"]) == (0, 10, 3)
    assert hashes(begun / "v.mp4") == hashes(whole)
    assert fragments(begun / "v.mp4") == fragments(whole)
    assert sorted(int(each.name) for each in state.iterdir()) == [7, 8, 10]  # --every 8


def test_another_file_begins_with_a_copy_and_the_first_one_stays(capsys, told, begun, whole):
    before = (begun / "v.mp4").read_bytes()
    out = begun / "new" / "w.mp4"
    words = ("--timeline", whole.parent / "story.txt", "--blocks", 4, "--out", out)
    assert told(capsys, "extend", begun / "state", *words)[0] == 0
    assert (begun / "v.mp4").read_bytes() == before
    assert hashes(out) == hashes(whole)
    assert fragments(out) == fragments(whole)


def test_what_a_kill_left_behind_the_state_is_made_again(capsys, told, begun):
    """The video is ahead of the state, by whole blocks and half of one."""
    shutil.copytree(begun / "state", begun / "older")
    words = ("--prompt", BLUE, "--change", "flush", "--blocks", 3)
    assert told(capsys, "extend", begun / "state", *words)[0] == 0
    made = (begun / "v.mp4").read_bytes()
    assert [each.change for each in video_notes.read(begun / "v.mp4").told[6:]] == [
        "flush",
        None,
        None,
    ]
    shutil.rmtree(begun / "state")
    (begun / "older").rename(begun / "state")
    (begun / "v.mp4").write_bytes(made[:-500])
    assert told(capsys, "extend", begun / "state", *words)[0] == 0
    assert (begun / "v.mp4").read_bytes() == made


@pytest.mark.parametrize(("at", "kept"), [(4, True), (3, False)])
def test_a_fork_goes_on_as_the_run_it_left(capsys, told, begun, whole, at, kept):
    """From a state that is kept, or made again from the seed; the parent's video and states stay as they are."""
    parent = {path: path.read_bytes() for path in begun.rglob("*") if path.is_file()}
    code, said, err = told(capsys, "fork", begun / "state", "--at", at, "--out", begun / "branch")
    assert (code, "made again" in said, "they are made again" in err) == (0, not kept, not kept)
    words = ("--timeline", whole.parent / "story.txt", "--blocks", 10 - at, "--out")
    assert told(capsys, "extend", begun / "branch", *words, begun / "w.mp4")[0] == 0
    rows = [each.note for each in video.notes(begun / "w.mp4")]
    first = 0 if kept else at  # without the video's beginning
    assert [row["block"] for row in rows] == [*range(first, 10)]
    assert tuple(row["latent"] for row in rows) == hashes(whole)[first:]
    assert all(path.read_bytes() == content for path, content in parent.items())
    words = ("--blocks", 1, "--out", begun / "v.mp4")
    if kept:
        shutil.rmtree(begun / "branch")
        told(capsys, "fork", begun / "state", "--at", at, "--out", begun / "branch")
        code, _, err = told(capsys, "extend", begun / "branch", *words)
        assert (code, "belongs to the state" in err) == (2, True)


@pytest.mark.parametrize(
    ("verb", "words", "said"),
    [
        ("extend", ["{0}/none", "--blocks", 1], "none holds no state; check the path"),
        ("extend", ["{0}/state"], "give --seconds or --blocks"),
        ("extend", ["{0}/state", "--blocks", 1, "--seconds", 1], "give --seconds or --blocks"),
        ("extend", ["{0}/state", "--blocks", 0], "--blocks 0 is not a length"),
        ("extend", ["{0}/state", "--seconds", "nan"], "--seconds nan is not a length"),
        ("extend", ["{0}/state", "--blocks", 1, "--every", 0], "--every 0 is out of range"),
        ("extend", ["{0}/state", "--blocks", 1, "--change", "cut"], "--change cut is about"),
        ("extend", ["{0}/state", "--blocks", 1, "--prompt", "purpel"], "purpel"),
        ("extend", ["{0}/state", "--blocks", 1, "--out", "{0}/state/v.mp4"], "for saves alone"),
        ("fork", ["{0}/state", "--at", 7, "--out", "{0}/b"], "--at 7 is no block"),
        ("fork", ["{0}/state", "--at", -1, "--out", "{0}/b"], "--at -1 is no block"),
        ("fork", ["{0}/state", "--out", "{0}/state"], "choose a new folder"),
        ("replay", ["{0}/none.mp4"], "does not exist"),
        ("replay", ["{0}/v.mp4", "--out", "{0}/v.mp4"], "is the video that is compared"),
        ("replay", ["{0}/v.mp4", "--start", "{0}/v.mp4"], "began with no picture or clip"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence_and_leaves_all_as_it_was(
    capsys, told, begun, verb, words, said
):
    before = {path: path.read_bytes() for path in begun.rglob("*") if path.is_file()}
    code, _, err = told(capsys, verb, *(str(word).format(begun) for word in words))
    assert code == 2
    assert said in err
    assert {path: path.read_bytes() for path in begun.rglob("*") if path.is_file()} == before


def test_a_video_that_is_gone_is_asked_for(capsys, told, begun):
    (begun / "v.mp4").unlink()
    for words in ([], ["--out", begun / "w.mp4"]):
        code, _, err = told(capsys, "extend", begun / "state", "--blocks", 1, *words)
        assert (code, "put " in err) == (2, True)
    assert not (begun / "w.mp4").exists()


def test_a_video_whose_last_blocks_were_made_as_such_is_not_made_longer(capsys, told, tmp_path):
    words = ("--state", tmp_path / "state", "--out", tmp_path / "v.mp4", "--method", "causvid")
    assert told(capsys, "sample", "--prompt", RED, "--blocks", 2, *words)[0] == 0
    code, _, err = told(capsys, "extend", tmp_path / "state", "--blocks", 1)
    assert code == 2
    assert "was ended with block 1, and method causvid makes the last blocks as the last" in err


# Again


def test_a_video_made_again_agrees(capsys, told, whole, tmp_path):
    code, said, _ = told(capsys, "replay", whole, "--out", tmp_path / "again.mp4", weights=False)
    assert (code, said.strip()) == (0, f"{whole}: all 10 latents agree bit for bit")
    assert (tmp_path / "again.mp4").read_bytes() == whole.read_bytes()


def test_a_video_that_was_cut_off_is_made_again_as_far_as_it_goes(capsys, told, whole, tmp_path):
    cut = tmp_path / "cut.mp4"
    notes = video.notes(whole)
    cut.write_bytes(whole.read_bytes()[: notes[7].after.bytes - 9])
    code, said, _ = told(capsys, "replay", cut, "--json")
    made = json.loads(said)
    assert (code, made["blocks"], made["agree"], made["first_difference"]) == (0, 7, True, None)


def test_a_video_with_another_latent_says_from_which_block_on(capsys, told, whole, tmp_path):
    other = tmp_path / "other.mp4"
    wrong = hashes(whole)[4].encode()
    other.write_bytes(whole.read_bytes().replace(wrong, wrong[::-1]))
    code, said, _ = told(capsys, "replay", other)
    assert (code, said.strip()) == (1, f"{other}: latents differ from block 4 of 10 on")


def test_other_weights_say_so(capsys, whole, folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    path = other / "dit.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    for words in (["replay", whole], ["replay", whole, "--start", whole]):
        assert main.main([*map(str, words), "--weights", str(other)]) == 2
        assert "was made with other weights (" in capsys.readouterr().err


def test_a_video_that_says_too_little_is_refused(capsys, told, whole, tmp_path):
    frames = video.read(whole)[:3]
    plain = tmp_path / "plain.mp4"
    with video.Writer(plain, fps=5, size=(192, 384), settings={"seed": 3}) as writer:
        writer.write(frames)
    bare = tmp_path / "bare.mp4"
    with video.Writer(bare, fps=5, size=(192, 384), settings=video.settings(whole)) as writer:
        writer.write(frames)
    late = tmp_path / "late.mp4"
    with video.Writer(late, fps=5, size=(192, 384), settings=video.settings(whole)) as writer:
        writer.write(frames, {"block": 3, "prompt": RED, "latent": "0"})
    for path, said in (
        (plain, "does not say what it was made of"),
        (bare, "holds no notes of its blocks"),
        (late, "holds blocks [3], so not those from the first on"),
    ):
        code, _, err = told(capsys, "replay", path)
        assert (code, said in err) == (2, True), err


def test_notes_lie_where_the_writer_stood(tmp_path):
    """Each note with the positions before and behind its block, whatever the block's length."""
    path = tmp_path / "v.mp4"
    frames = (video.np.random.default_rng(0).random((60, 8, 8, 3)) * 255).astype("uint8")
    stood = [video.Position()]
    with video.Writer(path, fps=5, size=(8, 8), settings={}) as writer:
        for at, count in enumerate((1, 50, 4)):
            writer.write(frames[:count], {"block": at, "said": "a\u00e4\U0001f600"})
            stood.append(writer.position)
    found = video.notes(path)
    assert [each.note["block"] for each in found] == [0, 1, 2]
    assert [(each.before, each.after) for each in found] == list(zip(stood, stood[1:]))
    assert len(video.read(path)) == 55
    with path.open("r+b") as file:  # a box that claims more than there is
        file.seek(found[2].before.bytes)
        file.write(struct.pack(">I", 10**6))
    assert len(video.notes(path)) == 2
