"""`packforcing sample`: a video from a prompt, a timeline, or nothing at all."""

import argparse
import contextlib
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
    parser.add_argument("--trace", metavar="FILE", help="also record what each layer looked back at, for `inspect`")
    parser.add_argument("--state", metavar="DIR",
                        help="keep the sampler's state here; the same command goes on from it, even after a kill")
    parser.add_argument("--every", type=int, metavar="N", default=8, help="blocks between two saves (default: 8)")
    parser.add_argument("--weights", metavar="DIR", help="model folder (default: the Stage model that ships)")
    parser.add_argument("--set", metavar="A.B=VALUE", action="append", default=[], dest="sets",
                        help="change one setting of the model's config, such as cache.top=8; may be repeated")


def run(args: argparse.Namespace) -> int:
    """Makes the video and prints where it is and, in the Stage world, what the oracle reads in it."""
    _check(args)
    from packforcing_jax import attention, trace, video
    from packforcing_jax.pipeline import Pipeline, blocks_of

    began = time.monotonic()
    video.check_writable(args.out)
    if args.trace is not None:
        trace.check_writable(args.trace)
    pipeline = Pipeline.from_pretrained(args.weights)
    if args.memory is not None:
        pipeline = pipeline.with_memory(args.memory)
    pipeline = pipeline.with_settings(args.sets)
    exp = pipeline.experiment
    blocks = args.blocks or (blocks_of(exp, args.seconds) if args.seconds is not None else
                             TIMES_CLIP * exp.clip // exp.cache.block)  # fmt: skip
    prompts = _prompts(args, blocks, stage=exp.name == "stage")
    pipeline.check(prompts)
    keeper, at = _kept(args, pipeline, prompts)
    backend, why = attention.chosen(exp.attention)
    common.start_line("sample", experiment=exp, dtype="float32", attention=backend, why=why)
    settings = {"experiment": exp.name, "seed": args.seed, "memory": args.memory, "blocks": blocks,
                "set": args.sets, "weights": args.weights, "prompts": _runs(prompts)}  # fmt: skip
    size = (exp.latent[1] * exp.codec.space_factor, exp.latent[0] * exp.codec.space_factor)
    frames = []
    with contextlib.ExitStack() as files:
        writer = files.enter_context(video.Writer(args.out, fps=exp.fps, size=size, settings=settings,
                                                  scale=max(1, SHOWN_HEIGHT // size[1]),
                                                  resume=at.written))  # fmt: skip
        tracer = files.enter_context(trace.Writer(args.trace, trace.header(exp, seed=args.seed, prompts=_runs(prompts)),
                                                  position=at.traced)) if args.trace else None  # fmt: skip
        stream = pipeline.stream(prompts, seed=args.seed, state=at.state)
        first = 0 if at.state is None else int(at.state.memory.num_blocks)
        for block in common.progress(stream, name="sample", unit="blocks", total=blocks - first):
            writer.write(block.frames)
            if tracer is not None:
                tracer.write(block)
            if keeper is not None:
                keeper.keep(block, writer, tracer)
            if args.sheet is not None or exp.name == "stage":
                frames.append(block.frames)
    if args.sheet is not None and frames:
        _sheet(frames, args.sheet)
    _report(args, prompts, first, frames, exp, time.monotonic() - began)
    return 0


def _kept(args: argparse.Namespace, pipeline, prompts: list[str]):
    """(what saves the run's state, where it goes on); (None, the start) without --state."""
    from packforcing_jax import keeping

    if args.state is None:
        return None, keeping.Resumed()
    keeper = keeping.Keeper(args.state, pipeline, prompts=prompts, every=args.every, seed=args.seed)
    at = keeper.resume()
    require(args.trace is None or at.state is None or at.traced > 0,
            f"--trace {args.trace}: the run kept in {args.state} was not traced from its start; leave --trace out.")
    if at.state is not None:
        print(f"sample: goes on behind block {int(at.state.memory.num_blocks)}, as kept in {args.state}",
              file=sys.stderr)  # fmt: skip
    return keeper, at


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
    require(args.every > 0, f"--every {args.every} must be at least 1.")
    place = lambda path: path and Path(path).resolve()  # noqa: E731
    for flag, file in (("--out", args.out), ("--sheet", args.sheet), ("--trace", args.trace)):
        require(None in (args.state, file) or place(args.state) != place(file).parent,
                f"{flag} {file} lies in --state {args.state}, which is for saves alone; choose another folder.")
    require(place(args.trace) != place(args.out),
            f"--trace {args.trace} is also the video (--out {args.out}); give them two names.")  # fmt: skip
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


def _report(args: argparse.Namespace, prompts: list[str], first: int, frames: list, exp, seconds: float) -> None:
    """What was made; in the Stage world with the oracle's reading beside chance, if all was drawn in this run."""
    made = {"out": str(Path(args.out)), "blocks": len(prompts), "frames": sum(map(len, frames)) or None,
            "seconds": round(seconds, 1)}  # fmt: skip
    if first:
        made |= {"resumed_at": first}
    if exp.name != "stage" or first:
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
