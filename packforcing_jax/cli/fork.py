"""`packforcing fork`: a second state of the same video, to be told on differently."""

import argparse
import json
import sys

from packforcing_jax.cli import common, compiling, places, told
from packforcing_jax.cli.places import Place
from packforcing_jax.errors import require, shown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `fork`."""
    parser.add_argument("state", metavar="DIR", help="what `sample --state` or `extend` left")
    parser.add_argument(
        "--at", type=int, metavar="BLOCK", help="the block to be made next (default: the newest)"
    )
    parser.add_argument("--out", metavar="DIR", required=True, help="the folder of the new state")
    told.add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Copies the state behind the blocks before --at, or makes those blocks again where it is not kept."""
    from packforcing_jax.sampling import state_folder

    common.require_model_folder(args.weights)
    held = state_folder.numbers(args.state)
    at = held[-1] if args.at is None else args.at
    require(
        0 <= at <= held[-1],
        f"--at {shown(at)} is no block of {args.state}, which has {held[-1]}; give 0 to {held[-1]}.",
    )
    with places.held([Place("--out", args.out, "folder"), Place("STATE", args.state, "folder")]):
        state_folder.require_empty(args.out, "--out")
        if at in held:
            state_folder.copy(args.state, args.out, at)
        else:
            _make_again(args, held[-1], at)
    how = "copied" if at in held else "made again from its seed"
    result = {"out": args.out, "block": at, "kept": at in held}
    line = f"{args.out}: the state behind {at} blocks of {args.state}, {how}"
    print(json.dumps(result) if args.json else line)
    return 0


def _make_again(args: argparse.Namespace, newest: int, at: int) -> None:
    """The blocks before `at` once more, as the notes of the newest state tell them."""
    from packforcing_jax.sampling import state_folder
    from packforcing_jax.sampling.session import Session
    from packforcing_jax.sampling.snapshots import Keep

    notes = state_folder.notes_in(args.state, newest)
    require(
        notes.start is None or at == 0,
        f"{args.state} does not keep the state behind {at} blocks, and its video began with a picture or a clip, "
        f"which the state does not hold; fork at one of {shown(state_folder.numbers(args.state))}.",
    )
    settings = state_folder.settings_in(args.state, newest)
    pipeline = told.load(args, settings, notes.weights, f"state {args.state}")
    saved, notes = state_folder.read(pipeline, args.state, newest)
    whole = Session.of_saved(pipeline, saved, notes)
    session, story = whole.fork(0), whole.told[:at]
    session.keep = Keep(0)
    del saved, whole
    print(
        f"fork: {args.state} keeps no state behind {at} blocks; they are made again",
        file=sys.stderr,
    )
    told.start_line("fork", pipeline)
    with compiling.told(lambda: compiling.line("fork", "the block step")):
        blocks = session.retell(story)
        for _ in common.progress(blocks, name="fork", unit="blocks", total=at):
            pass
    session.save(args.out)
