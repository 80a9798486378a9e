"""Public weights: where they lie and under which licence, and fetching them resumably, whole and checked."""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import packforcing_jax
from packforcing_jax.errors import InputError, MachineError, brief, nearest, require
from packforcing_jax.io import atomic

if TYPE_CHECKING:
    from packforcing_jax.config.cards import Card

FREE = ("apache-2.0", "mit")  # licences that need no consent
PIECE = 1 << 20  # bytes written at a time, and the unit in which progress is shown
PATIENCE = 30.0  # seconds without an answer
TRIES = 5  # attempts in a row that bring nothing
PAUSE = 2.0  # seconds between attempts
AGENT = f"packforcing-jax/{packforcing_jax.__version__}"

Watch: TypeAlias = Callable[
    [Iterable[bytes], str, int], Iterable[bytes]
]  # (pieces, what they are, bytes) -> pieces


# Where the weights lie


@dataclass(frozen=True)
class Files:
    """Files of one part of a model: names with `*`, and about how many bytes they have (None: not recorded)."""

    part: str
    names: tuple[str, ...]
    size: float | None = None


@dataclass(frozen=True)
class Source:
    """A public repository; `licence` None: not recorded here. `convert` follows `packforcing convert`.

    `unsettled` says why somebody has to look at the licence.
    """

    repository: str
    what: str
    licence: str | None
    files: tuple[Files, ...]
    convert: str
    unsettled: str = ""
    card: str = ""

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(files.part for files in self.files)

    @property
    def size(self) -> float | None:
        """About how many bytes all its files have, None if that is not recorded."""
        sizes = [files.size for files in self.files]
        return None if None in sizes else sum(size for size in sizes if size is not None)


WAN_CODEC = Files("codec", ("Wan2.1_VAE.pth",), 0.508e9)
WAN_TEXT = Files("text", ("models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl/*"), 11.36e9)
WHOLE = "{folder} --out models/{name}"
ALONE = "weights/wan2.1-t2v-1.3b {files} --out models/{name}"  # the other parts come from there
BASES = {  # cards that have more parts than the transformer
    "wan2.1-t2v-1.3b": (WAN_CODEC, WAN_TEXT),
    "wan2.1-t2v-14b": (WAN_CODEC, WAN_TEXT),
}
OTHER_LAYOUTS = {
    "wan2.1-t2v-1.3b-diffusers": Source(
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        "the same weights in the layout of diffusers, text encoder in float32",
        "apache-2.0",
        (
            Files("dit", ("transformer/*.json", "transformer/*.safetensors"), 5.68e9),
            Files("codec", ("vae/*.json", "vae/*.safetensors"), 0.508e9),
            Files(
                "text",
                ("text_encoder/*.json", "text_encoder/*.safetensors", "tokenizer/*"),
                22.73e9,
            ),
        ),
        WHOLE,
        card="wan2.1-t2v-1.3b",
    ),
}
RENAMED = {  # names of earlier versions, and the card that they fetched
    "self-forcing": "self-forcing-dmd",
    "causal-forcing": "causal-forcing-chunkwise",
    "causvid": "causvid-3step",
}


@functools.cache
def sources() -> Mapping[str, Source]:
    """What can be fetched, by name: every card with a published file, Wan2.1 before what was made of it."""
    from packforcing_jax.config import cards  # loads jax, which `--help` needs not wait for

    published = {name: _source(card) for name, card in cards.cards().items() if card.files}
    return {**{name: published[name] for name in BASES}, **OTHER_LAYOUTS, **published}


def _source(card: Card) -> Source:
    files = (*card.files, card.lora.file) if card.lora else card.files
    return Source(
        card.repository,
        card.what,
        card.licence,
        (Files("dit", files, card.size), *BASES.get(card.name, ())),
        WHOLE if card.name in BASES else ALONE,
        card.unsettled,
        card.name,
    )


def find(name: str) -> Source:
    """The source of that name; `InputError` names the nearest one, or what an earlier name is called now."""
    from packforcing_jax.config import cards

    now = RENAMED.get(name, "")
    others = [each for each in sources() if each.startswith(f"{name}-") and each != now]
    require(
        not now,
        f"the weights {name!r} are called {now} now (beside {', '.join(others)}); give that name.",
    )
    unpublished = cards.cards().get(name)
    if unpublished is not None and name not in sources():
        raise InputError(
            f"no file of {name} is published; train it with {unpublished.repository}, then "
            f"convert what that saves with --card {name}."
        )
    require(name in sources(), f"no weights {name!r}; {nearest(name, sources())}")
    return sources()[name]


# What the hub says of them


@dataclass(frozen=True)
class Remote:
    """A file as the hub records it: large ones with their SHA-256, small ones with the name git gives their content."""

    name: str
    part: str
    size: int
    sha256: str | None
    git: str | None


@dataclass(frozen=True)
class Listing:
    """The needed files of a repository at one commit; `declared`: the licence that its card names today."""

    repository: str
    commit: str
    declared: str | None
    files: tuple[Remote, ...]
    endpoint: str


def listing(source: Source, parts: Sequence[str] = (), endpoint: str | None = None) -> Listing:
    """What the hub has of `parts` (default: all) of a source, by one request that fetches no file."""
    from huggingface_hub import HfApi

    for part in parts:
        require(
            part in source.parts,
            f"{source.repository} has no part {part!r}; it has {', '.join(source.parts)}.",
        )
    api = HfApi(endpoint=endpoint, user_agent=AGENT)
    with failures(source.repository):
        info = _info(api, source.repository)
    wanted = [files for files in source.files if not parts or files.part in parts]
    remotes = tuple(
        each
        for files in wanted
        for name in files.names
        for each in _matches(source, files.part, name, info)
    )
    declared = getattr(info.card_data, "license", None)
    return Listing(source.repository, str(info.sha), declared, remotes, api.endpoint)


def _info(api, repository: str):
    """The hub's record of a repository: commit, card, files with sizes and hashes."""
    try:
        return api.model_info(repository, files_metadata=True, timeout=PATIENCE)
    except (
        json.JSONDecodeError,
        TypeError,
        KeyError,
    ) as error:  # an answer, but of another program
        raise InputError(
            f"what answers for {repository} is not a hub; check HF_ENDPOINT."
        ) from error


def _matches(source: Source, part: str, name: str, info) -> list[Remote]:
    """The files of a repository whose name fits `name`, where `*` stands for anything but a folder."""
    pattern = re.compile(re.escape(name).replace(r"\*", "[^/]*"))
    matches = [each for each in info.siblings or () if pattern.fullmatch(each.rfilename)]
    near = difflib.get_close_matches(name, [each.rfilename for each in info.siblings or ()], n=1)
    hint = f"the nearest is {near[0]}" if near else "nothing there has such a name"
    require(
        len(matches) > 0, f"{source.repository} no longer holds {name}; {hint}; fetch it by hand."
    )
    for each in matches:
        checkable = each.size is not None and bool(each.lfs or each.blob_id)
        require(
            checkable,
            f"the hub records no size or hash of {each.rfilename}; point HF_ENDPOINT to one that does.",
        )
    return [
        Remote(x.rfilename, part, int(x.size), x.lfs and x.lfs.sha256, x.blob_id) for x in matches
    ]


def terms(source: Source, declared: str | None) -> str:
    """What the weights may be used for, as one line: as recorded here, and as the model card says today."""
    card = f"; the card says {declared} today" if declared != source.licence and declared else ""
    if source.unsettled:
        known = f"{source.licence}, " if source.licence else "licence "
        return f"{source.repository}: {known}unsettled: {source.unsettled}{card}"
    if source.licence is None:
        return f"licence not recorded here; read the model card at {source.repository}{card}"
    kind = "" if source.licence in FREE else ", not for commercial use"
    return f"{source.repository}: {source.licence}{kind}{card}"


def needs_consent(source: Source, declared: str | None) -> bool:
    """Whether somebody has to accept the licence: restricted, unknown, unsettled, or changed since it was recorded."""
    free = source.licence in FREE and not source.unsettled
    return not free or declared not in (None, source.licence)


@contextlib.contextmanager
def failures(repository: str) -> Iterator[None]:
    """Inside, whatever goes wrong between here and the hub becomes an `InputError` or a `MachineError`."""
    from huggingface_hub import errors

    try:
        yield
    except errors.OfflineModeIsEnabled as error:
        raise InputError("HF_HUB_OFFLINE is set, so nothing can be fetched; unset it.") from error
    except errors.GatedRepoError as error:
        raise InputError(
            f"{repository} is gated; accept its terms on its page, then run `hf auth login`."
        ) from error
    except errors.HfHubHTTPError as error:
        raise _refusal(repository, error.response.status_code) from error
    except errors.HTTPError as error:  # pyright: ignore[reportPrivateImportUsage]  its HTTP client's, httpx or httpx2
        reason = f"{type(error).__name__}: {brief(error)}"
        raise MachineError(
            f"no connection to the hub for {repository} ({reason}); check the network and HF_ENDPOINT. "
            "The same command goes on where it stopped."
        ) from error


REFUSALS = {
    401: "is not there or not open to you; check HF_ENDPOINT, or log in with `hf auth login`.",
    403: "is closed to you; accept its terms on its page, or log in with `hf auth login`.",
    404: "or one of its files is not there; check HF_ENDPOINT.",
}


def _refusal(repository: str, status: int) -> InputError | MachineError:
    if status in REFUSALS:
        return InputError(f"{repository} {REFUSALS[status]}")
    return MachineError(
        f"the hub answers {status} for {repository}; try again later. "
        "The same command goes on where it stopped."
    )


# Fetching


@dataclass(frozen=True)
class Received:
    """A whole, checked file with its SHA-256; `fetched`: some of it came now."""

    name: str
    part: str
    size: int
    sha256: str
    fetched: bool


def unwatched(pieces: Iterable[bytes], what: str, size: int) -> Iterable[bytes]:
    """`pieces`, with nothing shown."""
    return pieces


def require_room(files: Iterable[Remote], folder: Path) -> None:
    """Raises `MachineError` unless what is missing of `files` fits on the disk of `folder`."""
    missing = sum(
        file.size - _size(partial(folder, file))
        for file in files
        if not (folder / file.name).exists()
    )
    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    free = shutil.disk_usage(there).free
    if missing > free:
        raise MachineError(
            f"{folder} needs {missing:,} bytes and its disk has {free:,} free; free space, "
            "choose fewer with --part or another --out."
        )


def partial(folder: Path, file: Remote) -> Path:
    """Where a file grows until it is whole; another version of it grows elsewhere."""
    return folder / f"{file.name}.{(file.sha256 or file.git or '')[:12]}.part"


def fetch(
    listed: Listing,
    file: Remote,
    folder: Path,
    *,
    watch: Watch = unwatched,
    tries: int = TRIES,
    pause: float = PAUSE,
) -> Received:
    """The file in `folder`, whole and checked; what is already there is checked too, or continued if it is partial."""
    target = folder / file.name
    growing = partial(folder, file)
    if target.exists():
        sha256, fault = _examined(target, file, watch)
        require(
            fault is None,
            f"{target} {fault}, as {listed.repository} has it; remove it or choose another --out.",
        )
        return Received(file.name, file.part, file.size, sha256, fetched=False)
    growing.parent.mkdir(parents=True, exist_ok=True)
    before = _size(growing)
    _complete(listed, file, growing, watch=watch, tries=tries, pause=pause)
    sha256, fault = _examined(growing, file, watch)
    if fault is not None:
        growing.unlink()
        raise MachineError(
            f"{file.name} arrived damaged: it {fault}, as {listed.repository} has it. It was removed; "
            "run the same command again."
        )
    atomic.move(growing, target)
    return Received(file.name, file.part, file.size, sha256, fetched=before < file.size)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _complete(
    listed: Listing, file: Remote, growing: Path, *, watch: Watch, tries: int, pause: float
) -> None:
    """Returns when `growing` has all bytes; gives up after `tries` attempts in a row that brought none."""
    idle = 0
    while (before := _size(growing)) < file.size:
        failure = MachineError(
            f"the hub sends only {before:,} of {file.size:,} bytes of {file.name}; try again later."
        )
        try:
            with failures(listed.repository):
                _continue(listed, file, growing, watch)
        except MachineError as error:
            failure = error
        idle = 0 if _size(growing) > before else idle + 1
        if idle >= tries:
            raise failure
        time.sleep(pause if idle else 0)
    growing.touch()  # no bytes are asked for if the file has none


def _continue(listed: Listing, file: Remote, growing: Path, watch: Watch) -> None:
    """Appends to `growing` what one request brings; the library itself would begin anew (since its version 1.18)."""
    start = _size(growing)
    with _answer(listed, file, start) as response, growing.open("ab") as out:
        start = (
            start if response.status_code == 206 else 0
        )  # a server that knows no ranges sends all of it
        out.truncate(start)
        for piece in watch(response.iter_bytes(PIECE), file.name, file.size - start):
            out.write(piece)
            if out.tell() > file.size:
                break
        out.flush()
        os.fsync(out.fileno())


@contextlib.contextmanager
def _answer(listed: Listing, file: Remote, start: int):
    """The hub's answer when asked for a file from byte `start` on."""
    from huggingface_hub import get_session, hf_hub_url, hf_raise_for_status
    from huggingface_hub.utils import build_hf_headers

    url = hf_hub_url(listed.repository, file.name, revision=listed.commit, endpoint=listed.endpoint)
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    headers = build_hf_headers(user_agent=AGENT, headers=headers)
    with get_session().stream("GET", url, headers=headers, timeout=PATIENCE) as response:
        hf_raise_for_status(response)
        yield response


def _examined(path: Path, file: Remote, watch: Watch) -> tuple[str, str | None]:
    """(SHA-256 of what is on the disk, what is wrong with it or None)."""
    sha256 = hashlib.sha256()
    git = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
    with path.open("rb") as stream:
        for piece in watch(
            iter(lambda: stream.read(PIECE), b""), f"checking {file.name}", _size(path)
        ):
            sha256.update(piece)
            if not file.sha256:
                git.update(piece)
    got, wanted = (sha256, file.sha256) if file.sha256 else (git, file.git)
    if _size(path) != file.size:
        return sha256.hexdigest(), f"has {_size(path):,} bytes, not {file.size:,}"
    wrong = got.hexdigest() != wanted
    return (
        sha256.hexdigest(),
        f"has {got.name.upper()} {got.hexdigest()}, not {wanted}" if wrong else None,
    )
