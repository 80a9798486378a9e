"""Every objective learns eight clips by heart: what each should reach, and how far its videos are from those clips.

    python -m benchmarks.overfit --out runs/overfit        # two CPU cores: minutes; exit 1 if a bound breaks
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from packforcing_jax import evaluation
from packforcing_jax.pipeline import Pipeline
from packforcing_jax.stage import captions, data, oracle, world
from packforcing_jax.training import logs, runs

READ = ("column", "colour", "shape", "mark", "backdrop", "scene", "poster", "guest", "guest_mark")
LAST = 4  # logged losses that are averaged at the end
LOSS = {"start": 0.6, "teacher": 0.3, "causal": 0.3, "forced": 0.3, "diffused": 0.3, "trajectory": 0.3,
        "consistency": 0.3}  # fmt: skip
DISTANCE = {"dmd": 0.6, "sid": 0.6}  # of the videos from the clips, in parts of what it was at the start


def distance(folder: Path, *, clips: int, seed: int) -> float:
    """The share of the oracle's readings in which videos to the prompts of the clips differ from the clips."""
    model = Pipeline.from_pretrained(folder)
    draw = np.random.default_rng
    told = [data.draw_clip(draw((seed, index))) for index in range(clips)]
    prompts = [[captions.caption(story, block) for block in range(len(story.guests))] for story in told]
    frames, _ = evaluation.play(model, prompts, seeds=[seed] * clips, videos=range(clips))
    wrong = [np.mean([getattr(oracle.read(video), name) != getattr(evaluation.true_reading(story), name)
                      for name in READ]) for video, story in zip(frames, told, strict=True)]  # fmt: skip
    return float(np.mean(wrong))
