"""What can be prepared for training: videos with captions, prompts, LMDB folders, a teacher's trajectories."""

import collections
import functools
import hashlib
import json
import math
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias, cast

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from packforcing_jax import pytrees
from packforcing_jax.config import Experiment, TrainConfig
from packforcing_jax.data import lmdb_files
from packforcing_jax.errors import InputError, brief, require
from packforcing_jax.io import ffmpeg, lines, model_folder, text_encoder
from packforcing_jax.networks import codec, dit
from packforcing_jax.networks import vae as autoencoder
from packforcing_jax.networks.tokenizer import Tokenizer, clean
from packforcing_jax.sampling import player, prompt_files
from packforcing_jax.training import batches, paths
from packforcing_jax.types import Latent

VIDEOS = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi"}
STORED = np.float16  # of latents, as in the public data sets
Example: TypeAlias = dict[str, np.ndarray]
EncoderState: TypeAlias = Any  # between two chunks of a video; each codec has its own structure
Database: TypeAlias = Any  # an lmdb.Environment; lmdb is optional


class LeftOut(Exception):
    """An item that gives no example, in one sentence; the others are prepared without it."""


@dataclass(frozen=True)
class Parts:
    """What turns items into examples: the sizes of `exp`, the codec and the text encoder, None where there is none."""

    exp: Experiment
    vae: codec.Codec | None = None
    text: text_encoder.Encoder | None = None
    tokenizer: Tokenizer | None = None
    teacher: batches.Model | None = None
    train: TrainConfig = TrainConfig()  # by which a teacher draws trajectories
    null_text: Array | None = None  # [words, d]  that it is guided away from; None: zeros


@dataclass(frozen=True)
class Item:
    """One thing to prepare; `made` gives its latents and what else belongs to them, by its text states if there are."""

    name: str
    prompt: str
    made: Callable[[Parts, np.ndarray | None], Example]


@dataclass(frozen=True)
class Kind:
    """A kind of source: whether `path` is one, what is in it, what of a model it cannot do without.

    A new one is a new row of `KINDS`.
    """

    sees: Callable[[Path], bool]
    items: Callable[[Path], list[Item]]
    needs: tuple[str, ...]
    called: str


def recognised(path: Path) -> str:
    """The kind of source that `path` is."""
    require(
        path.exists(),
        f"{path} does not exist; give a folder of videos, a file of prompts or an LMDB folder.",
    )
    kinds = [name for name, kind in KINDS.items() if kind.sees(path)]
    known = "; ".join(f"{name}: {kind.called}" for name, kind in KINDS.items())
    require(len(kinds) > 0, f"{path} is nothing that can be prepared ({known}); give one of these.")
    return kinds[0]


def digest(items: Iterable[Item]) -> str:
    """What tells one source from another: a hash of the names and prompts of its items, in order."""
    state = hashlib.sha256()
    for item in items:
        state.update(f"{item.name}\0{item.prompt}\0".encode())
    return state.hexdigest()[:32]


# Videos with captions


def _holds_videos(path: Path) -> bool:
    if path.is_dir():
        return any(each.suffix.lower() in VIDEOS for each in path.rglob("*"))
    return path.suffix.lower() == ".jsonl" and any("file" in table for table in _tables(path)[:1])


def _videos(path: Path) -> list[Item]:
    """The videos of a folder with a text file beside each, or of a file with a line of JSON for each."""
    return [
        Item(
            f"{file.relative_to(base)} {file.stat().st_size}",
            prompt,
            functools.partial(_of_video, file),
        )
        for base, file, prompt in (_beside(path) if path.is_dir() else _listed(path))
    ]


def _beside(folder: Path) -> Iterable[tuple[Path, Path, str]]:
    files = sorted(
        each
        for each in folder.rglob("*")
        if each.suffix.lower() in VIDEOS and not each.name.startswith(".")
    )
    bare = [file for file in files if not file.with_suffix(".txt").is_file()]
    require(
        not bare,
        f"{len(bare)} of {len(files)} videos have no caption ({few(bare)}); write each into a file of the same name "
        "with the suffix .txt.",
    )
    for file in files:
        caption = file.with_suffix(".txt")
        told = lines.read(caption, f"caption {caption}", f"say in UTF-8 what {file.name} shows")
        prompt = clean("\n".join(told))
        require(prompt != "", f"{caption} is empty; say what {file.name} shows.")
        yield folder, file, prompt


def few(names: Sequence[object], most: int = 5) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more


def _listed(path: Path) -> Iterable[tuple[Path, Path, str]]:
    for number, table in enumerate(_tables(path), start=1):
        complete = {"file", "prompt"} == table.keys() and all(
            isinstance(each, str) for each in table.values()
        )
        require(
            complete,
            f"{path}, video {number}: {json.dumps(table)[:80]} is not "
            '{"file": "...", "prompt": "..."}; write it so.',
        )
        file = path.parent / table["file"]
        prompt = clean(table["prompt"])
        require(file.is_file(), f"{path}, video {number}: {file} does not exist; correct it.")
        require(
            prompt != "", f"{path}, video {number}: prompt is empty; say what {file.name} shows."
        )
        yield path.parent, file.absolute() if ".." in table["file"] else file, prompt


def _tables(path: Path) -> list[dict[str, Any]]:
    """The tables of a file of JSON lines."""
    written = lines.read(path, str(path), "write one JSON table per line, in UTF-8")
    try:
        tables = [json.loads(line) for line in written if line.strip()]
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path} cannot be read ({brief(error)}); write one JSON table per line."
        ) from error
    require(
        all(isinstance(table, dict) for table in tables),
        f"{path} holds more than tables; write one per line.",
    )
    return tables


def frames_of(path: Path, *, count: int, fps: int, size: tuple[int, int]) -> np.ndarray:
    """The first `count` frames at `fps` a second, scaled to fill (height, width) and cropped: uint8 [t, h, w, 3]."""
    height, width = size
    filters = (
        f"fps={fps},scale={width}:{height}:force_original_aspect_ratio=increase"
        f":flags=bicubic+accurate_rnd+full_chroma_int,crop={width}:{height}"
    )
    command = [
        ffmpeg.program(),
        "-nostdin",
        "-hide_banner",
        "-v",
        "error",
        "-i",
        f"file:{path}",
        "-vf",
        filters,
        "-frames:v",
        str(count),
        "-f",
        "rawvideo",
        "-pix_fmt",
        "rgb24",
        "-",
    ]
    done = subprocess.run(
        command, capture_output=True, process_group=0
    )  # Ctrl-C is for us, not for ffmpeg
    if done.returncode:
        messages = done.stderr.decode(errors="replace").strip().splitlines() or [
            f"exit status {done.returncode}"
        ]
        raise LeftOut(f"{path} cannot be decoded ({messages[-1]})")
    wrong = done.stderr.decode(errors="replace").strip().splitlines()
    if wrong:
        raise LeftOut(
            f"{path} is damaged: ffmpeg told of {len(wrong)} errors while decoding it ({wrong[0]})"
        )
    return np.frombuffer(done.stdout, np.uint8).reshape(-1, height, width, 3)


# A codec as a stream: the state before the first frame, and the latents of the next frames
STREAMS: Mapping[type, tuple[Callable, Callable]] = {
    autoencoder.WanVAE: (autoencoder.init_encoder, autoencoder.encode_chunk),
    codec.SpaceToDepth: (
        lambda vae, batch, height, width: (),
        lambda vae, state, frames, first: (codec.encode(vae, frames), state),
    ),
}


@functools.partial(jax.jit, static_argnames=("exp", "first"))
def _encode_block(
    vae: codec.Codec, exp: Experiment, state: EncoderState, frames: Array, *, first: bool
) -> tuple[Latent, Latent, EncoderState]:
    """(latents, low-resolution latents, the codec's state) of the frames of one block, uint8 [1, t, h, w, 3]."""
    video = frames.astype(jnp.float32) / 127.5 - 1
    latent, state = STREAMS[type(vae)][1](vae, state, video, first=first)
    return (
        latent,
        codec.low_res_latents(vae, video, latents=exp.packed_grid[0], pool=exp.compressor.pool),
        state,
    )


def _of_video(path: Path, parts: Parts, text_states: np.ndarray | None = None) -> Example:
    """The latents of a video's beginning, and the low-resolution ones of each of its blocks."""
    exp = parts.exp
    vae = parts.vae
    size = (exp.latent[0] * exp.codec.space_factor, exp.latent[1] * exp.codec.space_factor)
    count = codec.frames_of(exp.codec, exp.clip)
    frames = frames_of(path, count=count, fps=exp.fps, size=size)
    if len(frames) < count:
        raise LeftOut(f"{path} has {len(frames)} frames at {exp.fps} a second, {count} are needed")
    starts = [codec.frames_of(exp.codec, at) for at in range(0, exp.clip, exp.cache.block)]
    state = STREAMS[type(vae)][0](vae, 1, *size)
    blocks = []
    for start, end in zip(starts, [*starts[1:], count], strict=True):
        latent, low_res, state = _encode_block(
            vae, exp, state, frames[None, start:end], first=start == 0
        )
        blocks.append((latent[0], low_res[0]))
    latents, low_res = zip(*jax.device_get(blocks), strict=True)
    return {
        "latent": np.concatenate(latents).astype(STORED),
        "low_res": np.stack(low_res).astype(STORED),
    }


# Prompts


def _holds_prompts(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() not in VIDEOS


def _prompts(path: Path) -> list[Item]:
    """The prompts of a file, one per line as text or JSON."""
    jobs = prompt_files.read(path)
    several = [job.source for job in jobs if len(job.entries) > 1]
    require(
        not several,
        f"{several[0] if several else ''} is a timeline, but text states are those of one prompt; "
        "train on the file itself (train.source.kind=prompts).",
    )
    return [
        Item(str(number), job.entries[0][1], lambda parts, text_states: {})
        for number, job in enumerate(jobs)
    ]


# The public LMDB layout: `latents_shape`, `prompts_shape`, and `latents_N_data`, `prompts_N_data` for each clip


def _databases(path: Path) -> list[Path]:
    """The LMDB folders that `path` is or holds."""
    return (
        [path]
        if (path / "data.mdb").is_file()
        else sorted(file.parent for file in path.glob("*/data.mdb"))
    )


def _clips(path: Path) -> list[Item]:
    """The clips of one LMDB folder or of a folder of them."""
    return [item for each in _databases(path) for item in _clips_of(each)]


def _clips_of(path: Path) -> Iterable[Item]:
    database = _opened(path)
    shape = _read(database, path, "latents_shape").split()
    require(
        len(shape) in (5, 6) and all(n.isdigit() and len(n) < 10 for n in shape),
        f"{path}: latents_shape={shape} is not "
        "N [states] frames channels rows columns; fetch the data again.",
    )
    count, *form = map(int, shape)
    for index in range(count):
        prompt = _text(_read(database, path, f"prompts_{index}_data"), path, index)
        yield Item(
            f"{path.name} {index} {form}",
            prompt,
            functools.partial(_of_clip, database, path, index, (1, *form)[-5:]),
        )


def _text(stored: bytes, path: Path, index: int) -> str:
    try:
        return stored.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: prompts_{index}_data is not UTF-8 ({error}); store the prompt as UTF-8."
        ) from error


def _opened(path: Path) -> Database:
    try:
        import lmdb  # type: ignore[import-not-found]
    except ImportError as error:
        raise InputError(
            f"{path} is an LMDB folder, but lmdb is missing; install packforcing-jax[lmdb]."
        ) from error
    lmdb_files.require_whole(path)
    try:
        return lmdb.open(str(path), readonly=True, lock=False, readahead=False, meminit=False)
    except lmdb.Error as error:
        raise InputError(f"{path} cannot be read as LMDB ({error}); fetch it again.") from error


def _read(database: Database, path: Path, key: str) -> bytes:
    with database.begin() as reading:
        value = reading.get(key.encode())
    require(value is not None, f"{path} has no entry {key}; fetch it again.")
    return value


def _of_clip(
    database: Database,
    path: Path,
    index: int,
    form: tuple[int, ...],
    parts: Parts,
    text_states: np.ndarray | None = None,
) -> Example:
    """The clean latents of a clip, the trajectory that ends there if it has one, what a codec makes of its blocks."""
    exp = parts.exp
    raw = _read(database, path, f"latents_{index}_data")
    size = 2 * math.prod(form)
    require(
        len(raw) == size,
        f"{path}: latents_{index}_data has {len(raw)} bytes, but float16{list(form)} has {size}; "
        "fetch it again.",
    )
    states = einops.rearrange(np.frombuffer(raw, "<f2").reshape(form), "k t c y x -> k t y x c")
    require(
        states.shape[1] >= exp.clip and states.shape[2:] == (*exp.latent, exp.dit.in_channels),
        f"{path} holds {states.shape[1]} frames of {list(states.shape[2:])}, but clip={exp.clip}, "
        f"latent={exp.latent} and dit.in_channels={exp.dit.in_channels}; give another --config.",
    )
    states = states[:, : exp.clip]
    low_res = {} if parts.vae is None else {"low_res": _low_res(parts.vae, exp, states[-1])}
    return {"latent": states[-1]} | ({"trajectory": states} if len(states) > 1 else {}) | low_res


def _low_res(vae: codec.Codec, exp: Experiment, latent: np.ndarray) -> np.ndarray:
    """The low-resolution latents of each block of a clip's latents, through its pixels as when sampling."""
    decoder = codec.init_decoder(vae, 1, *exp.latent)
    blocks = []
    for start in range(0, exp.clip, exp.cache.block):
        block = jnp.asarray(latent[None, start : start + exp.cache.block], jnp.float32)
        _, low_res, decoder = player.show_program(
            vae,
            decoder,
            block,
            first=start == 0,
            shrink=player.Shrink(exp.packed_grid[0], exp.compressor.pool),
        )
        blocks.append(low_res[0])
    return np.stack(jax.device_get(blocks)).astype(STORED)


# A teacher's trajectories


def _to_draw(path: Path) -> list[Item]:
    """The prompts of a file, each to be sampled by a teacher from noise of its own."""
    return [
        replace(item, made=functools.partial(_of_teacher, number))
        for number, item in enumerate(_prompts(path))
    ]


def _of_teacher(number: int, parts: Parts, text_states: np.ndarray | None = None) -> Example:
    """The states on a teacher's trajectory to a clip, and the clip."""
    exp = parts.exp
    read = np.zeros((1, 1, parts.exp.text.max_words, parts.exp.text.dim), np.float32)
    read[0, 0, : len(text_states)] = text_states  # type: ignore[arg-type]
    teacher: Any = parts.teacher
    states = np.asarray(
        paths.noise_to_clip(
            teacher, exp, parts.train, jnp.uint32(number), jnp.asarray(read), parts.null_text
        )
    )
    clip = einops.rearrange(states, "k block 1 t y x c -> k (block t) y x c").astype(STORED)
    low_res = {} if parts.vae is None else {"low_res": _low_res(parts.vae, exp, clip[-1])}
    return {"latent": clip[-1], "trajectory": clip} | low_res


KINDS = {
    "lmdb": Kind(
        lambda path: bool(_databases(path)),
        _clips,
        (),
        "a folder with data.mdb, or of such folders",
    ),
    "videos": Kind(
        _holds_videos,
        _videos,
        ("vae",),
        "a folder of videos, each with a .txt, or JSONL with file",
    ),
    "prompts": Kind(_holds_prompts, _prompts, ("text",), "a text or JSONL file of prompts"),
    "trajectories": Kind(
        lambda path: False, _to_draw, ("text", "teacher"), "the same, drawn by a teacher (--kind)"
    ),
}


# What a model adds


def parts_of(
    exp: Experiment,
    model: model_folder.Opened | None,
    needs: Sequence[str] = (),
    train: TrainConfig = TrainConfig(),
) -> Parts:
    """The codec and the text encoder of a model folder, and the teacher if it `needs` one, sized as `exp`."""
    shapes = codec.shapes(exp.codec)
    own = codec.make(exp.codec, nnx.Rngs(0)) if not pytrees.flatten(shapes) else None
    parts = Parts(exp, own, train=train)
    if model is None:
        return parts
    require(
        (exp.codec, exp.text) == (model.experiment.codec, model.experiment.text),
        f"the codec or the text encoder of {model.folder} has other sizes than --config asks for; leave it out.",
    )
    if "codec" in model.parts and parts.vae is None:
        source = f"the codec weights of {model.folder}"
        parts = replace(
            parts,
            vae=model_folder.fill(shapes, model.part("codec"), dtype=exp.dtypes.vae, source=source),
        )
    if "text" in model.parts:
        read = Tokenizer.from_file(model.folder / model_folder.TOKENIZER, exp.text.max_words)
        parts = replace(
            parts,
            text=replace(text_encoder.of_folder(model, exp.text, exp.dtypes), store=None),
            tokenizer=read,
        )
    if "teacher" in needs:
        form = jax.eval_shape(lambda: dit.WanDiT(exp.dit, nnx.Rngs(0)))
        teacher = model_folder.fill(
            form,
            model.part("dit"),
            dtype=exp.dtypes.compute,
            source=f"the teacher of {model.folder}",
        )
        parts = replace(parts, teacher=batches.Model(dit=teacher, compressor=cast(Any, None)))
        if train.negative_prompt and parts.text is not None:
            (null_text,) = Texts(parts, [train.negative_prompt])([train.negative_prompt])
            parts = replace(parts, null_text=jnp.asarray(null_text))
    return parts


class Texts:
    """Text states of prompts, [words, d] up to their ends; a prompt that comes again is read once."""

    def __init__(self, parts: Parts, prompts: Iterable[str]):
        self._parts = parts
        self._left = collections.Counter(prompts)
        self._known: dict[str, np.ndarray] = {}

    def __call__(self, prompts: Sequence[str]) -> list[np.ndarray]:
        """The states of the next prompts, in one walk through the encoder."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._known]
        if new:
            self._known |= zip(new, self._walk(new), strict=True)
        states = [self._known[prompt] for prompt in prompts]
        self._left.subtract(prompts)
        self._known = {
            prompt: states for prompt, states in self._known.items() if self._left[prompt] > 0
        }
        return states

    def _walk(self, prompts: list[str]) -> list[np.ndarray]:
        ids, mask = self._parts.tokenizer.encode(prompts)  # type: ignore[union-attr]
        states = np.asarray(self._parts.text(ids, mask))  # type: ignore[misc]
        return [each[: real.sum()] for each, real in zip(states, mask, strict=True)]


def require_finite(item: Item, example: Example) -> None:
    """Raises `LeftOut` for an example that holds what no training could use."""
    for name, value in example.items():
        if np.issubdtype(value.dtype, np.floating) or value.dtype.kind == "V":
            broken = int((~np.isfinite(value.astype(np.float32))).sum())
            if broken:
                raise LeftOut(
                    f"{item.name}: {broken} of {value.size} values of {name} are not finite"
                )


def as_bytes(text: str) -> np.ndarray:
    """Text as numbers, UTF-8."""
    return np.frombuffer(text.encode(), np.uint8)
