"""What a server allows: every bound is a field here, a flag of `packforcing serve`, and a line of its help."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from packforcing_jax.errors import require, shown

LONGEST_TEXT = 4000  # characters of a prompt
DRIFT = ("nothing", "stop", "re-anchor")
WINDOW = 2  # blocks on their way to a client that has not said that it has them


def _bound(default: Any, least: float, most: float, meaning: str) -> Any:
    return dataclasses.field(
        default=default, metadata={"least": least, "most": most, "meaning": meaning}
    )


@dataclass(frozen=True)
class Limits:
    """Bounds of a server; raises `InputError` for a number outside its own bounds."""

    sessions: int = _bound(32, 1, 10_000, "sessions that are kept")
    videos: int = _bound(32, 1, 10_000, "jobs for whole videos that are kept")
    clients: int = _bound(128, 1, 10_000, "sockets that are open at once")
    requests: int = _bound(64, 1, 10_000, "HTTP requests in progress at once")
    queue: int = _bound(16, 1, 1000, "prompts of one session that wait for their block")
    changes: int = _bound(10_000, 1, 10**6, "changes of prompt in one session")
    body_bytes: int = _bound(2**16, 1024, 2**24, "bytes of a request's body")
    message_bytes: int = _bound(2**16, 1024, 2**24, "bytes of a client's message")
    body_seconds: float = _bound(10.0, 0.1, 600, "seconds that a request has to arrive whole")
    patience: float = _bound(
        30.0, 0.1, 3600, "seconds after which a client that takes nothing counts as gone"
    )
    disk_gb: float = _bound(
        2.0, 0.0001, 10**6, "gigabytes (10^9 bytes) of one session; its oldest states go first"
    )
    state_every: int = _bound(
        1, 1, 10**6, "blocks from one state on disk to the next; blocks between are made again"
    )
    blocks: int = _bound(10**6, 1, 10**7, "blocks of one session")
    video_seconds: float = _bound(600.0, 0.1, 10**6, "seconds of a job's video")
    loaded: int = _bound(4, 1, 1000, "sessions whose state is in memory at once")
    drift_window: int = _bound(
        0, 0, 10**6, "frames that the drift of a video is told by; 0: those of five blocks"
    )
    drift: str = dataclasses.field(
        default="nothing",
        metadata={
            "choices": DRIFT,
            "meaning": "what is done about drift, beside saying it, in sessions that do not say themselves",
        },
    )
    pace: float = _bound(
        1.0, 0.0, 1000, "blocks are made at most so many times as fast as they play; 0: at once"
    )

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, bounds = getattr(self, field.name), field.metadata
            if "choices" in bounds:
                continue  # looked up by whoever reads it from a text
            require(
                bounds["least"] <= value <= bounds["most"],
                f"{flag(field)} {shown(value)} is out of range; give {bounds['least']:,} to "
                f"{bounds['most']:,} {bounds['meaning']}.",
            )


def flag(field: dataclasses.Field) -> str:
    """The flag of `serve` that sets a bound."""
    return f"--{field.name.replace('_', '-')}"
