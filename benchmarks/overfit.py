"""Every objective learns eight clips by heart: by its loss, or by its own aim where that need not fall.

`ends`: how far estimates at the student's steps are from where the teacher's trajectories end. `distance`: how far
videos are from the clips, as the oracle reads both.

    python -m benchmarks.overfit --out runs/overfit        # two CPU cores: minutes; exit 1 if a bound breaks
"""

import argparse
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax import Array

from packforcing_jax.cli import main as program
from packforcing_jax.config import Stage, loading
from packforcing_jax.evaluation import stage_figures
from packforcing_jax.networks import mesh
from packforcing_jax.sampling.pipeline import Pipeline
from packforcing_jax.stage import captions, data, oracle, world
from packforcing_jax.training import batches, exports, logs, objectives, paths, runs, state
from packforcing_jax.training.batches import Flat

CONFIG = "stage_overfit"
CLIPS = 8
SEED = 0
DRAWN = 4  # videos of each clip that the oracle reads
READ = ("column", "colour", "shape", "mark", "backdrop", "scene", "poster", "guest", "guest_mark")
LOGGED = 4  # losses that are averaged, first and last
LOSS = {
    "start": 0.25,
    "teacher": 0.3,
    "causal": 0.5,
    "forced": 0.6,
    "diffused": 0.6,
    "trajectory": 0.5,
}
ENDS = {"consistency": 0.75}
DISTANCE = {"dmd": 0.9, "sid": 0.9}


class Row(NamedTuple):
    """What a stage reached, in parts of what it began with, and what it has to."""

    stage: str
    measure: str
    before: float
    after: float
    bound: float
    seconds: float

    @property
    def ok(self) -> bool:
        return self.after <= self.bound * self.before


def clips() -> list[world.Story]:
    """The clips that are learnt: the first of the data."""
    return [data.draw_clip(np.random.default_rng((SEED, index))) for index in range(CLIPS)]


@functools.cache  # two stages begin with one model
def distance(folder: Path) -> float:
    """The share of the oracle's readings in which videos to the clips' prompts differ from the clips."""
    model = Pipeline.from_pretrained(folder)
    stories = DRAWN * clips()
    prompts = [
        [captions.caption(story, block) for block in range(len(story.guests))] for story in stories
    ]
    frames, _ = stage_figures.play(
        model, prompts, seeds=[SEED] * len(stories), videos=range(len(stories))
    )
    pairs = zip(map(oracle.read, frames), map(stage_figures.true_reading, stories), strict=True)
    return float(
        np.mean(
            [[getattr(read, name) != getattr(true, name) for name in READ] for read, true in pairs]
        )
    )


def from_ends(stage: Stage, folders: Sequence[Path]) -> list[float]:
    """How far each model's estimates at the student's steps are, squared, from where its teacher's trajectories end."""
    train = stage.train
    grid = mesh.make(stage.train.mesh)
    exp = state.variant(stage.experiment, train, SEED, 0)
    form = runs.abstract(exp, train, runs.Program(), SEED, grid)
    taught = runs.others(exp, train, grid)["teacher"]
    raw_batch = next(runs.data(exp, train, SEED, runs.Program()))

    @jax.jit
    def missed(student: Flat, teacher: Flat, raw: Mapping[str, Array], key: Array) -> Array:
        model = batches.as_model(exp, student)
        batch = batches.encode(exp, batches.as_codec(exp, {}), raw)
        states = batches.text_states(model, batch.text)
        noise = jax.random.normal(key, batch.latent.shape)
        trajectory = paths.trajectory(
            batches.as_model(exp, teacher), exp, train, noise, states, behind=batch
        )
        batch = dataclasses.replace(batch, trajectory=trajectory)
        return objectives.trajectory(batches.Networks(generator=model), batch, key, exp, train)[0]

    students = [exports.network(str(folder), form.params["generator"], grid) for folder in folders]
    return [float(missed(student, taught, raw_batch, jax.random.key(SEED))) for student in students]


def losses(folder: Path) -> tuple[float, float]:
    """The first and the last few losses of a run, averaged."""
    logged = [json.loads(line)["loss"] for line in (folder / logs.LINES).read_text().splitlines()]
    return float(np.mean(logged[:LOGGED])), float(np.mean(logged[-LOGGED:]))


def trajectories(out: Path) -> Path:
    """A data set of the teacher's trajectories to the clips' first prompts."""
    prompts = out / "prompts.txt"
    made = out / "ways"
    prompts.write_text("\n".join(captions.caption(story, 0) for story in clips()))
    run(
        "prepare",
        prompts,
        "--kind",
        "trajectories",
        "--weights",
        out / "teacher" / runs.MODEL,
        "--config",
        CONFIG,
        "--out",
        made,
    )
    return made


def run(*argv: object) -> None:
    """One command of the program; exits if it fails."""
    code = program.main([str(word) for word in argv])
    if code:
        sys.exit(code)


def rows(out: Path) -> Iterator[Row]:
    """Trains stage after stage and measures each."""
    recipe = loading.load_recipe(CONFIG)
    for stage in (each.name for each in recipe):
        began = time.monotonic()
        overrides = (
            ["--set", f"trajectory:train.source.path={trajectories(out)}"]
            if stage == "trajectory"
            else []
        )
        run("train", "--config", CONFIG, "--stage", stage, "--out", out, "--seed", SEED, *overrides)
        seconds = time.monotonic() - began
        if not (out / stage / runs.MODEL).is_dir():
            sys.exit(f"{stage} was stopped; the same command goes on from there.")
        [(folder, planned)] = runs.planned(recipe, out, stage)
        models = (Path(planned.train.generator_from), folder / runs.MODEL)
        if stage in LOSS:
            yield Row(stage, "loss", *losses(folder), LOSS[stage], seconds)
        elif stage in ENDS:
            yield Row(stage, "ends", *from_ends(planned, models), ENDS[stage], seconds)
        else:
            yield Row(stage, "distance", *map(distance, models), DISTANCE[stage], seconds)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Overfits every objective on eight clips.")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/overfit"), metavar="DIR", help="where the runs go"
    )
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    failed = 0
    for row in rows(args.out):
        failed += not row.ok
        print(
            f"{row.stage:<12} {row.measure:<9} {row.before:.4f} -> {row.after:.4f}, at most "
            f"{row.bound * row.before:.4f}  {row.seconds:4.0f} s  {'ok' if row.ok else 'FAIL'}",
            flush=True,
        )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
