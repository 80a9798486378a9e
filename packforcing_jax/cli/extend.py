"""`packforcing extend`: a video goes on from its saved state, under the same prompt or another one."""

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from packforcing_jax.cli import common, compiling, places, told
from packforcing_jax.cli.places import Place
from packforcing_jax.errors import InputError, require, shown
from packforcing_jax.sampling import timelines

if TYPE_CHECKING:
    from collections.abc import Iterator

    from packforcing_jax.io import video
    from packforcing_jax.sampling.finished import Finished
    from packforcing_jax.sampling.session import Session
    from packforcing_jax.sampling.state_folder import Notes, Saved

OUT = "out/extended.mp4"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `extend`."""
    parser.add_argument("state", metavar="DIR", help="what `sample --state` or `fork` left")
    parser.add_argument(
        "--prompt", metavar="TEXT", help="the prompt from here on (default: the last one goes on)"
    )
    parser.add_argument(
        "--timeline",
        metavar="FILE",
        help="prompts by block as `sample` takes them; blocks count from the beginning of the video",
    )
    parser.add_argument(
        "--change",
        metavar="HOW",
        help="what --prompt does to the memory: keep, recache, flush or cut (default: as the method says)",
    )
    told.add_length_arguments(parser)
    parser.add_argument(
        "--out",
        metavar="PATH",
        help="video file (default: the state's own video grows; without one, out/extended.mp4)",
    )
    parser.add_argument(
        "--every", type=int, metavar="N", default=8, help="blocks between two saves (default: 8)"
    )
    parser.add_argument(
        "--keep", type=int, metavar="N", default=2, help="newest states that DIR keeps (default: 2)"
    )
    told.add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Makes the blocks, adds them to the video, and leaves the state behind the last one."""
    from packforcing_jax.sampling import state_folder

    told.require_length(args)
    common.require_count("--every", args.every)
    common.require_count("--keep", args.keep)
    require(
        args.timeline is None or args.prompt is None,
        "--prompt and --timeline exclude each other; give one.",
    )
    require(
        args.change is None or args.prompt is not None,
        f"--change {args.change} is about the memory at a new --prompt; give one.",
    )
    story = timelines.read(args.timeline) if args.timeline else []
    at = state_folder.numbers(args.state)[-1]
    notes = state_folder.notes_in(args.state, at)
    owns = notes.folder == str(Path(args.state).resolve())
    out = args.out or (notes.video if owns else None) or OUT
    require(
        owns or notes.video is None or Path(out).resolve() != Path(notes.video),
        f"--out {out} belongs to the state that {args.state} was forked from; choose another file.",
    )
    require(
        Path(args.state).resolve() != Path(out).resolve().parent,
        f"--out {out} lies in {args.state}, which is for saves alone; choose another folder.",
    )
    with places.held([Place("--out", out, "video"), Place("STATE", args.state, "folder")]):
        return _extend(args, at, out, story)


def _extend(args: argparse.Namespace, at: int, out: str, story: list[timelines.Entry]) -> int:
    from packforcing_jax.io import video
    from packforcing_jax.sampling import state_folder, video_notes
    from packforcing_jax.sampling.requests import shown_size
    from packforcing_jax.sampling.session import Session
    from packforcing_jax.sampling.snapshots import Keep

    notes = state_folder.notes_in(args.state, at)
    require(
        not notes.batch,
        f"{args.state} holds a batch of videos, and extend makes one; go on from Python: Pipeline.restore.",
    )
    settings = state_folder.settings_in(args.state, at)
    pipeline = told.load(args, settings, notes.weights, f"state {args.state}")
    exp = pipeline.experiment
    saved, notes = state_folder.read(pipeline, args.state, at)
    session = Session.of_saved(pipeline, saved, notes, Keep(0))
    blocks, count = _asked(args, session, story)
    position = _begun(out, saved, notes)
    told.start_line("extend", pipeline)
    began = time.monotonic()
    size, scale = shown_size(exp)
    made = video_notes.header(
        pipeline,
        seed=session.seed,
        identity=notes.identity[0] if notes.identity else None,
        start=notes.start,
    )
    keeper = _Keeper(args, session, str(Path(out).resolve()))
    with contextlib.ExitStack() as files:
        writer = files.enter_context(
            video.Writer(
                out,
                fps=exp.fps,
                size=size,
                scale=scale,
                settings={"experiment": exp.name, "method": pipeline.method.name, "made": made},
                resume=position,
            )
        )
        files.enter_context(compiling.told(lambda: compiling.line("extend", "the block step")))
        for block in common.progress(blocks, name="extend", unit="blocks", total=count):
            writer.write(block.frames, video_notes.note(block, session.told[block.index]))
            if session.position % args.every == 0 or session.position == at + count:
                keeper.save(writer)
    result = {
        "out": out,
        "state": args.state,
        "blocks": at + count,
        "new_blocks": count,
        "seconds": round(time.monotonic() - began, 1),
    }
    line = (
        f"{out}: blocks {at} to {at + count - 1}, in {result['seconds']} s; state in {args.state}"
    )
    print(json.dumps(result) if args.json else line)
    return 0


class _Keeper:
    """Saves a session beside the video that it grows."""

    def __init__(self, args: argparse.Namespace, session: "Session", video_path: str):
        from packforcing_jax.sampling import state_folder

        self.args = args
        self.session = session
        self.path = video_path
        self.about = state_folder.about(session.pipeline, session.seed)

    def save(self, writer: "video.Writer") -> None:
        from packforcing_jax.sampling import state_folder

        saved, notes = self.session.saved()
        saved = dataclasses.replace(saved, written=writer.sync())
        folder = str(Path(self.args.state).resolve())
        notes = dataclasses.replace(notes, video=self.path, folder=folder)
        state_folder.write(self.args.state, saved, notes, about=self.about, keep=self.args.keep)


def _asked(
    args: argparse.Namespace, session: "Session", story: list[timelines.Entry]
) -> "tuple[Iterator[Finished], int]":
    """(the blocks to come, checked, and how many they are)."""
    count = session.count(args.seconds, args.blocks) or 0
    if story:
        return session.run(story, blocks=count), count
    require(
        session.position > 0 or args.prompt is not None,
        f"{args.state} holds no block yet, so there is no prompt to go on with; give --prompt.",
    )
    prompt = session.prompts[-1] if args.prompt is None else args.prompt
    changes = {session.position: args.change} if args.change else None
    return session.run(prompt, blocks=count, changes=changes), count


def _begun(out: str, saved: "Saved", notes: "Notes") -> "video.Position":
    """How far `out` has been written: the state's own video, or a copy of it up to the state."""
    from packforcing_jax.io import atomic, video

    before = saved.written
    if notes.video is None or before.bytes == 0:
        if saved.sampler.position:
            print(
                "extend: the state has no video of its own; only new blocks are written",
                file=sys.stderr,
            )
        return video.Position()
    if Path(out).resolve() == Path(notes.video):
        return before
    size = Path(notes.video).stat().st_size if Path(notes.video).is_file() else 0
    if size < before.bytes:
        raise InputError(
            f"the video {notes.video} of the state is gone or was cut to {shown(size)} bytes; put it back."
        )
    with atomic.file(out) as fresh:
        shutil.copyfile(notes.video, fresh)
        os.truncate(fresh, before.bytes)
    return before
