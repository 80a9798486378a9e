"""What a file is that is not the weights its name promises, told by how it begins, and what to do about it."""

import re
from pathlib import Path

LOOK = 64  # bytes that tell
LONGEST_MESSAGE = 1024  # bytes of a server's answer that was saved in the place of a file

GGUF = (
    "is GGUF, no checkpoint that is read here (its numbers are packed in groups of bits); fetch the same weights as "
    "safetensors in bfloat16, float16 or fp8"
)
SAFETENSORS = re.compile(rb"(?s).{6}\0\0\{")  # the length of a header below 2^48, and the header
KNOWN = (  # how it begins -> what it is, and the remedy
    (
        re.compile(rb"version https://git-lfs"),
        "is a pointer of git LFS and not the weights; fetch the file itself, as by `git lfs pull`.",
    ),
    (
        re.compile(rb"(\xef\xbb\xbf)?\s*<"),
        "is a web page and not the weights; fetch the file itself (on the hub, its `resolve` link).",
    ),
    (
        re.compile(rb"\0\x05\x16\x07"),
        "is a note of macOS about a file and not the file; check the path, and give the file without `._`.",
    ),
    (
        re.compile(rb"GGUF"),
        f"{GGUF}.",
    ),
    (
        re.compile(rb"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19\."),
        "was saved by torch < 1.6; re-save it with a newer torch.",
    ),
)
ZIP = re.compile(rb"PK\x03\x04")


def complaint(path: Path, wanted: str) -> str | None:
    """What is wrong with `path`, if its first bytes tell; `wanted`: "safetensors", "zip" (of torch.save) or "json"."""
    with path.open("rb") as file:
        head = file.read(LONGEST_MESSAGE + 1)
    if not head:
        return "is empty; fetch it again." if wanted == "zip" else None
    known = next((meaning for pattern, meaning in KNOWN if pattern.match(head[:LOOK])), None)
    if known is not None:
        return known
    if ZIP.match(head) and wanted == "safetensors":
        return "is what torch.save writes, or another zip archive; check the path, and give it a name that ends in .pt."
    if SAFETENSORS.match(head) and wanted == "zip":
        return "is no checkpoint of torch.save but safetensors; check the path and rename it to end in .safetensors."
    if (
        wanted != "json"
        and len(head) <= LONGEST_MESSAGE
        and head.isascii()
        and head.decode().strip().isprintable()
    ):
        return f"is a text ({head.decode().strip()[:80]!r}) and not the weights; check the address and fetch it again."
    return None
