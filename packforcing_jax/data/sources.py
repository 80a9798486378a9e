"""Training data as endless batches: the Stage world, prepared records, or prompts, in rows of each process."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import grain
import jax
import numpy as np
from flax import nnx

from packforcing_jax.config import DataConfig, Experiment
from packforcing_jax.data import records
from packforcing_jax.errors import nearest, require
from packforcing_jax.networks import codec, mesh
from packforcing_jax.sampling import prompt_files, timelines
from packforcing_jax.stage import data, world

Example: TypeAlias = dict[str, np.ndarray]
Encode: TypeAlias = Callable[
    [list[str]], tuple[np.ndarray, np.ndarray]
]  # prompts -> ids and mask, [prompts, words]
ENDLESS = 2**40  # more batches than any run reads
STAGE = (
    "video",
    "ids",
    "mask",
    "weight",
    "called",
)  # of what the Stage world tells, what training reads
FROM_VIDEO = ("latent", "low_res")  # what the codec makes of pixels on the way
ARRAYS = ("latent", "low_res", "trajectory", "states")  # of what records hold, what training reads


@dataclass(frozen=True)
class Source:
    """Examples by index, `offers` the names an objective finds in them; `called` is the source in sentences.

    Each example of an `endless` source is new; the others are shuffled anew each time all were seen.
    """

    examples: grain.MapDataset
    offers: tuple[str, ...]
    called: str
    endless: bool = False


@dataclass(frozen=True)
class Share:
    """The rows of every batch that one of several processes reads: process p has rows p b/P to (p + 1) b/P."""

    batch: int  # examples of a whole batch
    process: int = 0
    processes: int = 1

    def __post_init__(self):
        require(
            self.batch % self.processes == 0 and self.batch > 0,
            f"a batch of {self.batch} examples cannot be divided among {self.processes} "
            "processes; change train.batch.",
        )

    @property
    def rows(self) -> int:
        """Rows of one batch."""
        return self.batch // self.processes

    def example(self, row: int) -> int:
        """Which of all examples is this process's `row`, counted through the batches."""
        step, within = divmod(row, self.rows)
        return step * self.batch + self.process * self.rows + within


def batches(
    exp: Experiment,
    cfg: DataConfig,
    share: Share,
    *,
    seed: int,
    encode: Encode | None = None,
    needs: Sequence[str] = (),
) -> grain.DatasetIterator:
    """One process's share of endless batches; raises `InputError` for what is known to be wrong.

    Batch i is a function of (seed, i), whatever the number of processes. The iterator's state counts batches, so that
    it can be set by any number of processes.
    """
    kind = of(cfg)
    source = kind.opened(exp, cfg, seed, encode)
    missing = [name for name in needs if name not in source.offers]
    require(
        not missing,
        f"{source.called} holds {', '.join(source.offers)}, but this objective needs "
        f"{', '.join(missing)}; prepare such data or choose another objective.",
    )
    examples = endless(source, seed=seed, limit=cfg.limit)

    def row(index: int) -> Example | None:
        return examples[share.example(int(index))]

    local = grain.MapDataset.range(ENDLESS * share.rows).map(row)
    local = local.batch(share.rows, drop_remainder=True)
    threads = kind.threads
    return iter(
        local.to_iter_dataset(
            grain.ReadOptions(num_threads=threads, prefetch_buffer_size=1 + threads)
        )
    )


def endless(source: Source, *, seed: int, limit: int = 0) -> grain.MapDataset:
    """The first `limit` examples of `source` (0: all) again and again, each time in another order."""
    require(limit >= 0, f"train.source.limit={limit} is negative; give 0 for all examples.")
    require(
        source.endless or limit <= len(source.examples),
        f"train.source.limit={limit} exceeds the "
        f"{len(source.examples)} examples of {source.called}; lower it.",
    )
    if source.endless and limit == 0:
        return source.examples
    some = source.examples[:limit] if limit else source.examples
    # Grain takes seeds of 32 bits alone
    return some.shuffle(seed=int(np.random.SeedSequence(seed).generate_state(1)[0])).repeat()


# What there is to read


def _stage(exp: Experiment, cfg: DataConfig, seed: int, encode: Encode | None) -> Source:
    """The Stage world's clips, each a function of (seed, index)."""
    known = data.remembering(_require_encode(encode, "the Stage world"))

    def clip(index: int) -> Example:
        arrays = data.clip(seed, int(index), known)
        return {name: arrays[name] for name in STAGE}

    frames = codec.frames_of(exp.codec, exp.clip)
    factor = exp.codec.space_factor
    shape = clip(0)["video"].shape
    wanted = (frames, *(side * factor for side in exp.latent), 3)
    require(
        shape == wanted,
        f"the Stage world draws clips of {list(shape)}, but clip={exp.clip} and "
        f"latent={exp.latent} of this config are {list(wanted)}; use the config `stage`.",
    )
    require(
        exp.cache.block == world.BLOCK,
        f"the Stage world has a prompt every {world.BLOCK} frames, but "
        f"cache.block={exp.cache.block}; set it to {world.BLOCK}.",
    )
    return Source(
        grain.MapDataset.range(data.CLIPS).map(clip),
        (*STAGE, *FROM_VIDEO),
        "the Stage world",
        endless=True,
    )


def _records(exp: Experiment, cfg: DataConfig, seed: int, encode: Encode | None) -> Source:
    """What `prepare` wrote. Prompts without text states are tokenised when they are read."""
    dataset = records.opened(_path(cfg, "folder"))
    fields = dataset.notes.fields
    called = f"data set {dataset.folder}"
    check_forms(exp, fields, called)
    arrays = tuple(name for name in ARRAYS if name in fields)
    known = None if "states" in fields else _require_encode(encode, called)

    def example(stored: Mapping[str, np.ndarray]) -> Example:
        selected = {name: stored[name] for name in arrays}
        if known is not None:
            return selected | _tokenised(known, [bytes(stored["prompt"]).decode()] * exp.blocks)
        return selected | {"states": _padded(selected["states"], exp.text.max_words, called)}

    offers = arrays if known is None else (*arrays, "ids", "mask")
    return Source(grain.MapDataset.source(dataset).map(example), offers, called)


def _prompts(exp: Experiment, cfg: DataConfig, seed: int, encode: Encode | None) -> Source:
    """A file of prompts or timelines, one clip per line, tokenised when they are read."""
    path = _path(cfg, "file")
    require(path.is_file(), f"prompt file {path} does not exist; correct train.source.path.")
    jobs = prompt_files.read(path)
    known = _require_encode(encode, f"prompt file {path}")

    def example(job: prompt_files.Job) -> Example:
        return _tokenised(known, timelines.spread(list(job.entries), exp.blocks))

    example(jobs[0])
    return Source(
        grain.MapDataset.source(jobs).map(example), ("ids", "mask"), f"prompt file {path}"
    )


@dataclass(frozen=True)
class Kind:
    """How a kind of data is opened, and by how many threads it is read; a new one is a new row of `KINDS`."""

    opened: Callable[[Experiment, DataConfig, int, Encode | None], Source]
    threads: int
    tokenized: bool = True  # whether it holds words, which the generator's own text encoder reads


KINDS = {
    "stage": Kind(_stage, 1),  # drawing is Python, which one thread at a time can run
    "records": Kind(_records, 4, tokenized=False),
    "prompts": Kind(_prompts, 1),
}


def of(cfg: DataConfig) -> Kind:
    """The kind of data that `cfg` names."""
    require(
        cfg.kind in KINDS, f"train.source.kind={cfg.kind!r} is unknown; {nearest(cfg.kind, KINDS)}"
    )
    return KINDS[cfg.kind]


def _path(cfg: DataConfig, what: str) -> Path:
    require(
        cfg.path != "",
        f"train.source.kind={cfg.kind!r} reads a {what}; name it in train.source.path.",
    )
    return Path(cfg.path)


def _require_encode(encode: Encode | None, what: str) -> Encode:
    require(
        encode is not None,
        f"the prompts of {what} have to be tokenised; name a model with a tokenizer in "
        "train.generator_from, or prepare their text states.",
    )
    return encode  # type: ignore[return-value]


def _tokenised(encode: Encode, prompts: list[str]) -> Example:
    ids, mask = encode(prompts)
    return {"ids": np.asarray(ids, np.int32), "mask": np.asarray(mask, np.int32)}


def _padded(states: np.ndarray, length: int, called: str) -> np.ndarray:
    require(
        len(states) <= length,
        f"{called} holds text states of {len(states)} words, but text.max_words={length}; "
        "prepare it with this config.",
    )
    return np.concatenate([states, np.zeros((length - len(states), states.shape[1]), states.dtype)])


def low_res_shape(exp: Experiment) -> tuple[int, ...]:
    """The shape [t', y', x', c] of a block's low-resolution latents."""

    def low_res() -> Any:
        pixels = codec.make(exp.codec, nnx.Rngs(0))
        sides = (side * exp.codec.space_factor for side in exp.latent)
        video = jax.numpy.zeros((1, exp.cache.block * exp.codec.time_factor, *sides, 3))
        return codec.low_res_latents(
            pixels, video, latents=exp.packed_grid[0], pool=exp.compressor.pool
        )

    return jax.eval_shape(low_res).shape[1:]


def check_forms(exp: Experiment, fields: Mapping[str, records.Field], called: str) -> None:
    """Raises `InputError` for the first field that is not of the sizes of `exp`."""
    latent = (exp.clip, *exp.latent, exp.dit.in_channels)
    wanted = {"latent": latent, "trajectory": (None, *latent), "states": (None, exp.text.dim)}
    if "low_res" in fields:
        wanted["low_res"] = exp.blocks, *low_res_shape(exp)
    for name in fields.keys() & wanted.keys():
        shape = fields[name].shape
        form = wanted[name]
        fits = len(shape) == len(form) and all(b in (None, a) for a, b in zip(shape, form))
        require(
            fits,
            f"{called} holds {records.spell({name: fields[name]})}, but clip={exp.clip}, "
            f"latent={exp.latent}, dit.in_channels={exp.dit.in_channels}, cache.block={exp.cache.block} and "
            f"text.dim={exp.text.dim} need {_spell(form)}; prepare it with this config.",
        )


def _spell(form: Sequence[int | None]) -> str:
    return f"[{', '.join('*' if size is None else str(size) for size in form)}]"


def global_batch(over: jax.sharding.Mesh, raw: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """A batch over all processes out of each one's rows, its first axis divided over `data` and `fsdp`."""
    sharding = mesh.batch_sharding(over)
    return {
        name: jax.make_array_from_process_local_data(sharding, value) for name, value in raw.items()
    }
