"""A block as the binary message that clients draw: per frame a 4-byte big-endian length and an image."""

import io
import struct
from collections.abc import Iterator

import numpy as np
from PIL import Image

from packforcing_jax.errors import InputError, require

PNG = "image/png"
JPEG = "image/jpeg"
QUALITY = 85  # of JPEG
LENGTH = struct.Struct(">I")


def media_of(scale: int) -> str:
    """PNG for frames that are shown enlarged, whose pixels are the picture; JPEG for all others."""
    return PNG if scale > 1 else JPEG


def message(frames: np.ndarray, media: str) -> bytes:
    """uint8 frames [t, height, width, 3] as one message."""
    pieces = []
    for frame in frames:
        image = encoded(frame, media)
        pieces += [LENGTH.pack(len(image)), image]
    return b"".join(pieces)


def encoded(frame: np.ndarray, media: str) -> bytes:
    """One frame as an image."""
    out = io.BytesIO()
    picture = Image.fromarray(frame)
    if media == PNG:
        picture.save(out, "PNG", compress_level=6)
    else:
        picture.save(out, "JPEG", quality=QUALITY)
    return out.getvalue()


def images(block: bytes) -> Iterator[bytes]:
    """The images of a message; raises `InputError` where one is cut."""
    at = 0
    while at < len(block):
        require(
            at + LENGTH.size <= len(block),
            "a block's message ends inside a length; fetch it again.",
        )
        (size,) = LENGTH.unpack_from(block, at)
        at += LENGTH.size
        if at + size > len(block):
            raise InputError("a block's message ends inside an image; fetch it again.")
        yield block[at : at + size]
        at += size


def decoded(block: bytes) -> np.ndarray:
    """The frames [t, height, width, 3] of a message, uint8."""
    return np.stack(
        [np.asarray(Image.open(io.BytesIO(image)).convert("RGB")) for image in images(block)]
    )
