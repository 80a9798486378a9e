"""The files of a folder that are not read: which they are, why, and what to give instead."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from packforcing_jax.convert import names

from packforcing_jax.errors import require
from packforcing_jax.io import beginnings

READABLE = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
UNREADABLE = {  # how the names of weights end that are not read -> what they are, and the remedy
    ".gguf": beginnings.GGUF,
    ".distcp": "is a piece of a distributed checkpoint of torch; join it first: "
    "`python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER weights.pt`",
    ".onnx": "is ONNX, a program with its weights; fetch the checkpoint that it was made of",
    ".msgpack": "holds weights of Flax; save them as safetensors under Wan2.1's names",
    ".h5": "holds weights of Keras; save them as safetensors under Wan2.1's names",
}
DEEPSPEED = "is a piece of a DeepSpeed checkpoint; join it first with the zero_to_fp32.py that lies beside it"
UNFINISHED = frozenset([".part", ".incomplete", ".crdownload", ".download", ".tmp", ".aria2"])
LIKE_WEIGHTS = frozenset(
    [*READABLE, *UNREADABLE, *UNFINISHED, ".pkl", ".pickle", ".npz", ".npy", ".sft", ".zip", ".tar"]
)
FOLDERS = (".", "transformer", "vae", "text_encoder")  # where a folder given may have weights
MOST_FILES = 20_000  # in a folder given
SHOWN = 4  # names in a sentence
PICKLED_COPY = re.compile(  # of what safetensors beside it hold
    r"(diffusion_)?pytorch_model\b.*\.bin\b.*"
)


@dataclass(frozen=True)
class Left:
    """A file of a source that was not read, and why; `weights`: it may hold some."""

    file: str
    bytes: int
    reason: str
    weights: bool


def told(left: Sequence[Left]) -> list[str]:
    """A line for each reason why files that may hold weights were not read."""
    by_reason: dict[str, list[str]] = {}
    for each in left:
        if each.weights:
            by_reason.setdefault(each.reason, []).append(each.file)
    return [
        f"{', '.join(files[:SHOWN])}{f' and {len(files) - SHOWN} more' if len(files) > SHOWN else ''} "
        f"{'is' if len(files) == 1 else 'are'} passed over: {reason}"
        for reason, files in by_reason.items()
    ]


def instead(path: Path) -> str:
    """What to give instead of a folder in which nothing was found to read."""
    files = files_in(path)
    unread = next((file for file in files if unreadable(file)), None)
    whole = [file for file in files if file.suffix in READABLE and not no_network(file.name)]
    elsewhere = sorted({str(file.parent) for file in whole} - {str(path)})
    if elsewhere:
        return f" of its own; give one of the folders in it that do: {', '.join(elsewhere[:SHOWN])}"
    if unread is not None:
        return f" that are read here: {unread.name} {unreadable(unread)}"
    return (
        f"; known are files that end in {', '.join(READABLE)}, a diffusers folder with "
        "transformer/, vae/ or text_encoder/, and model folders"
    )


def has_weights(path: Path) -> bool:
    return any(file.suffix in LIKE_WEIGHTS for file in files_in(path))


def files_in(path: Path) -> list[Path]:
    """The files of a folder and of those inside of it, by name, hidden folders left out."""
    found: list[Path] = []
    for folder, inner, files in os.walk(path):
        inner[:] = sorted(name for name in inner if not name.startswith(".") and name != "__MACOSX")
        found += [Path(folder, name) for name in sorted(files)]
        require(
            len(found) <= MOST_FILES,
            f"{path} holds more than {MOST_FILES} files; give the folder that the weights lie in.",
        )
    return found


def why_left(file: Path, root: Path) -> str:
    """Why a file of a folder is not read."""
    known = str(file.parent.relative_to(root)) in FOLDERS
    if names.OF_MACOS.fullmatch(file.name):
        return "a note of macOS about another file"
    if names.TRAINERS.fullmatch(file.name):
        return "the state of a trainer and no network"
    unread = unreadable(file)
    if unread is not None:
        return f"it {unread}"
    if file.suffix in UNFINISHED:
        return "the beginning of a download that did not end; fetch it again if it is meant"
    if file.suffix not in LIKE_WEIGHTS:
        return "holds no weights"
    if known:
        copy = PICKLED_COPY.fullmatch(file.name)
        return "the folder has safetensors" if copy else "of a type that is not read"
    return f"only {', '.join(FOLDERS[1:])} are looked into beside the folder itself; give the file if it is meant"


def size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:  # a link that leads nowhere
        return 0


def no_network(name: str) -> bool:
    """Whether a file's name says that it is no network's."""
    state = (names.TRAINERS, names.OF_MACOS, names.DEEPSPEED)
    return any(pattern.fullmatch(name) for pattern in state)


def unreadable(file: Path) -> str | None:
    """What a file is that holds weights in a form that is not read, with the remedy."""
    piece = names.DEEPSPEED.fullmatch(file.name) is not None
    return DEEPSPEED if piece else UNREADABLE.get(file.suffix)
