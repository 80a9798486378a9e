"""The bridge to VBench: weights are planned, processes are limited, traps are sentences, one failure stops no other.

VBench itself is not here. A small program stands in for what runs in its environment and behaves as each test asks.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from packforcing_jax.cli import main
from packforcing_jax.errors import InputError, MachineError
from packforcing_jax.evaluation import (
    bridge,
    vbench_driver,
    vbench_metrics,
    vbench_process,
    vbench_suite,
)
from packforcing_jax.evaluation.bridge import Options, evaluate
from packforcing_jax.evaluation.video_files import Prompt, VideoFile

SEVEN = [*vbench_metrics.METRICS]
FILM = {"frames": 12, "width": 192, "height": 128, "fps": 8.0}
VIDEOS = ("a.mp4", "b_2.MP4")
PROMPTS = {"a.mp4": Prompt("a disc", "a red disc that walks"), "b_2.MP4": Prompt("a square")}
FAKE = '''
    """Stands in for vbench_driver.py: FAKE says by metric what to do, SEEN is where it notes what it was given."""
    import json, os, pathlib, subprocess, sys, time

    asked = json.loads(pathlib.Path(sys.argv[1]).read_text())
    seen = pathlib.Path(os.environ["SEEN"])
    fake = json.loads(os.environ.get("FAKE", "{}"))
    name = asked.get("metric", "inspect")
    cache = pathlib.Path(os.environ.get("VBENCH_CACHE_DIR", "/nowhere"))
    files = [os.path.relpath(os.path.join(at, each), cache) for at, _, names in os.walk(cache, followlinks=True)
             for each in names]
    with (seen / "calls.jsonl").open("a") as out:
        out.write(json.dumps({"name": name, "asked": asked, "env": dict(os.environ), "files": files,
                              "flags": [sys.flags.isolated, sys.flags.dont_write_bytecode]}) + "\\n")
    do = fake.get(name, "work")
    if name == "inspect":
        said = {"python": "3.11.7", "versions": {"vbench": "0.1.5", "torch": "2.13.0"},
                "vocabulary": fake.get("vocabulary"), "videos": {}}
        for path in asked["videos"]:
            film = fake.get("films", {}).get(os.path.basename(os.path.realpath(path)), {})
            said["videos"][path] = film if "error" in film else {**FILM, **film}
        said |= fake.get("said", {})
    elif do == "hang":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        (seen / "child").write_text(str(child.pid))
        time.sleep(60)
    elif do == "odd" and any("square" in text for text in asked["videos"].values()):
        raise ValueError("odd")
    elif do == "crash":
        raise ValueError("the network has other shapes")
    elif do == "say":
        said = {"error": "OSError: the network is not allowed"}
    elif do == "kill":
        os.kill(os.getpid(), 9)
    elif do == "less":
        said = {"dataset": 1.0, "videos": {}}
    else:
        numbers = {path: {"nan": float("nan")}.get(do, 0.25 * (1 + i)) for i, path in enumerate(asked["videos"])}
        scale = 100 if name == "imaging_quality" else 1
        said = {"dataset": sum(numbers.values()) / len(numbers) / scale + (do == "off"), "videos": numbers}
        if name in ("clip", "overall_consistency"):
            said["tokens"] = {"read": 32, "counts": {path: len(text) for path, text in asked["videos"].items()}}
        if name == "clip":
            said["windows"] = {path: {"values": [30.0, 28.5], "frames": [[0, 4], [8]]} for path in numbers}
    print("Loading ...")
    pathlib.Path(sys.argv[2]).write_text(json.dumps(said))
'''


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Videos, a cache in which every weight lies whole at a small size, and the stand-in of the driver."""
    return World(tmp_path, monkeypatch)


class World:
    def __init__(self, root, monkeypatch):
        self.root, self.monkeypatch = root, monkeypatch
        self.out, self.cache, self.seen = root / "out", root / "cache", root / "seen"
        self.seen.mkdir()
        monkeypatch.setenv("SEEN", str(self.seen))
        monkeypatch.setenv("XDG_CACHE_HOME", str(root / "user"))
        driver = root / "driver.py"
        driver.write_text(textwrap.dedent(FAKE).replace("FILM", repr(FILM)))
        monkeypatch.setattr(vbench_process, "DRIVER", driver)
        self.folder = root / "videos"
        self.folder.mkdir()
        self.videos = [VideoFile(name, self.folder / name) for name in VIDEOS]
        for video in self.videos:
            video.path.write_bytes(video.name.encode())
        self.suites = {suite: small(metrics) for suite, metrics in vbench_metrics.SUITES.items()}
        monkeypatch.setattr(bridge, "SUITES", self.suites)
        for weight in self.weights():
            for name in weight.members or ("",):
                path = self.place(weight) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(f"{weight.name} {name}".encode().ljust(weight.size, b"."))

    def weights(self):
        return {
            x for metrics in self.suites.values() for each in metrics.values() for x in each.weights
        }

    def place(self, weight):
        return self.cache / weight.places[0]

    def weight(self, name):
        return next(self.place(each) for each in self.weights() if each.name == name)

    def fake(self, **what):
        self.monkeypatch.setenv("FAKE", json.dumps(what))

    def run(self, videos=None, prompts=PROMPTS, **options):
        self.said = []
        chosen = {"weights_cache": self.cache, **options}
        return evaluate(
            self.videos if videos is None else videos,
            prompts,
            Options(Path(sys.executable), **chosen),
            self.out,
            self.said.append,
        )

    def calls(self):
        path = self.seen / "calls.jsonl"
        found = (
            [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        )
        path.unlink(missing_ok=True)
        return found

    def flags(self, *more):
        """The words of a command about these videos."""
        at = ["--environment", sys.executable, "--weights-cache", str(self.cache)]
        return ["evaluate", str(self.folder), "--out", str(self.out), *at, *more]

    def prompt_file(self):
        path = self.root / "prompts.jsonl"
        tables = [{"file": name, "prompt": each.prompt} for name, each in PROMPTS.items()]
        path.write_text("".join(json.dumps(table) + "\n" for table in tables))
        return str(path)

    def written(self):
        return json.loads((self.out / "results.json").read_text())


def small(metrics):
    """The same metrics with weights of 2,000 bytes."""
    return {
        name: dataclasses.replace(
            each, weights=tuple(dataclasses.replace(x, size=2000) for x in each.weights)
        )
        for name, each in metrics.items()
    }


def test_seven_numbers_a_video_and_all_that_they_depend_on(world):
    results = world.run()
    assert results.complete
    told = json.loads(json.dumps(results._asdict(), allow_nan=False))
    for number, video in enumerate(VIDEOS):
        about = told["videos"][video]
        assert about["figures"] == dict.fromkeys(SEVEN, 0.25 * (1 + number))
        assert about["film"] == FILM
        assert about["prompt"] == PROMPTS[video].prompt
    assert told["videos"]["a.mp4"]["tokens"] == {"overall_consistency": {"prompt": 6, "read": 32}}
    protocol = told["protocol"]
    assert protocol["versions"] == {"vbench": "0.1.5", "torch": "2.13.0"}
    assert protocol["rule"] == "short"
    assert protocol["protocol"].startswith("whole")
    assert protocol["stand_in_weights"] is False
    assert set(SEVEN) == set(protocol["seconds"])
    assert protocol["dataset"]["imaging_quality"] == pytest.approx(0.375 / 100)
    lists = protocol["weights"]
    assert len(lists) == 9 + 3, "nine files and the three of DINO's repository"
    assert {each["bytes"] for each in lists.values()} == {2000}
    assert lists["ViT-B-32.pt"]["published"] is False, "its hash is known, and it is another"
    assert lists["amt-s.pth"]["published"] is None


def test_every_metric_is_a_process_of_its_own_that_sees_plain_names_and_its_weights(world):
    world.run()
    inspect, *calls = world.calls()
    assert inspect["name"] == "inspect"
    assert [each["name"] for each in calls] == SEVEN
    for call in calls:
        assert call["flags"] == [1, 1], "nothing of ours on its path"
        names = [Path(path).name for path in call["asked"]["videos"]]
        assert names == ["000000.mp4", "000001.mp4"]
        assert list(call["asked"]["videos"].values()) == ["a disc", "a square"]
        for weight in world.weights():
            staged = [place.removeprefix("vbench/") for place in weight.places if "vbench" in place]
            inside = [f"{place}/{name}" for place in staged for name in weight.members]
            assert set(inside or staged) <= set(call["files"])


@pytest.mark.parametrize("fault", ["missing", "cut off"])
def test_a_missing_weight_is_named_with_size_and_place_before_anything_starts(world, fault):
    path = world.weight("raft-things.pth")
    if fault == "missing":
        path.unlink()
    else:
        path.write_bytes(b"x" * 900)
    results = world.run()
    first = world.said[0]
    assert "raft-things.pth (2,000 bytes, of princeton-vl/RAFT" in first
    assert str(path) in first
    assert ("is missing" if fault == "missing" else "is cut off at 900 bytes") in first
    assert first.endswith("for dynamic_degree")
    assert results.failed == {"dynamic_degree": "weights missing: raft-things.pth"}
    assert [each["name"] for each in world.calls()[1:]] == [
        x for x in SEVEN if x != "dynamic_degree"
    ]
    for about in results.videos.values():
        assert len(about["figures"]) == 6
    assert "raft-things.pth" not in results.protocol["weights"]


def test_a_weight_that_two_metrics_read_is_listed_once_with_both(world):
    world.weight("ViT-B-32.pt").unlink()
    (world.weight("facebookresearch_dino_main") / "utils.py").unlink()
    results = world.run()
    told = [line for line in world.said if line.startswith("weights")]
    assert len(told) == 2
    assert any("lacks utils.py" in line and "subject_consistency" in line for line in told)
    assert set(results.failed) == {"subject_consistency", "background_consistency"}


def test_the_second_place_of_a_weight_does_as_well(world):
    where = world.weight("dino_vitbase16_pretrain.pth")
    other = world.cache / "vbench/dino_model/dino_vitbase16_pretrain.pth"
    where.rename(other)
    words = world.weight("bpe_simple_vocab_16e6.txt.gz")
    package = world.root / "clip"
    package.mkdir()
    words.rename(package / words.name)
    world.fake(vocabulary=str(package / words.name))
    assert world.run().complete
    assert "ViCLIP/bpe_simple_vocab_16e6.txt.gz" in world.calls()[-1]["files"]


def test_no_metric_at_all_is_refused_and_nothing_is_written(world):
    for weight in world.weights():
        if not weight.members:
            world.place(weight).unlink()
    with pytest.raises(
        InputError, match=r"no metric can start.*amt-s.pth.*2,000 bytes.*--weights-cache"
    ):
        world.run()
    assert not (world.out / "metrics").exists()
    assert [each["name"] for each in world.calls()] == ["inspect"]


FAILURES = {
    "crash": "ValueError: the network has other shapes",
    "say": "OSError: the network is not allowed",
    "kill": "SIGKILL, as when memory runs out",
    "less": "gave no value for a.mp4",
    "off": "value of all videos is 1.25, formed here it is 0.25",
}


@pytest.mark.parametrize("how", FAILURES)
def test_a_metric_that_fails_is_named_and_the_others_go_on(world, how):
    world.fake(motion_smoothness=how)
    results = world.run()
    assert set(results.failed) == {"motion_smoothness"}
    assert results.absent == {}
    assert FAILURES[how] in results.failed["motion_smoothness"]
    for about in results.videos.values():
        assert list(about["figures"]) == [name for name in SEVEN if name != "motion_smoothness"]
    assert any("motion_smoothness failed" in line for line in bridge.reasons(results))
    world.fake()
    again = world.run()
    assert again.complete, "what failed is tried again"
    assert [each["name"] for each in world.calls()[-1:]] == ["motion_smoothness"]


def test_a_video_that_a_metric_fails_at_costs_the_others_nothing(world):
    world.fake(motion_smoothness="odd")
    results = world.run()
    assert results.failed == {}
    (reason,) = results.absent.pop("b_2.MP4").values()
    assert reason.startswith(
        "has no motion_smoothness: exit code 1 and no answer (ValueError: odd)"
    )
    assert results.absent == {}
    assert results.videos["a.mp4"]["figures"]["motion_smoothness"] == 0.25
    assert len(results.videos["b_2.MP4"]["figures"]) == 6


def test_a_metric_that_hangs_ends_at_the_time_limit_with_all_that_it_started(world):
    world.fake(imaging_quality="hang")
    start = time.monotonic()
    results = world.run(time_limit=3)
    assert time.monotonic() - start < 40
    assert "no answer within 3 seconds (--time-limit)" in results.failed["imaging_quality"]
    assert len(results.videos["a.mp4"]["figures"]) == 6
    child = int((world.seen / "child").read_text())
    assert gone(child)


def test_an_interruption_ends_the_process_too_and_keeps_what_was_finished(world):
    world.fake(background_consistency="hang")
    child = world.seen / "child"

    def interrupt():
        while not (child.exists() and child.read_text()):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        world.run()
    assert gone(int(child.read_text()))
    world.calls()
    world.fake()
    assert world.run().complete
    assert [each["name"] for each in world.calls()[1:]] == SEVEN[1:]


def gone(pid):
    """Whether a process has ended, at once or a moment later."""
    for _ in range(100):
        status = Path(f"/proc/{pid}/stat")
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


def test_not_a_number_is_a_sentence_and_the_file_is_plain_json(world):
    world.fake(aesthetic_quality="nan")
    results = world.run()
    assert results.absent == {
        name: {
            "aesthetic_quality": "has no aesthetic_quality: the official code returned not a number"
        }
        for name in VIDEOS
    }
    assert "NaN" not in (world.out / "metrics" / "aesthetic_quality.json").read_text()
    assert "aesthetic_quality" not in results.protocol["dataset"]
    assert "a.mp4 has no aesthetic_quality" in next(bridge.reasons(results))


TRAPS = {
    "small": ({"width": 120, "height": 300}, "is 120x300 pixels; dynamic_degree needs 121 on"),
    "two sampled": (
        {"frames": 4, "fps": 16.0},
        "has 4 frames at 16 a second, of which dynamic_degree takes 2",
    ),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_a_video_that_would_silently_get_a_wrong_value_gets_a_sentence(world, trap):
    film, sentence = TRAPS[trap]
    world.fake(films={"a.mp4": film})
    results = world.run()
    assert set(results.absent) == {"a.mp4"}
    assert set(results.absent["a.mp4"]) == {"dynamic_degree"}
    assert results.absent["a.mp4"]["dynamic_degree"].startswith(sentence)
    call = next(each for each in world.calls() if each["name"] == "dynamic_degree")
    assert list(call["asked"]["videos"].values()) == ["a square"]
    assert results.videos["b_2.MP4"]["figures"]["dynamic_degree"] == 0.25


def test_the_smallest_and_shortest_video_that_raft_can_judge_is_judged(world):
    least = {"width": 121, "height": 160, "frames": 5, "fps": 16.0}
    world.fake(films=dict.fromkeys(VIDEOS, least))
    assert world.run().complete


def test_pictures_too_small_for_the_frames_between_frames_are_named(world):
    world.fake(films=dict.fromkeys(VIDEOS, {"width": 48, "height": 64}))
    results = world.run()
    assert set(results.absent["a.mp4"]) == {"motion_smoothness", "dynamic_degree"}
    world.fake(films=dict.fromkeys(VIDEOS, {"width": 49, "height": 64}))
    assert set(world.run().absent["a.mp4"]) == {"dynamic_degree"}


def test_videos_of_few_frames_have_only_the_metrics_that_can_read_them(world):
    world.fake(films={"a.mp4": {"frames": 2}, "b_2.MP4": {"frames": 1}})
    results = world.run()
    assert set(results.absent["a.mp4"]) == {"motion_smoothness", "dynamic_degree"}
    pairs = {"subject_consistency", "background_consistency"}
    assert set(results.absent["b_2.MP4"]) == {"motion_smoothness", "dynamic_degree"} | pairs
    assert (
        results.absent["a.mp4"]["motion_smoothness"]
        == "has 2 frames; motion_smoothness needs 3 at least"
    )
    assert {"motion_smoothness", "dynamic_degree"}.isdisjoint({x["name"] for x in world.calls()})


def test_videos_that_cannot_be_read_are_named_and_skipped(world):
    world.fake(films={"a.mp4": {"error": "DECORDError: no stream"}, "b_2.MP4": {}})
    results = world.run()
    assert results.skipped == {"a.mp4": "cannot be read (DECORDError: no stream)"}
    assert list(results.videos) == ["b_2.MP4"]
    world.fake(films={"a.mp4": {"error": "x"}, "b_2.MP4": {"frames": 0}})
    with pytest.raises(
        InputError, match=r"no video can be read: a.mp4 cannot.*b_2.MP4 has 0 frames"
    ):
        world.run()


def test_the_network_is_closed_unless_it_is_allowed(world):
    for name in ("http_proxy", "HTTPS_PROXY", "no_proxy", "PYTHONPATH"):
        world.monkeypatch.setenv(name, "of-the-user")
    world.monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    world.run()
    for call in world.calls():
        env = call["env"]
        assert env["http_proxy"] == env["HTTPS_PROXY"] == env["all_proxy"] == "http://127.0.0.1:9"
        assert {"no_proxy", "NO_PROXY", "PYTHONPATH"}.isdisjoint(env)
        assert env["HF_HUB_OFFLINE"] == env["TRANSFORMERS_OFFLINE"] == "1"
        for key in ("HOME", "TORCH_HOME", "VBENCH_CACHE_DIR", "XDG_CACHE_HOME", "TMPDIR"):
            assert not Path(env[key]).exists(), "of the run alone, and gone with it"
        assert call["asked"].get("allow_network", False) is False
    world.weight("amt-s.pth").unlink()
    world.weight("raft-things.pth").write_bytes(b"half")
    results = world.run(allow_network=True)
    assert set(results.failed) == {"dynamic_degree"}, "a file that is cut off would only be read"
    assert "VBench may fetch amt-s.pth itself" in "".join(world.said)
    (call,) = [each for each in world.calls() if each["name"] == "motion_smoothness"]
    assert call["asked"]["allow_network"] is True
    assert call["env"]["http_proxy"] == "of-the-user"
    assert "HF_HUB_OFFLINE" not in call["env"]
    assert call["env"]["VBENCH_CACHE_DIR"] == str(world.cache / "vbench")
    assert call["env"]["TORCH_HOME"] == str(world.cache / "torch")


def test_a_second_run_asks_only_for_what_is_new(world):
    first = world.run()
    world.calls()
    again = world.run()
    assert [each["name"] for each in world.calls()] == ["inspect"]
    assert again.videos == first.videos
    assert again.protocol["dataset"] == first.protocol["dataset"]
    world.weight("amt-s.pth").write_bytes(b"other".ljust(2000, b"."))
    world.run()
    assert [each["name"] for each in world.calls()[1:]] == ["motion_smoothness"]
    other = {"a.mp4": Prompt("a ring"), "b_2.MP4": PROMPTS["b_2.MP4"]}
    world.run(prompts=other)
    (call,) = world.calls()[1:]
    assert call["name"] == "overall_consistency"
    assert list(call["asked"]["videos"].values()) == ["a ring"]
    world.videos[1].path.write_bytes(b"another film")
    world.run(prompts=other)
    assert [list(x["asked"]["videos"].values()) for x in world.calls()[1:]] == [["a square"]] * 7


def test_many_videos_go_through_several_processes_and_a_failure_keeps_the_finished_ones(world):
    world.monkeypatch.setattr(bridge, "TOGETHER", 1)
    world.run()
    calls = [each["name"] for each in world.calls()[1:]]
    assert calls == [name for name in SEVEN for _ in VIDEOS]


def test_prompts_are_scored_under_the_rule_that_is_named(world):
    results = world.run(rule="extended")
    assert results.protocol["rule"] == "extended"
    assert results.videos["a.mp4"]["prompt"] == "a red disc that walks"
    assert results.absent == {
        "b_2.MP4": {
            "overall_consistency": "has no prompt under this rule; overall_consistency reads one: give it in --prompts"
        }
    }


def test_windows_of_clip_score_come_with_their_frames_and_the_decline(world):
    results = world.run(suite="clip", rate=2, window=10)
    about = results.videos["a.mp4"]
    assert about["windows"] == {"clip": [30.0, 28.5]}
    assert about["frames"] == {"clip": [[0, 4], [8]]}
    one = vbench_suite.measured(about, {})
    assert one.figures == {"clip": 0.25, "clip_decline": 1.5}
    assert (one.first, one.last) == ({"clip": 30.0}, {"clip": 28.5})
    about["windows"]["clip"] = [30.0, None]
    assert "clip_decline" not in vbench_suite.measured(about, {}).figures
    about["windows"]["clip"] = [2.0]  # one window declines by nothing that was measured
    assert "clip_decline" not in vbench_suite.measured(about, {}).figures
    assert results.protocol["settings"] == {"rate": 2, "window": 10}
    world.calls()
    world.run(suite="clip", rate=4, window=10)
    (call,) = world.calls()[1:]
    assert (call["asked"]["rate"], call["asked"]["window"]) == (4, 10)


def test_the_data_sets_value_counts_pairs_where_the_official_code_does():
    films = {"long": vbench_metrics.Film(11, 9, 9, 8), "short": vbench_metrics.Film(3, 9, 9, 8)}
    values = {"long": 1.0, "short": 0.4}
    subject = vbench_metrics.METRICS["subject_consistency"]
    assert vbench_metrics.dataset_value(subject, values, films) == pytest.approx((10 + 0.8) / 12)
    imaging = vbench_metrics.METRICS["imaging_quality"]
    assert vbench_metrics.dataset_value(imaging, values, films) == pytest.approx(0.007)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"suite": "vbenhc"}, "suite 'vbenhc'"),
        ({"rule": "long"}, "rule 'long'"),
        ({"metrics": ("dynamic",)}, "no metric 'dynamic'; did you mean dynamic_degree"),
        ({"suite": "clip", "metrics": ("dynamic_degree",)}, "suite clip has no metric"),
        ({"protocol": "long"}, "VBench-Long cannot be run: it reads"),
        ({"protocol": "whale"}, "protocol 'whale'"),
        ({"device": "cuda:1"}, "CUDA_VISIBLE_DEVICES"),
        ({"time_limit": 0}, "time limit 0"),
        ({"window": float("nan")}, "window nan"),
    ],
)
def test_options_that_cannot_be_are_refused(options, named):
    with pytest.raises(InputError, match=named):
        Options(Path(sys.executable), **options)


def test_an_environment_without_python_or_vbench_says_how_to_make_one(world):
    with pytest.raises(
        InputError, match=r"has no Python that starts; make one with .*vbench_process"
    ):
        evaluate(world.videos, {}, Options(world.root), world.out, print)
    world.fake(said={"versions": {"vbench": None}})
    with pytest.raises(InputError, match="has no vbench; make one with"):
        world.run()
    world.monkeypatch.setattr(vbench_process, "DRIVER", Path(vbench_driver.__file__))
    real = Options(Path(sys.executable), weights_cache=world.cache)
    with pytest.raises(InputError, match=r"has no vbench|cannot be used: ModuleNotFoundError"):
        evaluate(world.videos, {}, real, world.out, print)


def test_evaluate_writes_the_folder_of_results_of_every_suite(world, capsys):
    flags = world.flags("--prompts", world.prompt_file(), "--suite", "vbench")
    assert main.main(flags) == 0
    found = world.written()
    assert set(found["protocol"]["figures"]) == set(SEVEN)
    assert found["protocol"]["suite"] == "vbench"
    assert found["protocol"]["rule"] == "short"
    for number, video in enumerate(VIDEOS):
        about = found["videos"][video]
        assert about["figures"] == dict.fromkeys(SEVEN, 0.25 * (1 + number))
        assert about["prompt"] == PROMPTS[video].prompt
    assert found["lacking"] == []
    told = capsys.readouterr().out
    assert "STAND-IN" not in told
    assert (
        "not_the_published_weights ViT-B-32.pt, ViT-L-14.pt, musiq_spaq_ckpt-358bb6af.pth" in told
    )
    for name in ("figures.csv", "windows.csv", "results.md", "curves.png"):
        assert (world.out / name).stat().st_size > 0


def test_evaluate_ends_with_1_and_a_sentence_for_what_is_lacking(world, capsys):
    (world.cache / "vbench" / vbench_metrics.STAND_INS).write_text("random")
    world.weight("raft-things.pth").unlink()
    world.fake(aesthetic_quality="nan")
    assert main.main(world.flags("--suite", "vbench")) == 1
    told = capsys.readouterr()
    lacking = world.written()["lacking"]
    assert "dynamic_degree failed: weights missing: raft-things.pth." in lacking
    assert any("a.mp4 has no prompt under this rule" in line for line in lacking)
    assert any("a.mp4 has no aesthetic_quality" in line for line in lacking)
    assert all(line in told.err and line in told.out for line in lacking)
    assert vbench_suite.NOTE in told.out
    assert world.written()["protocol"]["note"] == vbench_suite.NOTE
    absent = world.written()["videos"]["a.mp4"]["absent"]
    assert set(absent) == {"overall_consistency", "aesthetic_quality"}


def test_evaluate_measures_the_metrics_that_are_named_and_refuses_what_does_not_fit(world, capsys):
    some = ["--metrics", "motion_smoothness,subject_consistency"]
    assert main.main(world.flags("--suite", "vbench", *some)) == 0
    asked = [each["name"] for each in world.calls()[1:]]
    assert asked == ["subject_consistency", "motion_smoothness"], "in the order of the suite"
    clip = world.flags("--suite", "clip", "--prompts", world.prompt_file())
    clip[clip.index(str(world.out))] = str(world.root / "clip")
    assert main.main(clip) == 0
    (call,) = world.calls()[1:]
    assert (call["asked"]["rate"], call["asked"]["window"]) == (2.0, 10.0)
    capsys.readouterr()
    for words, named in (
        (world.flags("--suite", "vbench", "--rate", "2"), "--rate is nothing that suite vbench"),
        (world.flags("--suite", "native"), "--environment is nothing that suite native reads"),
        (world.flags("--suite", "vbench", "--protocol", "long"), "VBench-Long cannot be run"),
        (world.flags("--suite", "clip"), "holds results of suite vbench"),
        (["evaluate", "--time-limit", "3"], "--time-limit is about video files"),
        (["evaluate", str(world.folder), "--suite", "clip", "--out", "x"], "needs --environment"),
    ):
        assert main.main(words) == 2, words
        assert named in capsys.readouterr().err


# The driver


def test_frames_of_clip_windows_are_at_a_fixed_rate_and_never_beyond_the_end():
    assert vbench_driver.sampled(12, 8.0, 2, 1) == [[0, 4], [8]]
    assert vbench_driver.sampled(1, 24.0, 2, 10) == [[0]]
    groups = vbench_driver.sampled(481, 16.0, 2, 10)
    assert [len(each) for each in groups] == [20, 20, 20, 1]
    assert groups[1][0] == 160
    assert groups[-1] == [480]


@pytest.mark.parametrize(
    "attempt",
    [
        "import socket; socket.create_connection(('127.0.0.1', 9))",
        "import urllib.request; urllib.request.urlopen('http://localhost:9')",
        "import subprocess; subprocess.run(['wget', 'x'])",
        "import subprocess; subprocess.run(['/usr/bin/git', 'clone', 'x'])",
    ],
)
def test_a_process_without_network_fails_at_once_whatever_it_tries(attempt):
    code = f"import vbench_driver; vbench_driver.forbid_network()\n{attempt}"
    folder = str(Path(vbench_driver.__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": folder},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "OSError: the network is not allowed" in done.stderr
    allowed = "import vbench_driver, subprocess, sys; vbench_driver.forbid_network()\n"
    allowed += "subprocess.run([sys.executable, '-c', ''], check=True)"
    subprocess.run(
        [sys.executable, "-c", allowed], env={**os.environ, "PYTHONPATH": folder}, check=True
    )


def test_the_driver_answers_an_error_in_one_line(tmp_path, capsys):
    request, answer = tmp_path / "request.json", tmp_path / "answer.json"
    asked = {
        "action": "measure",
        "metric": "motion_smoothness",
        "videos": {},
        "allow_network": True,
    }
    request.write_text(json.dumps(asked | {"device": "cpu"}))
    if vbench_driver.version("vbench") is None:
        assert vbench_driver.main(str(request), str(answer)) == 1
        assert json.loads(answer.read_text())["error"].startswith(
            "ModuleNotFoundError: No module named"
        )
        assert "Traceback" in capsys.readouterr().err
    error = ValueError(
        "\x1b[1mWeights\x1b[0m only\nload failed. " + "x" * 900 + " Unsupported global"
    )
    said = vbench_driver.brief(error)
    assert said.startswith("ValueError: Weights only load failed. xxx")
    assert said.endswith("Unsupported global")
    assert len(said) < 450


# The environment


def test_an_environment_that_cannot_be_made_leaves_nothing(tmp_path, monkeypatch):
    broken = tmp_path / "python"
    broken.write_text('#!/bin/sh\nmkdir -p "$3"\necho "no room" >&2\nexit 1\n')
    broken.chmod(0o755)
    with pytest.raises(MachineError, match="could not be made .no room"):
        vbench_process.make_environment(tmp_path / "env", str(broken))
    assert not (tmp_path / "env").exists()
    with pytest.raises(InputError, match="is there already"):
        vbench_process.make_environment(tmp_path, str(broken))
    with pytest.raises(InputError, match="python-none is not here"):
        vbench_process.make_environment(tmp_path / "env", "python-none")
    assert vbench_process.main([]) == 2
    assert vbench_process.main([str(tmp_path)]) == 2


def test_the_versions_of_the_environment_are_complete_and_exact():
    pinned = [x for x in vbench_process.VERSIONS.read_text().splitlines() if not x.startswith("#")]
    names = [line.partition("==")[0] for line in pinned if line]
    assert len(names) == len(set(names)) == 72
    assert all(line.count("==") == 1 for line in pinned if line)
    for name in ("vbench==0.1.5", "torch==2.13.0", "torchvision==0.28.0", "numpy==1.26.4"):
        assert name in pinned
