"""Live sessions over HTTP and sockets: what the contract says, and that frames are those of `Pipeline.stream`."""

import contextlib
import json
import re
import subprocess
import time
from pathlib import Path

import live
import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed

from packforcing_jax.io import video
from packforcing_jax.live import images, runner
from packforcing_jax.live.watchers import Gone, Shot, Watcher
from packforcing_jax.sampling.drift import Drift
from packforcing_jax.sampling.pipeline import Pipeline

OTHER = "with guest fern"
THIRD = "a blue square walks slowly"


@pytest.fixture(scope="module")
def pipeline(folder):
    return Pipeline.from_pretrained(folder)


@pytest.fixture(scope="module")
def served(pipeline, tmp_path_factory):
    with live.serving_of(
        pipeline, tmp_path_factory.mktemp("root"), sessions=60, drift_window=15
    ) as server:
        yield server


def frames_of(pipeline, prompts, **options):
    """The blocks of an unbroken run, as bytes of pixels."""
    return [video.to_uint8(block.frames) for block in pipeline.stream(prompts, **options)]


def shown(blocks):
    """The frames of the messages of blocks 0, 1, ..."""
    return [images.decoded(blocks[index]) for index in range(len(blocks))]


def equal(some, others):
    return all(map(np.array_equal, some, others)) and len(some) == len(others)


def paused(served, session):
    """A session that has stood still, its blocks by number."""
    with served.watch(session) as client:
        client.say(type="pause", ref="stop")
        client.until(type="applied", ref="stop")
    served.until(lambda: not served.hub.get("sessions", session).making)
    return fetched(served, session)


def fetched(served, session):
    count = served.facts(session)["block"]
    return {k: served.ask("GET", f"/v1/sessions/{session}/blocks/{k}")[1] for k in range(count)}


# Sessions


def test_a_session_says_what_the_contract_says(served):
    status, said, _ = served.ask("POST", "/v1/sessions", {"prompt": live.PROMPT})
    assert status == 201
    assert {"id", "block_frames", "fps", "width", "height", "state"} <= set(said)
    assert (said["block_frames"], said["fps"], said["width"], said["height"]) == (3, 5, 8, 16)
    with served.watch(said["id"], subprotocols=["packforcing"]) as client:
        assert client.socket.subprotocol == "packforcing"
        hello = client.hear()
        assert hello == {
            "type": "hello", "media": "image/png", "width": 8, "height": 16, "fps": 5,
            "block_frames": 3, "block": 0, "state": "running",
        }  # fmt: skip
        block = client.until(type="block")
        assert {"index", "prompt", "recalled", "seconds"} <= set(block)
        assert block["prompt"] == live.PROMPT
    assert said["id"] in [each["id"] for each in served.ask("GET", "/v1/sessions")[1]["sessions"]]
    assert served.ask("DELETE", f"/v1/sessions/{said['id']}")[:2] == (204, b"")
    assert served.ask("GET", f"/v1/sessions/{said['id']}")[0] == 404


def test_blocks_are_those_of_an_unbroken_run(served, pipeline):
    session = served.begin(seed=5)
    with served.watch(session) as client:
        client.say(type="prompt", text=OTHER, at=4, ref=1)
        client.say(type="prompt", text=THIRD, at=6, ref=2)
        while len(client.blocks) < 9:
            client.hear()
    blocks = paused(served, session)
    prompts = [live.PROMPT] * 4 + [OTHER] * 2 + [THIRD] * (len(blocks) - 6)
    assert equal(shown(blocks), frames_of(pipeline, prompts, seed=5))
    assert client.blocks.items() <= blocks.items()
    file = served.ask("GET", f"/v1/sessions/{session}/video.mp4")[1]
    boxes = [kind for kind, _ in video.boxes(file)]
    assert boxes == [b"ftyp", b"moov"] + [b"moof", b"mdat"] * len(blocks)


def test_a_video_so_far_plays_from_its_first_frame_to_its_last(served, tmp_path):
    session = served.begin()
    with served.watch(session) as client:
        client.until(type="block", index=6)
    blocks = paused(served, session)
    path = tmp_path / "sofar.mp4"
    path.write_bytes(served.ask("GET", f"/v1/sessions/{session}/video.mp4")[1])
    frames = video.read(path)
    scale = frames.shape[1] // 16
    small = frames[:, scale // 2 :: scale, scale // 2 :: scale].astype(int)
    true = np.concatenate(shown(blocks)).astype(int)
    assert small.shape == true.shape
    assert np.abs(small - true).mean() < 12  # colours are shared by the pixels of a cell


@pytest.mark.parametrize("policy", ["keep", "recache", "flush", "cut"])
def test_a_policy_does_to_the_memory_what_it_does_in_a_stream(served, pipeline, policy):
    session = served.begin(seed=2)
    with served.watch(session) as client:
        client.say(type="prompt", text=OTHER, at=5, policy=policy, ref="x")
        client.until(type="applied", ref="x", block=5)
        client.until(type="block", index=8)
    blocks = paused(served, session)
    prompts = [live.PROMPT] * 5 + [OTHER] * (len(blocks) - 5)
    assert equal(shown(blocks), frames_of(pipeline, prompts, seed=2, changes={5: policy}))


def test_receipts_come_in_order_and_name_the_block(served):
    session = served.begin()
    with served.watch(session) as client:
        client.until(type="block", index=1)
        client.say(type="prompt", text=OTHER, ref="mine")
        client.until(type="received", ref="mine")
        applied = client.until(type="applied", ref="mine")["block"]
        block = client.until(type="block", index=applied)
        assert block["prompt"] == OTHER
        before = [each["prompt"] for each in client.said if each["type"] == "block"][:-1]
        assert set(before) == {live.PROMPT}


def test_a_prompt_that_gives_way_is_told_so(served):
    session = served.begin()
    with served.watch(session) as client:
        client.until(type="block")
        client.say(type="pause")
        client.until(type="applied")
        for number in range(3):
            client.say(type="prompt", text=[OTHER, THIRD, OTHER][number], ref=number)
        client.until(type="received", ref=2)
        client.say(type="resume")
        client.until(type="applied", ref=2)
        lost = [each for each in client.said if each["type"] == "error"]
        assert [each["ref"] for each in lost] == [0, 1]
        assert "a later prompt" in lost[0]["message"]


def test_a_receipt_finds_the_one_who_asked_and_nobody_else(served):
    session = served.begin()
    with served.watch(session) as one, served.watch(session) as two:
        one.say(type="prompt", text=OTHER, ref="same")
        at = one.until(type="applied", ref="same")["block"]
        two.until(type="block", index=at)
        assert not [each for each in two.said if each["type"] in ("applied", "received")]


def test_words_that_the_model_lacks_are_refused_and_the_session_goes_on(served):
    session = served.begin()
    with served.watch(session) as client:
        client.say(type="prompt", text="a purple elephant", ref="r")
        said = client.until(type="error", ref="r")["message"]
        assert "purple" in said
        assert "elephant" in said
        client.until(type="block", index=4)


# Running, waiting, paused


def test_a_session_runs_while_someone_watches(served):
    session = served.begin()
    assert served.facts(session)["state"] == "waiting"
    time.sleep(0.2)
    assert served.facts(session)["block"] == 0
    with served.watch(session) as client:
        client.until(type="block", index=2)
        assert served.facts(session)["state"] == "running"
    served.until(lambda: served.facts(session)["state"] == "waiting")
    served.until(lambda: not served.hub.get("sessions", session).making)
    count = served.facts(session)["block"]
    time.sleep(0.3)
    assert served.facts(session)["block"] == count
    with served.watch(session) as client:
        assert client.hear()["block"] == count
        client.until(type="block", index=count)


def test_an_explicit_pause_stays_until_resume(served):
    session = served.begin()
    paused(served, session)
    count = served.facts(session)["block"]
    with served.watch(session) as client:
        assert client.hear()["state"] == "paused"
        time.sleep(0.3)
        assert served.facts(session)["block"] == count
        client.say(type="resume", ref=7)
        client.until(type="applied", ref=7, block=count)
        client.until(type="block", index=count)


def test_a_session_that_runs_unwatched_does(served):
    session = served.begin(run=True)
    served.until(lambda: served.facts(session)["block"] > 3)
    served.ask("DELETE", f"/v1/sessions/{session}")


def test_sessions_take_turns(served):
    sessions = [served.begin(seed=seed) for seed in range(3)]
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(served.watch(each)) for each in sessions]
        clients[2].until(type="block", index=10)
        counts = [served.facts(each)["block"] for each in sessions]
    assert max(counts) - min(counts) <= 3


def test_blocks_keep_the_pace_of_playing(pipeline, tmp_path):
    with live.serving_of(pipeline, tmp_path, pace=8.0) as served:  # a block in 75 ms
        session = served.begin()
        with served.watch(session) as client:
            client.until(type="block", index=1)
            began = time.monotonic()
            client.until(type="block", index=9)
            assert 0.45 < time.monotonic() - began < 3
            time.sleep(0.01)


# Branches


def test_forks_share_the_past_and_are_independent(served, pipeline):
    parent = served.begin(seed=3)
    with served.watch(parent) as client:
        client.until(type="block", index=6)
    past = paused(served, parent)
    made = []
    for prompt in (THIRD, THIRD, OTHER):
        status, said, _ = served.ask("POST", f"/v1/sessions/{parent}/fork", {"at": 4})
        assert (status, said["block"], said["parent"]) == (201, 4, parent)
        with served.watch(said["id"]) as client:
            client.say(type="prompt", text=prompt, at=4)
            client.say(type="resume")
            client.until(type="block", index=7)
        made.append(paused(served, said["id"]))
    one, two, other = made
    count = min(map(len, made))
    assert [one[k] for k in range(count)] == [two[k] for k in range(count)]
    assert [one[k] for k in range(4)] == [other[k] for k in range(4)] == [past[k] for k in range(4)]
    assert one[5] != other[5]
    assert fetched(served, parent) == past
    prompts = [live.PROMPT] * 4 + [THIRD] * (len(one) - 4)
    assert equal(shown(one), frames_of(pipeline, prompts, seed=3))


def test_a_rewind_is_exact_and_every_client_hears_of_it(served):
    session = served.begin(seed=4)
    with served.watch(session) as client, served.watch(session) as other:
        client.until(type="block", index=8)
        client.say(type="pause")
        client.until(type="applied")
        served.until(lambda: not served.hub.get("sessions", session).making)
        past = fetched(served, session)
        client.say(type="rewind", to=3, ref="back")
        client.until(type="rewound", to=3)
        other.until(type="rewound", to=3)
        client.until(type="applied", ref="back")
        assert served.facts(session)["block"] == 3
        client.say(type="resume")
        client.until(type="block", index=3)
        client.until(type="block", index=8)
    again = paused(served, session)
    assert {k: again[k] for k in past} == past


def test_a_prompt_after_a_rewind_tells_another_story(served, pipeline):
    session = served.begin(seed=6)
    with served.watch(session) as client:
        client.say(type="prompt", text=OTHER, at=2)
        client.until(type="block", index=5)
        client.say(type="pause")
        client.until(type="applied")
        client.say(type="rewind", to=1, ref="back")
        client.until(type="applied", ref="back")
        client.say(type="prompt", text=THIRD, ref="new")
        client.say(type="resume")
        client.until(type="applied", ref="new", block=1)
        client.until(type="block", index=4)
    blocks = paused(served, session)
    prompts = [live.PROMPT] + [THIRD] * (len(blocks) - 1)
    assert equal(shown(blocks), frames_of(pipeline, prompts, seed=6))


def test_where_nothing_is_kept_one_cannot_go_back_to(served):
    session = served.begin()
    with served.watch(session) as client:
        client.until(type="block", index=1)
        client.say(type="rewind", to=500, ref="r")
        assert "this session keeps" in client.until(type="error", ref="r")["message"]
        client.until(type="block", index=3)
    assert served.ask("POST", f"/v1/sessions/{session}/fork", {"at": 500})[0] == 400


# A restart


def test_a_restart_finds_sessions_and_they_go_on_bit_for_bit(pipeline, tmp_path):
    with live.serving_of(pipeline, tmp_path) as served:
        sessions = [served.begin(seed=seed) for seed in range(2)]
        with served.watch(sessions[0]) as client:
            client.until(type="block", index=3)
        paused(served, sessions[1])
        with served.watch(sessions[1]) as client:
            client.say(type="prompt", text=OTHER, at=2, ref="kept")
            client.until(type="received")
        before = served.facts(sessions[0])["block"]
    with live.serving_of(pipeline, tmp_path) as served:
        listed = {each["id"]: each for each in served.ask("GET", "/v1/sessions")[1]["sessions"]}
        assert list(listed) == sessions
        assert [each["state"] for each in listed.values()] == ["waiting", "paused"]
        assert listed[sessions[0]]["block"] >= before
        with served.watch(sessions[0]) as client:
            client.until(type="block", index=before + 2)
        with served.watch(sessions[1]) as client:
            client.say(type="resume")
            assert client.until(type="applied", ref="kept")["block"] >= 2
            client.until(type="block", index=5)
        for seed, session in enumerate(sessions):
            prompts = [
                prompt
                for change, end in _spans(served.facts(session))
                for prompt in [change["prompt"]] * (end - change["block"])
            ]
            blocks = paused(served, session)
            prompts += [prompts[-1]] * (len(blocks) - len(prompts))
            assert equal(shown(blocks), frames_of(pipeline, prompts[: len(blocks)], seed=seed))


def _spans(facts):
    ends = [each["block"] for each in facts["changes"][1:]] + [facts["block"]]
    return zip(facts["changes"], ends, strict=True)


def test_states_between_saves_are_made_again(pipeline, tmp_path):
    with live.serving_of(pipeline, tmp_path, state_every=4) as served:
        session = served.begin(seed=1)
        with served.watch(session) as client:
            client.say(type="prompt", text=OTHER, at=2, policy="flush")
            client.until(type="block", index=6)
        assert [0, 1] in served.facts(session)["kept"]
    with live.serving_of(pipeline, tmp_path, state_every=4) as served:
        with served.watch(session) as client:
            client.until(type="block")
        blocks = paused(served, session)
    prompts = [live.PROMPT] * 2 + [OTHER] * (len(blocks) - 2)
    assert equal(shown(blocks), frames_of(pipeline, prompts, seed=1, changes={2: "flush"}))


def test_a_session_of_another_model_is_listed_and_does_not_go_on(pipeline, tmp_path):
    with live.serving_of(pipeline, tmp_path) as served:
        session = served.begin()
        with served.watch(session) as client:
            client.until(type="block")
    about = next(tmp_path.glob("sessions/*/about.json"))
    about.write_text(about.read_text().replace(served.hub.models.digest, "others"))
    with live.serving_of(pipeline, tmp_path) as served:
        facts = served.facts(session)
        assert facts["state"] == "stopped"
        assert "another model" in facts["message"]
        assert served.ask("GET", f"/v1/sessions/{session}/video.mp4")[0] == 200
        with served.watch(session) as client:
            client.say(type="prompt", text=OTHER, ref=1)
            assert "another model" in client.until(type="error", ref=1)["message"]


# Memories and methods


def test_a_session_may_have_a_method_and_a_memory_of_its_own(served, pipeline):
    session = served.begin(method="self-forcing")
    with served.watch(session) as client:
        client.until(type="block", index=3)
    blocks = paused(served, session)
    own = pipeline.with_method("self-forcing")
    assert equal(shown(blocks), frames_of(own, [live.PROMPT] * len(blocks)))
    session = served.begin(memory="no-mid")
    with served.watch(session) as client:
        assert client.until(type="block", index=5)["recalled"] == [[], []]


@pytest.mark.parametrize(
    ("wish", "named"),
    [
        ({"method": "self-forcin"}, "did you mean self-forcing"),
        ({"method": "bidirectional"}, "one behind the other"),
        ({"memory": "larg"}, "memory profile"),
        ({"prompt": "an elephant"}, "elephant"),
        ({"seed": -1}, "seed=-1"),
        ({"colour": "red"}, "has no field"),
    ],
)
def test_a_session_that_cannot_be_is_refused(served, wish, named):
    before = len(served.hub.of("sessions"))
    status, said, _ = served.ask("POST", "/v1/sessions", {"prompt": live.PROMPT, **wish})
    assert status == 400
    assert named in said["error"]["message"]
    assert len(served.hub.of("sessions")) == before


# Jobs


def test_a_job_is_queued_made_and_fetched(served, pipeline, tmp_path):
    status, said, _ = served.ask(
        "POST", "/v1/videos", {"prompt": live.PROMPT, "seconds": 3.2, "seed": 8}
    )
    assert status == 202
    assert set(said) == {"id", "status", "progress"}
    where = f"/v1/videos/{said['id']}"
    seen = set()

    def completed():
        now = served.ask("GET", where)[1]
        seen.add(now["status"])
        if now["status"] != "completed":
            assert served.ask("GET", f"{where}/content")[0] in (200, 409)
        return now["status"] == "completed"

    served.until(completed)
    assert seen <= {"queued", "in_progress", "completed"}
    assert served.ask("GET", where)[1]["progress"] == 1
    (tmp_path / "job.mp4").write_bytes(served.ask("GET", f"{where}/content")[1])
    live_one = served.hub.get("videos", said["id"])
    blocks = {k: live_one.folder.images(k) for k in range(live_one.next)}
    assert len(blocks) == 6  # 16 frames in blocks of 3
    assert equal(shown(blocks), frames_of(pipeline, [live.PROMPT] * 6, seed=8))
    assert video.probe(tmp_path / "job.mp4").frames == 18
    assert served.ask("DELETE", where)[0] == 204
    assert served.ask("GET", where)[0] == 404


def test_a_job_can_be_cancelled(served):
    said = served.ask("POST", "/v1/videos", {"prompt": live.PROMPT, "seconds": 600})[1]
    where = f"/v1/videos/{said['id']}"
    served.until(lambda: served.ask("GET", where)[1]["status"] == "in_progress")
    assert served.ask("GET", f"{where}/content")[0] == 409
    assert served.ask("DELETE", where)[0] == 204
    assert served.ask("GET", where)[1]["status"] == "cancelled"
    assert served.ask("GET", f"{where}/content")[0] == 409
    folder = served.hub.get("videos", said["id"]).folder
    served.until(lambda: not served.hub.get("videos", said["id"]).making)
    assert folder.count == 0
    assert served.ask("DELETE", where)[0] == 204
    assert served.ask("GET", where)[0] == 404


def test_a_job_is_refused_or_made_and_never_half(served):
    for body in ({"prompt": "an elephant", "seconds": 1}, {"prompt": live.PROMPT, "seconds": 601}):
        assert served.ask("POST", "/v1/videos", body)[0] == 400


# Clients that take nothing


def test_a_client_that_takes_nothing_is_sent_two_blocks_and_told_what_it_missed(served):
    session = served.begin()
    with served.watch(session) as slow, served.watch(session) as quick:
        for _ in range(40):
            quick.hear()
        assert json.loads(slow.socket.recv())["type"] == "hello"
        got = [json.loads(slow.socket.recv()), slow.socket.recv()]
        got += [json.loads(slow.socket.recv()), slow.socket.recv()]
        with pytest.raises(TimeoutError):
            slow.socket.recv(timeout=0.3)
        assert [each["index"] for each in got[::2]] == [0, 1]
        newest = served.facts(session)["block"] - 1
        slow.say(type="have", block=1)
        dropped = json.loads(slow.socket.recv())
        block = json.loads(slow.socket.recv())
        assert dropped["type"] == "dropped"
        assert block["index"] >= newest
        assert block["index"] == 2 + dropped["count"]


def _read_all(client):
    while True:
        client.socket.recv(timeout=20)


def test_a_client_that_takes_nothing_for_long_counts_as_gone(pipeline, tmp_path):
    with live.serving_of(pipeline, tmp_path, patience=0.5) as served:
        session = served.begin()
        with served.watch(session) as client:
            with pytest.raises(ConnectionClosed) as closed:
                _read_all(client)
            assert closed.value.rcvd.code == 4408
        served.until(lambda: served.facts(session)["state"] == "waiting")
        assert served.server.clients == 0


def test_a_deleted_session_lets_its_clients_go(served):
    session = served.begin()
    with served.watch(session) as client:
        client.until(type="block")
        served.ask("DELETE", f"/v1/sessions/{session}")
        with pytest.raises(ConnectionClosed) as closed:
            client.until(type="never")
        assert closed.value.rcvd.code == 4404
    assert client.said[-1] == {"type": "error", "message": "this session was deleted."}


def test_what_was_not_sent_cannot_be_had(served):
    session = served.begin()
    with served.watch(session) as client:
        client.hear()
        client.say(type="have", block=10**6, ref="r")
        assert "was not sent" in client.until(type="error", ref="r")["message"]
        client.until(type="block", index=3)


def _watcher(patience=5.0):
    now = [0.0]
    return Watcher(patience, lambda: now[0]), now


def test_a_watcher_holds_one_block_and_few_messages(served):
    import asyncio

    async def told():
        watcher, _ = _watcher()
        sent = []

        async def say(content):
            sent.append(content)

        for index in range(100):
            watcher.show(Shot(index, f'{{"index": {index}}}', b"x"))
        task = asyncio.create_task(watcher.send_all(say))
        await asyncio.sleep(0.01)
        task.cancel()
        assert sent == ['{"type": "dropped", "count": 99}', '{"index": 99}', b"x"]
        for _ in range(300):
            watcher.tell({"type": "x"})
        with pytest.raises(Gone):
            await watcher.send_all(say)

    asyncio.run(told())


# Bounds


def test_every_bound_is_answered_with_its_code(pipeline, tmp_path):
    with live.serving_of(
        pipeline, tmp_path, sessions=2, videos=1, clients=2, queue=2, body_bytes=2000
    ) as served:
        session = served.begin()
        paused(served, session)
        served.begin()
        assert served.ask("POST", "/v1/sessions", {"prompt": live.PROMPT})[0] == 429
        assert served.ask("POST", f"/v1/sessions/{session}/fork", {})[0] == 429
        job = {"prompt": live.PROMPT, "seconds": 60}
        assert served.ask("POST", "/v1/videos", job)[0] == 202
        assert served.ask("POST", "/v1/videos", job)[0] == 429
        assert served.ask("POST", "/v1/sessions", raw=b"x" * 2001)[0] == 413
        with served.watch(session) as one, served.watch(session):
            from websockets.exceptions import InvalidStatus

            with pytest.raises(InvalidStatus) as refused, served.watch(session):
                pass
            assert refused.value.response.status_code == 429
            for number in range(3):
                one.say(type="prompt", text=OTHER, ref=number)
            assert "wait" in one.until(type="error", ref=2)["message"]
        served.until(lambda: served.server.clients == 0)
        with served.watch(session):
            pass


def test_the_oldest_states_go_when_the_disk_is_full_and_it_is_said(pipeline, tmp_path, caplog):
    with live.serving_of(pipeline, tmp_path, disk_gb=0.0004) as served:
        session = served.begin()
        with served.watch(session) as client:
            client.until(type="block", index=8)
            kept = client.said[-1]["kept"]
            assert kept > 1
            client.say(type="rewind", to=1, ref="r")
            assert "cannot be gone back to" in client.until(type="error", ref="r")["message"]
        assert served.facts(session)["bytes"] < 410_000
        assert sum("oldest states go" in each.message for each in caplog.records) == 1
        with served.watch(session) as client:
            while (said := client.hear())["type"] != "error":
                pass
            assert "--disk-gb" in said["message"]
        assert served.facts(session)["state"] == "stopped"


# Drift


def _drifting_at(monkeypatch, block):
    watch = runner.drift.watch
    made = []

    def planted(guard, frames, prompt, *rest):
        made.append(prompt)
        guard, _ = watch(guard, frames, prompt, *rest)
        return guard, [Drift("colour", 30.0, 9.0)] if len(made) == block + 1 else []

    monkeypatch.setattr(runner.drift, "watch", planted)


@pytest.mark.parametrize("choice", ["nothing", "stop", "re-anchor"])
def test_drift_is_said_and_answered_as_chosen(served, pipeline, monkeypatch, choice):
    _drifting_at(monkeypatch, 7)
    session = served.begin(drift=choice, seed=9)
    with served.watch(session) as client:
        said = client.until(type="drift")
        assert said["since"] == 3  # the window of five blocks began there
        assert said["action"] == choice
        assert "colour" in said["message"]
        if choice == "stop":
            served.until(lambda: served.facts(session)["state"] == "paused")
            assert served.facts(session)["block"] == 8
            return
        if choice == "re-anchor":
            client.until(type="rewound", to=3)
        client.until(type="block", index=9)
    blocks = paused(served, session)
    changes = {3: "flush"} if choice == "re-anchor" else {}
    assert equal(
        shown(blocks), frames_of(pipeline, [live.PROMPT] * len(blocks), seed=9, changes=changes)
    )


def test_drift_that_comes_back_stops_the_session(served, monkeypatch):
    monkeypatch.setattr(
        runner.drift,
        "watch",
        lambda guard, frames, prompt, *rest: (guard, [Drift("colour", 30.0, 9.0)]),
    )
    session = served.begin(drift="re-anchor")
    with served.watch(session) as client:
        assert client.until(type="drift")["action"] == "stop"
    served.until(lambda: served.facts(session)["state"] == "paused")


# The rest


def test_a_block_that_fails_stops_its_session_and_no_other(served, monkeypatch):
    failing, other = served.begin(seed=1), served.begin(seed=2)
    guard = runner.video.to_uint8
    monkeypatch.setattr(
        runner.Runner,
        "_written",
        _failing_for(runner.Runner._written, failing),
    )
    with served.watch(failing) as client, served.watch(other) as second:
        said = client.until(type="error")["message"]
        assert "disk" in said
        second.until(type="block", index=3)
        assert served.facts(failing)["state"] == "stopped"
        monkeypatch.undo()
        client.say(type="rewind", to=0, ref="r")
        client.until(type="block", index=0)
    assert guard is runner.video.to_uint8


def _failing_for(written, session):
    def call(self, live_one, *rest):
        if live_one.about.id == session:
            raise OSError(28, "No space left on disk")
        return written(self, live_one, *rest)

    return call


def test_the_page_is_served_whole_and_names_no_other_address(served):
    from packforcing_jax.live import app

    for path in app.FILES:
        status, content, headers = served.ask("GET", path)
        assert status == 200
        assert "unsafe" not in headers["content-security-policy"]
        addresses = re.findall(rb"https?://[^\"'\s$]+", content)
        assert [each for each in addresses if b"www.w3.org/2000/svg" not in each] == []
        assert not re.search(rb"<script>|<style>|\son\w+=\"|style=\"", content)


def test_health_and_what_the_model_is(served):
    assert served.ask("GET", "/health")[:2] == (200, {"status": "ok"})
    facts = served.ask("GET", "/v1/model")[1]
    assert "bidirectional" not in facts["methods"]
    assert "coral" in facts["vocabulary"]
    assert facts["policies"] == ["keep", "recache", "flush", "cut"]


@pytest.mark.docs
def test_the_commands_of_the_page_run(tmp_path):
    text = Path(__file__).parents[1].joinpath("docs/live.md").read_text()
    (block,) = [each for each in re.findall(r"```\n(.*?)```", text, re.DOTALL) if "SERVER=" in each]
    with live.serving_of(Pipeline.from_pretrained(), tmp_path / "root", pace=1.0) as served:
        commands = block.replace("http://127.0.0.1:8000", served.base)
        session = served.begin("a red disc walks")
        with served.watch(session) as client:  # what is compiled once is compiled
            client.until(type="block", seconds=120)
        served.ask("DELETE", f"/v1/sessions/{session}")
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", commands],
            cwd=tmp_path,
            capture_output=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert served.hub.all() == []
    assert len(images.decoded((tmp_path / "block").read_bytes())) == 4
    assert video.probe(tmp_path / "video.mp4").frames == 24
    assert video.probe(tmp_path / "sofar.mp4").frames >= 4
