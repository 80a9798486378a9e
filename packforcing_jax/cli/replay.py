"""`packforcing replay`: makes a video again from what stands inside its file, and says whether it is the same."""

import argparse
import contextlib
import json
import time
from pathlib import Path

from packforcing_jax.cli import common, compiling, places, told
from packforcing_jax.cli.places import Place
from packforcing_jax.errors import require


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `replay`."""
    parser.add_argument("video", metavar="FILE", help="a video that `sample` or `extend` wrote")
    parser.add_argument("--out", metavar="PATH", help="also write the new video")
    parser.add_argument(
        "--start", metavar="FILE", help="the picture or clip it began with, if it did"
    )
    told.add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Makes the video again; 0 if all latents agree bit for bit, else 1."""
    from packforcing_jax.sampling import video_notes

    record = video_notes.read(args.video)
    require(
        args.out is None or Path(args.out).resolve() != Path(args.video).resolve(),
        f"--out {args.out} is the video that is compared; choose another file.",
    )
    with places.held([Place("--out", args.out, "video")]):
        return _again(args, record)


def _again(args: argparse.Namespace, record) -> int:
    from packforcing_jax.io import video
    from packforcing_jax.sampling import opening, video_notes
    from packforcing_jax.sampling.requests import shown_size

    header = record.header
    pipeline = told.load(args, header["settings"], header["weights_folder"], args.video)
    exp = pipeline.experiment
    video_notes.require_weights(record, pipeline)
    video_notes.require_start(record, args.start is not None)
    given = None if args.start is None else opening.read(args.start, exp)
    told.start_line("replay", pipeline)
    began = time.monotonic()
    made: list[str] = []
    with contextlib.ExitStack() as files:
        size, scale = shown_size(exp)
        writer = args.out and files.enter_context(
            video.Writer(
                args.out, fps=exp.fps, size=size, scale=scale, settings=video.settings(args.video)
            )
        )
        files.enter_context(compiling.told(lambda: compiling.line("replay", "the block step")))
        blocks = video_notes.again(record, pipeline, given)
        total = len(record.told)
        for block in common.progress(blocks, name="replay", unit="blocks", total=total):
            if block.index == total:  # a clip that was cut off
                break
            made.append(block.latent_hash)
            if writer:
                writer.write(block.frames, video_notes.note(block, record.told[block.index]))
    return _report(args, record, made, time.monotonic() - began)


def _report(args: argparse.Namespace, record, made: list[str], seconds: float) -> int:
    """Says whether the latents agree."""
    from packforcing_jax.sampling import video_notes

    first = video_notes.first_difference(record, made)
    here, there = video_notes.made_with(), record.header["made_with"]
    other = [
        f"{name} {there[name]}, here {here[name]}" for name in here if there.get(name) != here[name]
    ]
    result = {
        "video": str(args.video),
        "blocks": len(made),
        "agree": first is None,
        "first_difference": first,
        "made_with": there,
        "seconds": round(seconds, 1),
    }
    why = f" (it was made with {'; '.join(other)})" if other else ""
    line = (
        f"{args.video}: all {len(made)} latents agree bit for bit"
        if first is None
        else f"{args.video}: latents differ from block {first} of {len(made)} on{why}"
    )
    print(json.dumps(result) if args.json else line)
    return 0 if first is None else 1
