"""What a model knows, read off its videos by the Stage world's oracle: teacher-forced and rolled out.

Two questions. `teacher_forced`: is each next block right behind true ones? `rollout`: does a long video
stay right? Every figure has n, a 95 % interval and the level that guessing reaches.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from packforcing_jax import pytrees
from packforcing_jax.config import Experiment, TrainConfig
from packforcing_jax.errors import require
from packforcing_jax.io import checkpoints
from packforcing_jax.networks import codec
from packforcing_jax.sampling import pipeline, player
from packforcing_jax.sampling.pipeline import Pipeline
from packforcing_jax.stage import captions, data, metrics, oracle, world
from packforcing_jax.stage.stories import default_timeline
from packforcing_jax.training import batches, state
from packforcing_jax.types import KV, Latent

HELD_OUT = 1_000_003  # a seed that no training run uses
Row = dict  # chance, value [share or RMS, low, high], n
Watch = Callable[[Iterable], Iterable]  # shows progress over what it passes on


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the videos of a figure are sampled: the seed, how many together, and what shows progress."""

    seed: int = HELD_OUT
    batch: int = 16
    watch: Watch = iter

    def chunks(self, count: int) -> Iterable[range]:
        """0..count-1 in runs of at most `batch`, watched."""
        return self.watch(chunks(count, self.batch))


# Models


def newest(run: str | Path) -> Path:
    """The newest checkpoint in the folder of a training run."""
    steps = [path for path in Path(run, "checkpoints").glob("*") if path.name.isdigit()]
    require(len(steps) > 0, f"{run} holds no checkpoint; give the --out of `packforcing train`.")
    return max(steps, key=lambda path: int(path.name))


def of_checkpoint(exp: Experiment, train: TrainConfig, checkpoint: Path) -> Pipeline:
    """The averaged weights of a training checkpoint; the run's folder is only read."""
    form = jax.eval_shape(lambda: state.init(exp, train, jax.random.key(0), {}))
    now, _ = checkpoints.Checkpoints(checkpoint.parent).restore(form, int(checkpoint.name))
    model = batches.as_model(exp, now.ema)
    return Pipeline.of(exp, model.nets, model.text, captions.reader())


def with_cache(model: Pipeline, **changes) -> Pipeline:
    """The same model with fields of its memory changed."""
    exp = model.experiment
    return dataclasses.replace(
        model, experiment=dataclasses.replace(exp, cache=dataclasses.replace(exp.cache, **changes))
    )


def require_stage(exp: Experiment) -> None:
    """Raises `InputError` unless the oracle can read the videos of `exp`."""
    require(
        captions.tells(exp),
        f"experiment {exp.name!r} draws no stage videos, which the oracle reads; "
        "evaluate a stage model.",
    )


# Videos


def one_step(model: Pipeline) -> Pipeline:
    """The same model with the first denoising step alone, which is enough to choose packed blocks."""
    exp = model.experiment
    sample = dataclasses.replace(exp.sample, steps=exp.sample.steps[:1])
    return dataclasses.replace(model, experiment=dataclasses.replace(exp, sample=sample))


def read_texts(
    model: Pipeline, prompts: Sequence[Sequence[str]]
) -> tuple[list[KV], Int[np.ndarray, "video block"]]:
    """Text keys and values per layer, [sentence, words, n, h], of the different sentences, and which one is whose.

    Each sentence goes through the program that `Pipeline` has for one: a wider one rounds otherwise.
    """
    different, which = np.unique(np.array(prompts), return_inverse=True)
    states = model.text(*model.tokenizer.encode(list(different)))
    dit = model.nets.dit
    compute = model.experiment.dtypes.compute
    each = [jax.device_get(player.text_program(dit, compute, one[None])) for one in states]
    return jax.tree.map(lambda *ones: np.concatenate(ones), *each), which.reshape(np.shape(prompts))


def text_of(texts: list[KV], sentences: Int[np.ndarray, " video"]) -> list[KV]:
    """Text keys and values per layer of one sentence for each video."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf[sentences]), texts)


def true_block(
    model: Pipeline, truth: Float[np.ndarray, "video frames 32 32 3"], block: int
) -> Latent:
    """The latent of one block of true frames."""
    frames = truth[:, block * world.BLOCK : (block + 1) * world.BLOCK]
    return codec.encode(model.vae, jnp.asarray(frames, jnp.float32))


def play(
    model: Pipeline,
    prompts: Sequence[Sequence[str]],
    *,
    seeds: Sequence[int],
    videos: Sequence[int],
    truth: Float[np.ndarray, "video frames 32 32 3"] | None = None,
    first: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Frames [video, t, 32, 32, 3] and chosen blocks [block, layer, video, top], from block `first` on.

    With `truth` every block lies behind the true ones; one before `first` only looks back, which takes one step.
    """
    texts, which = read_texts(model, prompts)
    state = player.start(model, seeds=seeds, videos=videos)
    looking = one_step(model)
    frames = []
    chosen = []
    for block, sentences in enumerate(which.T):
        committed = None if truth is None else true_block(model, truth, block)
        maker = model if block >= first else looking
        state, made = player.next_block(
            maker, state, text_of(texts, sentences), given=committed, left=which.shape[1] - block
        )
        if block >= first:
            frames.append(np.asarray(made.frames))
            chosen.append(np.asarray(pytrees.stack(made.selection).ids))
    return np.concatenate(frames, axis=1), np.stack(chosen)


def behind_truth(
    model: Pipeline, stories: Sequence[world.Story], *, seed: int, start: int, first: int = 0
) -> tuple[list[oracle.Reading], np.ndarray]:
    """Readings of the blocks drawn behind the stories' own frames, and what they chose; ids count from `start`."""
    prompts = [
        [captions.caption(story, block) for block in range(len(story.guests))] for story in stories
    ]
    frames, chosen = play(
        model,
        prompts,
        seeds=[seed] * len(stories),
        videos=range(start, start + len(stories)),
        truth=np.stack([world.render(story) for story in stories]),
        first=first,
    )
    return [oracle.read(video) for video in frames], chosen


def chunks(count: int, size: int) -> list[range]:
    """0..count-1 in runs of at most `size`."""
    require(count > 0, f"{count} videos say nothing; give 1 or more.")
    require(size > 0, f"batch={size} holds no video; give 1 or more.")
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def true_reading(story: world.Story) -> oracle.Reading:
    """What a perfect reading of the story's own video is."""
    frames = len(story.columns)
    block = np.arange(frames) // world.BLOCK
    guest = story.guests[block]
    scene = story.scenes[block]
    constant = {
        name: np.full(frames, getattr(story, name))
        for name in ("colour", "shape", "mark", "hue", "backdrop", "gain")
    }
    return oracle.Reading(
        **constant,
        column=story.columns,
        scene=scene,
        poster=story.posters[scene],
        guest=guest,
        guest_mark=np.where(guest < 0, -1, story.guest_marks[guest]),
        residual=np.zeros(frames),
    )


# Teacher-forced figures


def teacher_forced(
    model: Pipeline, *, clips: int = 48, sampling: Sampling = Sampling(batch=24)
) -> dict:
    """Each block of held-out clips sampled behind the true blocks before it, with the model's own sink and with none.

    Without a sink three packed blocks compete, so that a guest has to be found by what it looks like.
    """
    require_stage(model.experiment)
    seed = sampling.seed
    stories = [data.draw_clip(np.random.default_rng((seed, index))) for index in range(clips)]
    sections = {}
    for sink in dict.fromkeys((model.experiment.cache.sink, 0)):
        changed = with_cache(model, sink=sink)
        readings = []
        for part in sampling.chunks(clips):
            readings += behind_truth(
                changed, [stories[i] for i in part], seed=seed, start=part.start
            )[0]
        sections[f"sink of {sink} frames"] = teacher_figures(changed.experiment, readings, stories)
    return {"mode": "teacher", "videos": clips, "seed": seed, "sections": sections}


def teacher_figures(
    exp: Experiment, readings: Sequence[oracle.Reading], stories: Sequence[world.Story]
) -> dict[str, Row]:
    """Shares of frames that are right, by attribute, in every block but the first; intervals count clips."""
    truth = [true_reading(story) for story in stories]
    read = _by_block(readings)
    true = _by_block(truth)
    right = {name: read[name] == true[name] for name in true}
    guests, scenes = (
        np.stack([getattr(story, name) for story in stories]) for name in ("guests", "scenes")
    )
    later = np.broadcast_to(np.arange(guests.shape[1]) > 0, guests.shape)
    known = np.stack([data.appeared_before(story.scenes) for story in stories])
    chance = {name: 1 / metrics.CHOICES[name] for name in ("colour", "shape", "backdrop", "scene")}
    rows = {"valid frames": _row(0.0, read["residual"] < oracle.TAU, later)}
    rows |= {name: _row(level, right[name], later) for name, level in chance.items()}
    rows["guest there or not"] = _row(1 / 2, (read["guest"] >= 0) == (true["guest"] >= 0), later)
    rows["guest identity"] = _row(
        1 / metrics.CHOICES["guest"], right["guest"], later & (guests >= 0)
    )
    rows["position"] = _row(1 / world.LANES, right["column"], later)
    rows["subject's mark"] = _row(1 / world.MARKS, right["mark"], later)
    rows["poster, scene seen before"] = _row(
        1 / world.MARKS, right["poster"] & right["scene"], known
    )
    for name in ("hue", "gain"):
        rows[f"{name} RMS error"] = _rms(
            metrics.CHANCE[f"{name} drift"], (read[name] - true[name])[:, 1:]
        )
    return rows | _called_back(exp, guests, right["guest"] & right["guest_mark"])


def _called_back(
    exp: Experiment, guests: Int[np.ndarray, "clip block"], right: Bool[np.ndarray, "clip block t"]
):
    """Rows for the guest of the last block: where only packed blocks show it, and by the block of its last visit."""
    last = guests.shape[1] - 1
    chance = 1 / world.MARKS
    visits = (guests[:, :last] == guests[:, last:]) & (guests[:, last:] >= 0)
    sink = exp.cache.sink // exp.cache.block
    recent = exp.cache.recent // exp.cache.block
    full_size = [block < sink or block >= last - recent for block in range(last)]
    final = np.zeros_like(guests, dtype=bool)
    final[:, last] = visits.any(axis=1) & ~visits[:, full_size].any(axis=1)
    rows = {"called-back guest, packed only": _row(chance, right, final)}
    latest = np.where(visits.any(axis=1), last - 1 - visits[:, ::-1].argmax(axis=1), -1)
    for block in range(last):
        final[:, last] = latest == block
        where = "sink" if block < sink else "recent" if block >= last - recent else "packed"
        rows[f"called-back guest, block {block} ({where})"] = _row(chance, right, final)
    return {name: row for name, row in rows.items() if row["n"]}


def _by_block(readings: Sequence[oracle.Reading]) -> dict[str, np.ndarray]:
    """Every field of the readings as [clip, block, t]."""
    names = [field.name for field in dataclasses.fields(oracle.Reading)]
    return {
        name: np.stack([getattr(reading, name).reshape(-1, world.BLOCK) for reading in readings])
        for name in names
    }


def _row(
    chance: float, right: Bool[np.ndarray, "clip block t"], where: Bool[np.ndarray, "clip block"]
) -> Row:
    """The share of frames right `where` it applies, averaged over clips; blocks of one clip are not independent."""
    of_clip = [float(right[i][where[i]].mean()) for i in range(len(right)) if where[i].any()]
    return share(chance, sum(of_clip), len(of_clip))


def share(chance: float, right: float, n: int) -> Row:
    return {"chance": chance, "value": _plain(metrics.wilson(right, n)), "n": n}  # type: ignore[arg-type]


def mean_row(chance: float, values: Sequence[float] | np.ndarray) -> Row:
    """The mean of one value per video; those that are nan do not count."""
    known = [float(value) for value in values if not math.isnan(value)]
    return {"chance": chance, "value": _plain(metrics.bootstrap(known)), "n": len(known)}


def _rms(chance: float, error: Float[np.ndarray, "clip block t"]) -> Row:
    squares = metrics.bootstrap(np.square(error).mean(axis=(1, 2)).tolist())
    return {
        "chance": chance,
        "value": _plain([math.sqrt(square) for square in squares]),
        "n": len(error),
    }


def _plain(values: Sequence[float]) -> list[float | None]:
    return [None if math.isnan(value) else float(value) for value in values]


# Long videos


def rollout(
    model: Pipeline,
    *,
    videos: int = 64,
    blocks: int = 120,
    sampling: Sampling = Sampling(),
) -> dict:
    """`metrics.report` of free-running videos; video i is the one that `sample --seed SEED+i --blocks N` makes."""
    require_stage(model.experiment)
    seed = sampling.seed
    readings = []
    prompts = []
    for part in sampling.chunks(videos):
        timelines = [default_timeline(seed + i, blocks) for i in part]
        ids = [pipeline.video_id(each[0]) for each in timelines]
        frames, _ = play(model, timelines, seeds=[seed + i for i in part], videos=ids)
        readings += [oracle.read(video) for video in frames]
        prompts += [[captions.parse(sentence) for sentence in each] for each in timelines]
    return {"mode": "rollout", "seed": seed} | metrics.report(readings, prompts)


# The report


def table(result: dict) -> str:
    """A result as aligned text."""
    if result["mode"] == "rollout":
        return metrics.table(result)
    lines = [f"{result['videos']} videos; brackets hold 95 % intervals"]
    wide = 2 + max(len(name) for rows in result["sections"].values() for name in rows)
    for title, rows in result["sections"].items():
        lines += ["", f"{title:<{wide}}{'chance':>8}{'value':>24}{'n':>6}"]
        lines += [
            f"{name:<{wide}}{row['chance']:>8.3f}{_spell(row['value']):>24}{row['n']:>6}"
            for name, row in rows.items()
        ]
    return "\n".join(lines)


def _spell(interval: Sequence[float | None]) -> str:
    value, low, high = ("-" if number is None else f"{number:.3f}" for number in interval)
    return f"{value} [{low}, {high}]"
