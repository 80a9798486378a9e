"""A comparison: what it draws, that it can be divided and stopped, and what it refuses."""

import json

import numpy as np
import pytest
from PIL import Image

from packforcing_jax.cli import main
from packforcing_jax.errors import InputError
from packforcing_jax.evaluation import comparison as comparing
from packforcing_jax.evaluation import comparison_page, vbench_suite
from packforcing_jax.evaluation.comparison_figures import Found, Reader
from packforcing_jax.evaluation.suite import Meaning, Measured, Results
from packforcing_jax.io import video

SMALL = {
    "name": "Two methods",
    "methods": ["packforcing", "self-forcing-short"],
    "settings": {"quick": ["sample.steps=(1000, 400)"]},
    "seeds": [3, 7],
    "frames": 24,
    "suites": ["stage", "native"],
}


def put(folder, **changes):
    path = folder / "compare.json"
    path.write_text(json.dumps(SMALL | changes))
    return path


def compare(*words):
    return main.main(["compare", *map(str, words)])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The small comparison, drawn in one go."""
    folder = tmp_path_factory.mktemp("whole")
    assert compare(put(folder), "--out", folder / "out") == 0
    return folder / "out"


def test_every_video_is_drawn_once_with_its_figures(whole):
    found = json.loads((whole / "results.json").read_text())
    assert [*found["arms"]] == ["stage-packforcing-quick", "stage-self-forcing-short-quick"]
    for arm, frames in zip(found["arms"].values(), (24, 20), strict=True):
        assert arm["frames"] == [frames]  # a method of one clip ends with it
        assert set(arm["videos"]) == {"seed3", "seed7"}
        assert arm["trained for"] is False  # the steps are others
        values = [each["valid"] for each in arm["videos"].values()]
        assert arm["figures"]["valid"]["mean"] == pytest.approx(np.mean(values))
        assert len(arm["curves"]["valid"]) == (2 if frames > 20 else 1)
    shown = video.read(whole / "videos" / "stage-packforcing-quick" / "seed3.mp4")
    assert len(shown) == 24


def test_a_video_of_a_comparison_is_what_sample_draws(whole, tmp_path):
    words = ["--seed", "3", "--blocks", "6", "--out", str(tmp_path / "a.mp4")]
    assert main.main(["sample", "--set", "sample.steps=(1000, 400)", *words]) == 0
    theirs = video.read(whole / "videos" / "stage-packforcing-quick" / "seed3.mp4")
    np.testing.assert_array_equal(video.read(tmp_path / "a.mp4"), theirs)


def test_the_page_needs_nothing_but_the_files_beside_it(whole):
    page = (whole / "index.html").read_text()
    assert "http" not in page
    assert page.count("<svg") == 8 + 7
    with Image.open(whole / "sheet-seed3.png") as sheet:
        assert sheet.size == (12 * 96, 2 * (14 + 96 + 4))  # a label, frames, a gap
    assert sorted(path.name for path in whole.glob("*.png")) == [
        "sheet-seed3.png",
        "sheet-seed7.png",
    ]
    assert all(name in page for name in ("sheet-seed3.png", "sheet-seed7.png"))
    assert "| stage-packforcing-quick | no | 24 |" in (whole / "results.md").read_text()


def test_results_name_what_else_decides_the_numbers(whole):
    protocol = json.loads((whole / "results.json").read_text())["protocol"]["measured"]
    assert protocol["stage"] == [{"window_frames": 20}]
    (native,) = protocol["native"]
    assert (native["window_seconds"], native["block"]) == (5.0, "of the model")
    assert "Suite native: " in (whole / "results.md").read_text()


def test_shards_put_together_give_the_same_bytes(whole, tmp_path, capsys):
    path, out = put(tmp_path), tmp_path / "out"
    for part in ("2/3", "1/3"):
        assert compare(path, "--out", out, "--shard", part) == 0
        assert not (out / "results.json").exists()
        assert "not finished" in capsys.readouterr().err
    assert compare(path, "--out", out, "--shard", "3/3") == 0
    for name in ("results.json", "results.md", "index.html", "sheet-seed3.png"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert [each.name for each in out.rglob(".*")] == []


def test_what_is_finished_is_kept_and_what_has_changed_is_drawn_again(whole, tmp_path):
    kept = {path: path.stat().st_mtime_ns for path in whole.rglob("*.mp4")}
    first = whole / "videos" / "stage-packforcing-quick" / "seed3.mp4"
    (whole / "figures" / "stage-packforcing-quick" / "seed3.json").write_text("{")
    assert compare(put(tmp_path), "--out", whole) == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    asked = comparing.read(put(tmp_path, settings={"quick": ["sample.steps=(1000, 500)"]}))
    job = comparing.jobs(asked)[0]
    assert comparing.video_path(whole, job) == first
    assert not comparing.drawn(asked, comparing.planned(asked, job.arm), job, whole)


def test_shards_are_parts_of_all_videos(tmp_path):
    every = comparing.jobs(comparing.read(put(tmp_path, seeds=7)))
    parts = [comparing.shard(every, k, 4) for k in (1, 2, 3, 4)]
    assert sorted(job for part in parts for job in part) == sorted(every)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    with pytest.raises(InputError, match="shard 5/4 is none; give one of 1/4 to 4/4"):
        comparing.shard(every, 5, 4)


def test_a_plan_counts_videos_and_draws_none(tmp_path, capsys):
    out = tmp_path / "out"
    assert compare(put(tmp_path, methods=["longlive"]), "--out", out, "--plan", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["total"]["videos"] == 2
    assert found["arms"][0]["blocks"] == 6
    assert 0 < found["total"]["hours"] < 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"method": "x"}, "has the key 'method', which is unknown; did you mean methods"),
        ({"methods": []}, "methods=.* is not names, or 'all'"),
        ({"methods": ["longlve"]}, "did you mean longlive"),
        ({"seeds": 0}, "seeds=.* is not a count, or a list of seeds"),
        ({"seeds": [1, 1]}, "seeds=.* is not a count"),
        ({"frames": "many"}, "frames='many' is not a number"),
        ({"suites": ["vbnch"]}, "suite 'vbnch' is unknown; did you mean vbench"),
        ({"prompts": ["a", "b"], "scored": ["a"]}, "a prompt for each of the prompts"),
        ({"settings": {"a": ["cache.tpo=3"]}}, "cache.tpo: unknown key; did you mean cache.top"),
        ({"weights": {"a": "nowhere"}}, "nowhere does not exist"),
        ({"weights": {"a": "wan_t2v_1_3b"}}, "draw no Stage videos"),
        ({"prompts": "nowhere.txt"}, "nowhere.txt"),
        (
            {"published": {"longlive": {}}},
            "speaks of 'longlive', which is no arm and no method here",
        ),
        ({"published": {"packforcing": {"clip": 3}}}, "is not objects with figures"),
        ({"published": {"packforcing": {"figures": {"clip": "3"}}}}, "is not objects with figures"),
        ({"published": {"packforcing": {"curves": {"clip": 3}}}}, "is not objects with figures"),
        ({"arms": [{"method": "longlive"}]}, "needs either methods, .* or arms one by one"),
    ],
)
def test_a_file_that_cannot_be_drawn_is_refused_in_one_sentence(
    changes, sentence, tmp_path, capsys
):
    path = put(tmp_path, **changes)
    assert compare(path, "--out", tmp_path / "out") == 2
    said = capsys.readouterr().err.strip()
    assert said.count("\n") == 0
    with pytest.raises(AssertionError, match=sentence):
        raise AssertionError(said)
    assert not (tmp_path / "out").exists()


def test_arms_may_be_listed_one_by_one(tmp_path):
    found = {key: value for key, value in SMALL.items() if key != "methods"}
    found["arms"] = [{"method": "longlive"}, {"method": "packforcing", "settings": "quick"}]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(found))
    assert [arm.method for arm in comparing.read(path).arms] == ["longlive", "packforcing"]


def judge(asked, absent):
    """A suite that reads all videos together, notes which it was asked for, and lacks a figure where it is told so."""

    def read(films, options, room):
        asked.append(sorted(films))
        lacks = {"praise": "no weights"} if absent else {}
        return {
            name: Found({"length": len(film.scored)}, {}, lacks, {"judge": "strict"})
            for name, film in films.items()
        }

    meanings = {name: Meaning("letters", "higher", "x") for name in ("length", "praise")}
    return Reader(lambda options: None, read, meanings, together=True)


def test_a_suite_that_reads_all_videos_is_asked_once_and_again_for_what_it_lacked(
    tmp_path, monkeypatch, capsys
):
    asked = []
    prompts = ["a red disc walks slowly before the moss curtain in scene one", "a red disc"]
    path = put(
        tmp_path,
        methods=["self-forcing-short"],
        seeds=[3],
        frames=12,
        suites=["stage", "judge"],
        prompts=prompts,
        scored=["short", "longer"],
    )
    monkeypatch.setitem(comparing.SUITES, "judge", judge(asked, absent=True))
    assert compare(path, "--out", tmp_path / "out") == 0
    arm = "stage-self-forcing-short-quick"
    assert asked == [[f"{arm}/prompt0-seed3.mp4", f"{arm}/prompt1-seed3.mp4"]]
    assert f"{arm} prompt1-seed3 lacks praise: no weights" in capsys.readouterr().err
    found = json.loads((tmp_path / "out" / "results.json").read_text())["arms"][arm]
    assert found["videos"]["prompt1-seed3"]["length"] == len("longer")
    assert found["absent"]["prompt0-seed3"] == {"praise": "no weights"}
    monkeypatch.setitem(comparing.SUITES, "judge", judge(asked, absent=False))
    assert compare(path, "--out", tmp_path / "out") == 0  # now that it has what it lacked
    assert len(asked) == 2
    assert compare(path, "--out", tmp_path / "out") == 0
    assert len(asked) == 2
    assert "absent" in found


def test_published_figures_stand_beside_ours_and_one_video_has_no_interval(whole, tmp_path):
    told = {"figures": {"valid": 0.25, "FVD": 123.5}, "curves": {"valid": [0.5, 0.75, 0.125]}}
    path = put(tmp_path, seeds=[3], published={"packforcing": told})
    found = comparison_page.rows(comparing.results(comparing.read(path), whole))
    columns = [dict(zip(found[0], line, strict=True)) for line in found[1:]]
    at = found[0].index("valid ↑")
    assert found[0][at : at + 2] == ["valid ↑", "valid, published"]
    assert [row["valid, published"] for row in columns] == ["0.25", "-"]
    assert [row["FVD, published"] for row in columns] == ["123.5", "-"]
    for row in columns:
        assert float(row["valid ↑"]) <= 1  # a number alone
    table = comparison_page.windows(comparing.results(comparing.read(path), whole))["valid"]
    assert table[0] == ["arm", "", "window 1", "window 2", "window 3"]
    ours, theirs, short, none = table[1:]
    assert theirs[2:] == ["0.5", "0.75", "0.125"]
    assert ours[1] == "here"
    assert float(ours[3]) <= 1
    assert ours[4] == "-"
    assert short[3:] == ["-", "-"]
    assert none[2:] == ["-", "-", "-"]


def test_stand_in_weights_are_named_on_the_page(tmp_path, monkeypatch):
    """Of figures by official code the page says by which protocol, and that random weights mean nothing."""

    def measured(suite, videos, prompts, options, room):
        protocol = {
            "protocol": "whole videos",
            "versions": {"vbench": "0.1.5"},
            "seconds": {"clip": 3.0},
            "note": vbench_suite.NOTE,
        }
        each = {one.name: Measured({"clip": 2.0}, {}, about={"absent": {}}) for one in videos}
        return Results(suite, protocol, {}, each, {})

    monkeypatch.setattr(vbench_suite, "measure", measured)
    monkeypatch.setattr(vbench_suite, "check", lambda suite, options: None)
    out = tmp_path / "out"
    path = put(tmp_path, methods=["self-forcing-short"], seeds=[3], frames=12, suites=["clip"])
    assert compare(path, "--out", out) == 0
    assert json.loads((out / "results.json").read_text())["protocol"]["measured"]["clip"] == [
        {"protocol": "whole videos", "versions": {"vbench": "0.1.5"}, "note": vbench_suite.NOTE}
    ]
    assert vbench_suite.NOTE in (out / "index.html").read_text()


def test_an_official_suite_needs_its_environment_before_anything_is_drawn(tmp_path, capsys):
    path = put(tmp_path, suites=["vbench"])
    assert compare(path, "--out", tmp_path / "out") == 2
    assert "--environment PATH" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
