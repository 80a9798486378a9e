"""`packforcing sample`: a video from a prompt, a timeline, or nothing at all."""

import argparse
import json
import sys
import time
from pathlib import Path

from packforcing_jax import timelines
from packforcing_jax.cli import common
from packforcing_jax.config import require
from packforcing_jax.errors import InputError

TIMES_CLIP = 24  # length of the default video in training clips
SHOWN_HEIGHT = 384  # small videos are enlarged to about this many pixels
SHEET_HEIGHT = 96  # and the frames of a contact sheet to this many


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `sample`."""
    parser.add_argument("--prompt", metavar="TEXT", help="one prompt for the whole video")
    parser.add_argument("--timeline", metavar="FILE", help="prompts by block, lines `BLOCK: prompt`")
    parser.add_argument("--seconds", type=float, metavar="S", help="length; default 24 training clips")
    parser.add_argument("--blocks", type=int, metavar="N", help="length in blocks")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    parser.add_argument("--memory", metavar="PROFILE", help="another memory than the model's own, such as no-mid")
    parser.add_argument("--out", metavar="FILE", default="out/video.mp4", help="video file (default: out/video.mp4)")
    parser.add_argument("--sheet", metavar="FILE", help="also write a contact sheet, a PNG")
    parser.add_argument("--weights", metavar="DIR", help="model folder (default: the Stage model that ships)")
    parser.add_argument("--set", metavar="A.B=VALUE", action="append", default=[], dest="sets",
                        help="change one setting of the model's config, such as cache.top=8; may be repeated")


def run(args: argparse.Namespace) -> int:
    """Makes the video and prints where it is and, in the Stage world, what the oracle reads in it."""
    _check(args)
    from packforcing_jax import attention, video
    from packforcing_jax.pipeline import Pipeline

    began = time.monotonic()
    video.check_writable(args.out)
    pipeline = Pipeline.from_pretrained(args.weights)
    if args.memory is not None:
        pipeline = pipeline.with_memory(args.memory)
    pipeline = pipeline.with_settings(args.sets)
    exp = pipeline.experiment
    blocks = args.blocks or (pipeline.blocks_of(args.seconds) if args.seconds is not None else
                             TIMES_CLIP * exp.clip // exp.cache.block)  # fmt: skip
    prompts = _prompts(args, blocks, stage=exp.name == "stage")
    stream = pipeline.stream(prompts, seed=args.seed)  # checks every prompt
    backend, why = attention.chosen(exp.attention)
    common.start_line("sample", experiment=exp, dtype="float32", attention=backend, why=why)
    settings = {"experiment": exp.name, "seed": args.seed, "memory": args.memory, "blocks": blocks,
                "set": args.sets, "weights": args.weights, "prompts": _runs(prompts)}  # fmt: skip
    size = (exp.latent[1] * exp.codec.space_factor, exp.latent[0] * exp.codec.space_factor)
    scale = max(1, SHOWN_HEIGHT // size[1])
    frames = []
    keep = args.sheet is not None or exp.name == "stage"
    with video.Writer(args.out, fps=exp.fps, size=size, settings=settings, scale=scale) as writer:
        for block in common.progress(stream, name="sample", unit="blocks", total=blocks):
            writer.write(block.frames)
            if keep:
                frames.append(block.frames)
    if args.sheet is not None:
        _sheet(frames, args.sheet)
    _report(args, prompts, frames, exp, time.monotonic() - began)
    return 0


def _sheet(frames: list, path: str) -> None:
    """One picture of about 40 frames spread over the video, each enlarged to about SHEET_HEIGHT pixels."""
    import numpy as np

    from packforcing_jax import video

    whole = np.concatenate(frames)
    scale = max(1, SHEET_HEIGHT // whole.shape[1])
    shown = whole[:: max(1, len(whole) // 40)].repeat(scale, axis=1).repeat(scale, axis=2)
    video.contact_sheet(shown, path)


def _check(args: argparse.Namespace) -> None:
    """Refuses what can be refused before anything is loaded."""
    require(args.prompt is None or args.timeline is None, "--prompt and --timeline exclude each other; give one.")
    require(args.seconds is None or args.blocks is None, "--seconds and --blocks exclude each other; give one.")
    require(args.blocks is None or args.blocks > 0, f"--blocks {args.blocks} is not a length; give 1 or more.")
    require(args.seconds is None or 0 < args.seconds < float("inf"),
            f"--seconds {args.seconds} is not a length; give a number above 0.")  # fmt: skip
    require(0 <= args.seed < 2**32, f"--seed {args.seed} is out of range; give 0 to {2**32 - 1}.")
    if args.prompt is not None and not args.prompt.strip():
        raise InputError("--prompt is empty; say what the video should show.")


def _prompts(args: argparse.Namespace, blocks: int, *, stage: bool) -> list[str]:
    """One prompt per block."""
    if args.timeline is not None:
        return timelines.spread(timelines.read(args.timeline), blocks)
    if args.prompt is not None:
        return [args.prompt] * blocks
    require(stage, "this model has no default story; give --prompt or --timeline.")
    from packforcing_jax.stage import stories

    return stories.default_timeline(args.seed, blocks)


def _runs(prompts: list[str]) -> list[tuple[int, str]]:
    """The timeline again: (first block, prompt) wherever the prompt changes."""
    return [(i, prompt) for i, prompt in enumerate(prompts) if i == 0 or prompt != prompts[i - 1]]


def _report(args: argparse.Namespace, prompts: list[str], frames: list, exp, seconds: float) -> None:
    """What was made; in the Stage world with the oracle's reading beside chance."""
    made = {"out": str(Path(args.out)), "blocks": len(prompts), "frames": sum(map(len, frames)) or None,
            "seconds": round(seconds, 1)}  # fmt: skip
    if exp.name != "stage":
        print(json.dumps(made) if args.json else f"{made['out']}: {made['blocks']} blocks in {made['seconds']} s")
        return
    import numpy as np

    from packforcing_jax.stage import captions, metrics, oracle

    read = metrics.report([oracle.read(np.concatenate(frames))], [[captions.parse(prompt) for prompt in prompts]])
    if args.json:
        print(json.dumps(made | {"oracle": read}))
        return
    print(f"{made['out']}: {made['frames']} frames, {made['frames'] / exp.clip:.0f} times the training clip, "
          f"in {made['seconds']} s")  # fmt: skip
    print(f"what the oracle reads in it:\n{metrics.table(read)}", file=sys.stdout)
