"""How a live server holds: time to a new prompt's first frame, kill -9, clients that take nothing, and idle hours.

    python -m benchmarks.live prompt --count 50
    python -m benchmarks.live kill --kills 20 --sessions 3
    python -m benchmarks.live hold --seconds 300 --messages 10000 --clients 50
    python -m benchmarks.live idle --seconds 600

Each starts `packforcing serve` with the model that ships, in a process of its own, and prints one JSON object; exit 1
where what must hold does not. Processor time and memory are the server's, read from /proc, so it runs on Linux.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from websockets.asyncio.client import connect

from packforcing_jax.io import compilation_cache, video
from packforcing_jax.live import images
from packforcing_jax.stage import captions

PROMPTS = [
    captions.write(captions.Prompt(at % 8, at % 4, at % 2, at % 8, at % 4)) for at in range(8)
]
CLOSE = 0.1  # by how much the rate of other clients may differ


class Server:
    """A server in a process of its own."""

    def __init__(self, root: str, *flags: str):
        words = ["serve", "--root", root, "--port", "0", "--sessions", "64", *flags]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "packforcing_jax", *words], stderr=subprocess.PIPE, text=True
        )
        assert self.process.stderr is not None
        self.port = 0
        for line in self.process.stderr:
            if found := re.search(r"http://127.0.0.1:(\d+)/", line):
                self.port = int(found[1])
            if "ready for blocks" in line:
                break
        else:
            raise SystemExit("the server did not start")
        self.said: list[str] = []
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stderr is not None
        self.said.extend(self.process.stderr)

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """The JSON, or the bytes, that the server answers."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data=data, method=method
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            content = answer.read()
            kind = answer.headers.get("content-type", "")
        return json.loads(content) if kind == "application/json" else content

    def begin(self, **fields: Any) -> str:
        return self.ask("POST", "/v1/sessions", {"prompt": PROMPTS[0], **fields})["id"]

    def watch(self, session: str) -> Any:
        where = f"ws://127.0.0.1:{self.port}/v1/sessions/{session}/live"
        return connect(where, max_size=None, compression=None)

    def memory(self) -> int:
        """Resident bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) * 1024  # type: ignore[index]

    def processor(self) -> float:
        """Seconds of processor time so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def end(self, how: int = signal.SIGTERM) -> None:
        self.process.send_signal(how)
        self.process.wait(60)

    @property
    def tracebacks(self) -> int:
        return sum("Traceback" in line for line in self.said)


@contextlib.contextmanager
def served(*flags: str) -> Iterator[Server]:
    """A server with an empty root."""
    with tempfile.TemporaryDirectory(prefix="packforcing-live-") as root:
        server = Server(root, *flags)
        try:
            yield server
        finally:
            server.end()


async def blocks(client: Any, on: Callable[[dict[str, Any]], Awaitable[None] | None]) -> None:
    """Takes blocks as they come and says so; `on` is called with every message, for a block behind its images."""
    while True:
        said = json.loads(await client.recv())
        if said["type"] == "block":
            await client.recv()
            await client.send(json.dumps({"type": "have", "block": said["index"]}))
        done = on(said)
        if done is not None:
            await done


# A prompt's way to its first frame


async def prompt_times(server: Server, count: int, rng: random.Random) -> dict[str, Any]:
    session = server.begin()
    waits: list[float] = []
    walls: list[float] = []
    async with server.watch(session) as client:
        sent: dict[str, float] = {}
        applied: dict[int, str] = {}
        last = time.monotonic()
        done = asyncio.Event()

        def on(said: dict[str, Any]) -> None:
            nonlocal last
            now = time.monotonic()
            if said["type"] == "applied":
                applied[said["block"]] = said["ref"]
            if said["type"] == "block":
                walls.append(now - last)
                last = now
                if said["index"] in applied:
                    waits.append(now - sent[applied[said["index"]]])
                    done.set()

        reading = asyncio.create_task(blocks(client, on))
        await asyncio.sleep(2)
        walls.clear()
        for number in range(count):
            await asyncio.sleep(rng.uniform(0.2, 1.2))
            done.clear()
            sent[str(number)] = time.monotonic()
            wish = {"type": "prompt", "text": PROMPTS[number % len(PROMPTS)], "ref": str(number)}
            await client.send(json.dumps(wish))
            await asyncio.wait_for(done.wait(), 60)
        reading.cancel()
    return {
        "count": len(waits),
        "median_s": round(statistics.median(waits), 4),
        "worst_s": round(max(waits), 4),
        "block_median_s": round(statistics.median(walls), 4),
        "block_worst_s": round(max(walls), 4),
    }


def prompt(args: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """At the pace of playing, and as fast as blocks can be made; there, at most two of the slowest blocks."""
    figures = {}
    for pace in ("1", "0"):
        with served("--pace", pace) as server:
            figures[f"pace {pace}"] = asyncio.run(
                prompt_times(server, args.count, random.Random(args.seed))
            )
    fast = figures["pace 0"]
    return figures, fast["worst_s"] <= 2 * fast["block_worst_s"]


# kill -9


async def steer(
    server: Server, sessions: list[str], rng: random.Random, seconds: float
) -> dict[str, int]:
    """Watches for a while, with a new prompt now and then; blocks that were seen of each session."""
    seen = dict.fromkeys(sessions, 0)

    async def one(session: str) -> None:
        async with server.watch(session) as client:

            def on(said: dict[str, Any]) -> Awaitable[None] | None:
                if said["type"] == "block":
                    seen[session] = said["index"] + 1
                    if rng.random() < 0.15:
                        policy = rng.choice([None, "keep", "recache", "flush", "cut"])
                        wish = {"type": "prompt", "text": rng.choice(PROMPTS), "policy": policy}
                        return client.send(json.dumps(wish))
                return None

            await blocks(client, on)

    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await asyncio.gather(*map(one, sessions))
    return seen


def kill(args: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """Kills the server again and again while it makes blocks of several sessions, and compares with unbroken runs."""
    rng = random.Random(args.seed)
    moments = [round(rng.uniform(0, args.within), 3) for _ in range(args.kills)]
    lost: list[int] = []
    broken: list[str] = []
    with tempfile.TemporaryDirectory(prefix="packforcing-live-") as root:
        server = Server(root, "--pace", "4")
        sessions = [server.begin(seed=seed) for seed in range(args.sessions)]
        for moment in moments:
            seen = asyncio.run(steer(server, sessions, rng, moment))
            server.end(signal.SIGKILL)
            server = Server(root, "--pace", "4")
            listed = {each["id"]: each for each in server.ask("GET", "/v1/sessions")["sessions"]}
            broken += [f"{name} is not listed" for name in sessions if name not in listed]
            lost += [max(0, count - listed[name]["block"]) for name, count in seen.items()]
            for name in sessions:
                if listed[name]["block"]:
                    broken += _plays(server, name, listed[name]["block"], root)
        asyncio.run(steer(server, sessions, rng, 2.0))
        time.sleep(1)
        facts = [server.ask("GET", f"/v1/sessions/{name}") for name in sessions]
        for seed, each in enumerate(facts):
            broken += _differs(server, each, seed)
        tracebacks = server.tracebacks
        server.end()
    figures = {
        "kills": len(moments),
        "moments_s": moments,
        "sessions": len(sessions),
        "blocks": [each["block"] for each in facts],
        "changes": [len(each["changes"]) for each in facts],
        "seen_blocks_lost": sum(lost),
        "tracebacks": tracebacks,
        "broken": broken,
    }
    return figures, not broken and not sum(lost) and not tracebacks


def _plays(server: Server, session: str, count: int, root: str) -> list[str]:
    path = Path(root, "sofar.mp4")
    path.write_bytes(server.ask("GET", f"/v1/sessions/{session}/video.mp4"))
    frames = video.probe(path).frames
    return [] if frames >= 4 * count else [f"{session} plays {frames} frames of {count} blocks"]


def _differs(server: Server, facts: dict[str, Any], seed: int) -> list[str]:
    """What of a session is not as an unbroken run makes it."""
    from packforcing_jax.sampling.pipeline import Pipeline

    count, changes = facts["block"], facts["changes"]
    ends = [each["block"] for each in changes[1:]] + [count]
    prompts = [
        each["prompt"]
        for each, end in zip(changes, ends, strict=True)
        for _ in range(end - each["block"])
    ]
    policies = {each["block"]: each["policy"] for each in changes if each["policy"]}
    model = Pipeline.from_pretrained()
    wrong = []
    for block in model.stream(prompts, seed=seed, changes=policies):
        made = server.ask("GET", f"/v1/sessions/{facts['id']}/blocks/{block.index}")
        if not np.array_equal(images.decoded(made), video.to_uint8(block.frames)):
            wrong.append(f"{facts['id']}: block {block.index} differs")
    return wrong


# Clients that take nothing, say too much, and are many


async def rate_of(server: Server, session: str, seconds: float) -> float:
    """Blocks a second that a client is sent."""
    times: list[float] = []
    async with server.watch(session) as client:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await blocks(
                    client,
                    lambda said: (
                        times.append(time.monotonic()) if said["type"] == "block" else None
                    ),
                )
    return (len(times) - 1) / (times[-1] - times[0])


def stalled(server: Server, session: str) -> socket.socket:
    """A client that opens a session and reads nothing; of the least memory, so that the server has to hold the rest."""
    link = socket.socket()
    link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    link.connect(("127.0.0.1", server.port))
    head = (
        f"GET /v1/sessions/{session}/live HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n\r\n"
    )
    link.sendall(head.encode())
    return link


async def chatter(server: Server, session: str, count: int) -> int:
    """Sends many messages, half of them wrong; how many were answered."""
    answered = 0
    async with server.watch(session) as client:

        def on(said: dict[str, Any]) -> None:
            nonlocal answered
            answered += said["type"] in ("error", "received")

        reading = asyncio.create_task(blocks(client, on))
        for number in range(count):
            await client.send(
                json.dumps(
                    {"type": "have", "block": 10**6, "ref": number}
                    if number % 2
                    else {"ref": number}
                )
            )
        end = time.monotonic() + 120
        while answered < count and time.monotonic() < end:
            await asyncio.sleep(0.05)
        reading.cancel()
    return answered


def hold(args: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """The rate of one client alone, beside each kind of bad company, and the server's memory all the while."""
    figures: dict[str, Any] = {}
    with served() as server:
        session, other = server.begin(), server.begin(seed=1)
        asyncio.run(rate_of(server, session, 5))
        figures["memory_before_mb"] = round(server.memory() / 1e6, 1)
        alone = asyncio.run(rate_of(server, session, max(5.0, args.seconds / 10)))
        links = [stalled(server, session), stalled(server, other)]
        figures["rates"] = {"alone": alone}
        figures["rates"]["stalled clients"] = asyncio.run(
            _sampled(server, session, args.seconds, figures)
        )
        figures["stalled_clients_left"] = _left(server, (session, other))
        for link in links:
            link.close()

        async def talked() -> tuple[float, int]:
            both = await asyncio.gather(
                rate_of(server, session, max(10.0, args.messages / 500)),
                chatter(server, session, args.messages),
            )
            return both[0], both[1]

        figures["rates"]["messages"], figures["answered"] = asyncio.run(talked())

        async def crowded() -> float:
            spans = [max(10.0, args.seconds / 10)] * args.clients
            return min(await asyncio.gather(*(rate_of(server, session, span) for span in spans)))

        figures["rates"]["many clients"] = asyncio.run(crowded())
        figures["memory_after_mb"] = round(server.memory() / 1e6, 1)
        figures["tracebacks"] = server.tracebacks
    figures["rates"] = {name: round(rate, 3) for name, rate in figures["rates"].items()}
    steady = all(rate >= (1 - CLOSE) * alone for rate in figures["rates"].values())
    gone = args.seconds < 35 or not figures["stalled_clients_left"]
    return figures, steady and gone and figures["answered"] == args.messages and not figures[
        "tracebacks"
    ]


def _left(server: Server, sessions: tuple[str, ...], seconds: float = 10.0) -> int:
    """Watchers that are still counted; the one that measured may take some seconds to be gone."""
    end = time.monotonic() + seconds
    while True:
        left = sum(server.ask("GET", f"/v1/sessions/{name}")["watchers"] for name in sessions)
        if not left or time.monotonic() > end:
            return left
        time.sleep(0.2)


async def _sampled(server: Server, session: str, seconds: float, figures: dict[str, Any]) -> float:
    most = [server.memory()]

    async def look() -> None:
        while True:
            most.append(server.memory())
            await asyncio.sleep(0.5)

    looking = asyncio.create_task(look())
    rate = await rate_of(server, session, seconds)
    looking.cancel()
    figures["memory_most_mb"] = round(max(most) / 1e6, 1)
    return rate


# Nobody


def idle(args: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """Processor time and the slope of the memory of a server that nobody uses, once it has made blocks."""
    with served() as server:
        session = server.begin()
        asyncio.run(rate_of(server, session, 5))
        time.sleep(2)
        began, spent = time.monotonic(), server.processor()
        times, sizes = [], []
        while time.monotonic() - began < args.seconds:
            times.append(time.monotonic() - began)
            sizes.append(server.memory())
            time.sleep(max(0.2, args.seconds / 300))
        share = (server.processor() - spent) / (time.monotonic() - began)
    slope = float(np.polyfit(times, sizes, 1)[0]) * 600
    figures = {
        "seconds": args.seconds,
        "processor_percent": round(100 * share, 3),
        "memory_mb": round(sizes[-1] / 1e6, 1),
        "memory_slope_mb_per_10_minutes": round(slope / 1e6, 3),
    }
    return figures, share < 0.01 and slope < 1e6


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="of moments and prompts")
    rows = parser.add_subparsers(dest="row", required=True)
    row = rows.add_parser("prompt", help="a prompt's arrival to its first frame")
    row.add_argument("--count", type=int, default=50)
    row = rows.add_parser("kill", help="kill -9 at moments drawn uniformly")
    row.add_argument("--kills", type=int, default=20)
    row.add_argument("--sessions", type=int, default=3)
    row.add_argument("--within", type=float, default=6.0, help="seconds of a life, at most")
    row = rows.add_parser("hold", help="stalled, talkative and many clients")
    row.add_argument("--seconds", type=float, default=300.0)
    row.add_argument("--messages", type=int, default=10_000)
    row.add_argument("--clients", type=int, default=50)
    row = rows.add_parser("idle", help="processor and memory of an idle server")
    row.add_argument("--seconds", type=float, default=600.0)
    args = parser.parse_args()
    compilation_cache.use()
    figures, holds = {"prompt": prompt, "kill": kill, "hold": hold, "idle": idle}[args.row](args)
    print(json.dumps({"row": args.row, "holds": holds, **figures}, indent=1))
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
