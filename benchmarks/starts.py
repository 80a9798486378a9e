"""What the Stage model keeps of a picture or a clip that its video begins with, as the oracle reads it.

.venv/bin/python -m benchmarks.starts --stories 12 --blocks 12
"""

import argparse
import json

import numpy as np

from packforcing_jax import Pipeline
from packforcing_jax.stage import captions, data, oracle, world

NAMED = ("colour", "shape", "backdrop", "scene")
FIRST = 100  # seed of the first story; those of the training data are others


def figures(model: Pipeline, story: world.Story, blocks: int, seed: int) -> dict:
    """For a picture, a clip of two blocks and no start: shares of the frames behind it that show what it shows."""
    given = world.render(story)
    wanted = oracle.read(given)
    prompt = captions.caption(story, 0)
    starts = {"picture": given[0], "clip": given[: 2 * world.BLOCK], "no start": None}
    found = {}
    for name, start in starts.items():
        session = model.session(seed=seed, keep=0)
        if start is not None:
            session.start(start, prompt)
        frames = [block.frames for block in session.run(prompt, blocks=blocks)]
        read = oracle.read(np.concatenate(frames))
        shares = {
            each: float(np.mean(getattr(read, each) == getattr(wanted, each)[0]))
            for each in ("mark", *NAMED)
        }
        found[name] = shares | {
            "valid": float(np.mean(read.valid)),
            "hue, degrees away": float(np.mean(np.abs(read.hue - wanted.hue[0]))),
            "light, away": float(np.mean(np.abs(read.gain - wanted.gain[0]))),
        }
    return found


def main() -> None:
    """Prints the means over the stories; exits with 1 unless most frames behind a start show its mark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stories", type=int, default=12)
    parser.add_argument("--blocks", type=int, default=12)
    args = parser.parse_args()
    model = Pipeline.from_pretrained()
    rows = [
        figures(model, data.draw_clip(np.random.default_rng(FIRST + seed)), args.blocks, seed)
        for seed in range(args.stories)
    ]
    means = {
        start: {name: round(float(np.mean([row[start][name] for row in rows])), 3) for name in one}
        for start, one in rows[0].items()
    }
    print(json.dumps(means, indent=1))
    picture, clip, without = (means[start]["mark"] for start in ("picture", "clip", "no start"))
    if min(picture, clip) <= max(0.5, without):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
