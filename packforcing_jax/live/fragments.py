"""The video of a session as H.264: one piece for each block, encoded once, joined with a header when asked for.

A piece is a function of its frames and of its place in the video (`io.h264`), so a fork shares the pieces of its
parent, and any process goes on where another one stopped.
"""

from collections import OrderedDict
from collections.abc import Hashable

import numpy as np

from packforcing_jax.errors import MachineError
from packforcing_jax.io import ffmpeg, h264, video

MOST_ENCODERS = 4  # processes that wait for the next block of their session


def header(picture: h264.Picture, settings: str) -> bytes:
    """What a video begins with, settings inside; pieces joined behind it play."""
    return h264.header(picture, settings)


class Encoders:
    """Processes of ffmpeg, one for each of the sessions that had a block last."""

    def __init__(self, picture: h264.Picture, most: int = MOST_ENCODERS):
        self._picture = picture
        self._most = most
        self._running: OrderedDict[Hashable, tuple[h264.Encoder, video.Position]] = OrderedDict()

    def piece(
        self, session: Hashable, frames: np.ndarray, at: video.Position, config: bytes
    ) -> tuple[bytes, video.Position]:
        """(uint8 frames [t, height, width, 3] as a piece of a video that is at `at`, the position behind it).

        `config` is the decoder configuration in the video's header, which is that of every piece.
        """
        encoder = self._encoder(session, len(frames), at)
        if encoder.config != config:
            encoder.stop()
            raise MachineError(f"ffmpeg does not encode as it did before; {ffmpeg.KEPT}.")
        samples = encoder.encode(frames)
        if not samples[0].key:
            raise MachineError(f"ffmpeg began a block without a key frame; {ffmpeg.KEPT}.")
        piece, end = video.fragments(samples, self._picture, at)
        self._running[session] = encoder, end
        while len(self._running) > self._most:
            self._running.popitem(last=False)[1][0].stop()
        return piece, end

    def _encoder(self, session: Hashable, block: int, at: video.Position) -> h264.Encoder:
        """The session's process if it stands at `at` and lives, else a new one; it is out of the table meanwhile."""
        encoder, stands = self._running.pop(session, (None, None))
        if encoder is not None:
            if stands == at and encoder.goes_on(block):
                return encoder
            encoder.stop()
        return h264.Encoder(self._picture, block=block, frames=at.frames, keys=at.fragments)

    def forget(self, session: Hashable) -> None:
        """Ends the process of a session that is gone."""
        encoder, _ = self._running.pop(session, (None, None))
        if encoder is not None:
            encoder.stop()

    def close(self) -> None:
        """Ends all processes."""
        for session in list(self._running):
            self.forget(session)
