"""Every objective learns eight clips by heart: what each should reach, and how far its videos are from those clips.

    python -m benchmarks.overfit --out runs/overfit        # two CPU cores: minutes; exit 1 if a bound breaks
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from packforcing_jax import evaluation, options
from packforcing_jax.cli import main as program
from packforcing_jax.pipeline import Pipeline
from packforcing_jax.stage import captions, data, oracle, world
from packforcing_jax.training import logs, runs

CONFIG, CLIPS, SEED = "stage_overfit", 8, 0
READ = ("column", "colour", "shape", "mark", "backdrop", "scene", "poster", "guest", "guest_mark")
LOGGED = 4  # losses that are averaged, first and last
LOSS = {"start": 0.25, "teacher": 0.3, "causal": 0.5, "forced": 0.6, "diffused": 0.6, "trajectory": 0.5}
DISTANCE = {"consistency": 0.9, "dmd": 0.9, "sid": 0.9}  # few steps from a causal model that was stopped early


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


def distance(folder: Path) -> float:
    """The share of the oracle's readings in which videos to the clips' prompts differ from the clips."""
    model, told = Pipeline.from_pretrained(folder), clips()
    prompts = [[captions.caption(story, block) for block in range(len(story.guests))] for story in told]
    frames, _ = evaluation.play(model, prompts, seeds=[SEED] * CLIPS, videos=range(CLIPS))
    wrong = [np.mean([getattr(oracle.read(video), name) != getattr(evaluation.true_reading(story), name)
                      for name in READ]) for video, story in zip(frames, told, strict=True)]  # fmt: skip
    return float(np.mean(wrong))


def losses(folder: Path) -> tuple[float, float]:
    """The first and the last few losses of a run, averaged."""
    found = [json.loads(line)["loss"] for line in (folder / logs.LINES).read_text().splitlines()]
    return float(np.mean(found[:LOGGED])), float(np.mean(found[-LOGGED:]))


def ways(out: Path) -> Path:
    """A data set of the teacher's ways to the clips' first prompts."""
    prompts, made = out / "prompts.txt", out / "ways"
    prompts.write_text("\n".join(captions.caption(story, 0) for story in clips()))
    run("prepare", prompts, "--kind", "trajectories", "--weights", out / "teacher" / runs.MODEL, "--config", CONFIG,
        "--out", made)  # fmt: skip
    return made


def run(*words: object) -> None:
    """One command of the program; exits if it fails."""
    code = program.main([str(word) for word in words])
    if code:
        sys.exit(code)


def rows(out: Path, every: bool) -> Iterator[Row]:
    """Trains stage after stage and measures each; those that are measured by losses alone, unless `every` is asked."""
    for stage, exp in options.load_recipe(CONFIG):
        if stage in DISTANCE and not every:
            continue
        began = time.monotonic()
        sets = ["--set", f"trajectory:train.source.path={ways(out)}"] if stage == "trajectory" else []
        run("train", "--config", CONFIG, "--stage", stage, "--out", out, "--seed", SEED, *sets)
        seconds = time.monotonic() - began
        if not (out / stage / runs.MODEL).is_dir():
            sys.exit(f"{stage} was stopped; the same command goes on from there.")
        if stage in LOSS:
            yield Row(stage, "loss", *losses(out / stage), LOSS[stage], seconds)
        else:
            before, after = (distance(out / each / runs.MODEL) for each in (exp.train.generator_from, stage))
            yield Row(stage, "distance", before, after, DISTANCE[stage], seconds)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Overfits every objective on eight clips.")
    parser.add_argument("--out", type=Path, default=Path("runs/overfit"), metavar="DIR", help="where the runs go")
    parser.add_argument("--every", action="store_true", help="also stages that are measured by their videos")
    asked = parser.parse_args(words)
    asked.out.mkdir(parents=True, exist_ok=True)
    failed = 0
    for row in rows(asked.out, asked.every):
        failed += not row.ok
        print(f"{row.stage:<12} {row.measure:<9} {row.before:.4f} -> {row.after:.4f}, at most "
              f"{row.bound * row.before:.4f}  {row.seconds:4.0f} s  {'ok' if row.ok else 'FAIL'}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
