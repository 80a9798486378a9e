"""Ablations that need no training: one part of the memory changed at read, on the Stage models that ship.

    python -m benchmarks.ablations                                  # every arm of every model that is not finished
    python -m benchmarks.ablations --models stage_student --videos 256 --arms "as trained" "random" --shard 1/2

An arm is drawn as `packforcing evaluate --mode rollout --videos N --blocks 120 --weights MODEL --set ...` draws it: the
same stories and noise in all arms. Each writes `docs/evidence/ablations/MODEL/ARM.json`; what is there with as many
videos or more is kept, so the command can be stopped and given again, and single arms with more videos. `make evidence`
makes the page of them.
"""

import argparse
import json
import sys
from pathlib import Path

from packforcing_jax.errors import require
from packforcing_jax.evaluation import stage_figures
from packforcing_jax.evaluation.stage_figures import Sampling
from packforcing_jax.io import atomic, identity
from packforcing_jax.sampling.pipeline import Pipeline

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "evidence" / "ablations"
WEIGHTS = ROOT / "packforcing_jax" / "weights"
MODELS = ("stage_student", "stage_recipe", "stage")
BLOCKS = 120
NO_PACKED = ("cache.top=0", "cache.capacity=0")
AS_TRAINED = "as trained"
ARMS: dict[str, tuple[str, ...]] = {  # settings at read
    AS_TRAINED: (),
    "sink 0": ("cache.sink=0",),
    "sink 4": ("cache.sink=4",),
    "sink 16": ("cache.sink=16",),
    "top 1": ("cache.top=1",),
    "top 4": ("cache.top=4",),
    "all attended": ("cache.selection=all",),
    "all attended, span fitted": ("cache.selection=all", "cache.span=fit", "cache.max_position=80"),
    "FIFO": ("cache.selection=recency",),
    "random": ("cache.selection=random",),
    "paper's score": ("cache.selection=paper",),
    "RoPE adjustment off": ("cache.rope_adjustment=none",),
    "RoPE adjustment of the sink alone": ("cache.rope_adjustment=sink_only",),
    "span fitted to 20 frames": ("cache.span=fit",),
    "high-resolution branch alone": ("compressor.branches=hr",),
    "low-resolution branch alone": ("compressor.branches=lr",),
    "no packed memory": NO_PACKED,
    "no packed memory, sink 2": (*NO_PACKED, "cache.sink=2"),
    "no packed memory, sink 0": (*NO_PACKED, "cache.sink=0"),
}


def path_of(model: str, arm: str) -> Path:
    """Where the result of an arm lies."""
    plain = "".join(letter if letter.isalnum() else "_" for letter in arm)
    return RESULTS / model / f"{plain}.json"


def wanted(model: str, arm: str, videos: int) -> dict:
    """What a stored result says of how it was made."""
    return {
        "arm": arm,
        "settings": list(ARMS[arm]),
        "weights": identity.of_folder(WEIGHTS / model),
        "videos": videos,
        "blocks": BLOCKS,
        "seed": stage_figures.HELD_OUT,
    }


def finished(model: str, arm: str, videos: int) -> bool:
    """Whether the stored result is that of this arm, with so many videos or more."""
    try:
        stored = json.loads(path_of(model, arm).read_text())
    except FileNotFoundError:
        return False
    count = stored["request"]["videos"]
    return count >= videos and stored["request"] == wanted(model, arm, count)


def draw(model: str, arm: str, videos: int, batch: int) -> None:
    """Draws and reads the videos of an arm, and stores what the oracle says."""
    pipeline = Pipeline.from_pretrained(WEIGHTS / model, overrides=ARMS[arm])
    report = stage_figures.rollout(
        pipeline, videos=videos, blocks=BLOCKS, sampling=Sampling(batch=batch)
    )
    path = path_of(model, arm)
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = {"request": wanted(model, arm, videos), "report": report}
    atomic.write(path, (json.dumps(stored, indent=1) + "\n").encode())


def main() -> None:
    """Draws what is asked for and not finished."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=[*MODELS], choices=MODELS)
    parser.add_argument("--arms", nargs="+", default=[*ARMS], choices=ARMS)
    parser.add_argument("--videos", type=int, default=64, help="of an arm, at least (64)")
    parser.add_argument("--shard", default="1/1", metavar="K/N", help="only part K of N")
    parser.add_argument("--batch", type=int, default=64, help="videos drawn together")
    args = parser.parse_args()
    number, _, count = args.shard.partition("/")
    require(0 < int(number) <= int(count), f"--shard {args.shard} is none; write it as 1/2.")
    todo = [(model, arm) for model in args.models for arm in args.arms]
    for model, arm in todo[int(number) - 1 :: int(count)]:
        if not finished(model, arm, args.videos):
            print(f"ablations: {model}, {arm}, {args.videos}", file=sys.stderr, flush=True)
            draw(model, arm, args.videos, args.batch)


if __name__ == "__main__":
    main()
