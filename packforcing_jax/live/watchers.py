"""What one client is sent: never more than two blocks that it has not said it has, the newest first, the rest counted.

All of this belongs to the server's event loop; nothing here waits for a model or a disk.
"""

import asyncio
import json
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple

from packforcing_jax.errors import require
from packforcing_jax.live.limits import WINDOW

MOST_WAITING = 64  # answers to a client that wait to be sent; then it is not listened to
MOST_TOLD = 256  # with what happens in its session besides; then it counts as gone

Say = Callable[[str | bytes], Awaitable[None]]


class Shot(NamedTuple):
    """A finished block as it is sent: its number, what is said of it, its images."""

    index: int
    said: str
    images: bytes


class Gone(Exception):
    """The client takes nothing any more; says for how long or how much."""


class Watcher:
    """The outgoing side of a socket."""

    def __init__(self, patience: float, clock: Callable[[], float] = time.monotonic):
        self.dropped = 0  # blocks, in all
        self.wrong = 0  # messages that were refused
        self._patience = patience
        self._clock = clock
        self._messages: deque[str] = deque()
        self._newest: Shot | None = None
        self._untold = 0  # dropped blocks that the client was not told of
        self._ends = False
        self._sent: deque[int] = deque()  # blocks on their way
        self._last_sent = -1
        self._renewed = clock()
        self._wake = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()

    # From the session

    def tell(self, message: Mapping[str, Any]) -> None:
        """Something that is sent in its turn, before blocks that are not on their way yet."""
        self._messages.append(json.dumps(message))
        if len(self._messages) >= MOST_WAITING:
            self._room.clear()
        self._wake.set()

    def show(self, shot: Shot) -> None:
        """A finished block; one that still waits gives way to it."""
        self._drop()
        self._newest = shot
        self._wake.set()

    def rewound(self, to: int) -> None:
        """Blocks from `to` on are no more."""
        if self._newest is not None and self._newest.index >= to:
            self._newest = None
        self.tell({"type": "rewound", "to": to})

    def end(self) -> None:
        """There is nothing more to send once what waits is sent."""
        self._ends = True
        self._wake.set()

    def _drop(self) -> None:
        if self._newest is not None:
            self._newest = None
            self.dropped += 1
            self._untold += 1

    # From the client

    async def answer(self, message: Mapping[str, Any]) -> None:
        """An answer to the client, which is listened to no further until it takes answers."""
        await self._room.wait()
        self.tell(message)

    def have(self, block: int) -> None:
        """The client has taken a block, and all that were sent before it; raises `InputError` if it cannot have it."""
        require(
            block <= self._last_sent,
            f"block {block} was not sent to you, the last one is {self._last_sent}; say which block you took.",
        )
        if block in self._sent:
            while self._sent.popleft() != block:
                pass
            self._renewed = self._clock()
            self._wake.set()

    # The sender

    async def send_all(self, say: Say) -> None:
        """Sends as the client takes, until `end`; raises `Gone` once it has taken nothing for too long."""
        while True:
            await self._send_waiting(say)
            if self._ends:
                return
            self._wake.clear()
            left = self._renewed + self._patience - self._clock() if self._sent else None
            if left is not None and left <= 0:
                raise Gone(f"it took no block for {self._patience:g} s")
            try:
                async with asyncio.timeout(left):
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def _send_waiting(self, say: Say) -> None:
        while True:
            if len(self._messages) > MOST_TOLD:
                raise Gone(f"{len(self._messages)} messages wait for it")
            if self._messages:
                await self._within_patience(say, self._messages.popleft())
                if len(self._messages) < MOST_WAITING:
                    self._room.set()
            elif self._newest is not None and len(self._sent) < WINDOW:
                await self._send_newest(say, self._newest)
            else:
                return

    async def _send_newest(self, say: Say, shot: Shot) -> None:
        self._newest = None
        if self._untold:
            count, self._untold = self._untold, 0
            await self._within_patience(say, json.dumps({"type": "dropped", "count": count}))
        if not self._sent:
            self._renewed = self._clock()
        self._sent.append(shot.index)
        self._last_sent = max(self._last_sent, shot.index)
        await self._within_patience(say, shot.said)
        await self._within_patience(say, shot.images)

    async def _within_patience(self, say: Say, content: str | bytes) -> None:
        try:
            async with asyncio.timeout(self._patience):
                await say(content)
        except TimeoutError:
            raise Gone(f"it read nothing for {self._patience:g} s") from None
