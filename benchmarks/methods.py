"""The Stage model under every method: the same story and noise, a contact sheet side by side, time and bytes a block.

    python -m benchmarks.methods --out out/methods                       # 480 frames each: minutes on two CPU cores
    python -m benchmarks.methods --out out/methods --methods packforcing,longlive
    python -m benchmarks.methods --out out/methods --markdown            # the table of docs/methods.md

Every method draws in a process of its own, so that what it compiles is its own. Finished methods are kept in DIR and
not drawn again while settings and weights are the same; delete DIR to begin anew. DIR gets `methods.json`,
`methods.png` and of each method the video and its row of the sheet. A method of one clip makes one clip.

Exit code 1 if a method fails, a program is compiled more than twice (the first block, or a restart, may have one of
its own), or anything is compiled in the second half of a video.
"""

import argparse
import collections
import hashlib
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from packforcing_jax.cli import common
from packforcing_jax.config import Experiment
from packforcing_jax.errors import InputError, MachineError, nearest, require
from packforcing_jax.io import atomic, model_folder, video
from packforcing_jax.methods import METHODS, calls
from packforcing_jax.methods.method import Method, lengthened, require_blocks
from packforcing_jax.sampling.pipeline import SHIPPED, Finished, Pipeline, with_overrides

ROOT = Path(__file__).parent.parent
RED = "a red disc walks slowly before the moss curtain"
BLUE = "a blue square walks slowly before the moss curtain"
STORY = (  # from which share of the video on; a scene and a guest return, then the subject itself is another
    (0, f"in scene one {RED}"),
    (1 / 8, f"in scene one {RED} with guest plum"),
    (3 / 16, f"in scene one {RED}"),
    (1 / 4, f"in scene two {RED}"),
    (1 / 2, f"in scene one {RED}"),
    (5 / 8, f"in scene one {RED} with guest plum"),
    (11 / 16, f"in scene one {RED}"),
    (3 / 4, f"in scene two {BLUE}"),
)
OPENING = 2  # blocks whose time is mostly compilation
VERSIONS = 2  # of a program at most
COLUMNS = 12  # frames of a row of the sheet, at equal times
SCALE = 3  # pixels of the sheet for one of a frame
VIDEO_SCALE = 12
LEFT, TOP, GAP = 150, 24, 3
PAPER, INK, FAINT = (255, 255, 255), (30, 30, 30), (120, 120, 120)

Row = dict[str, Any]


def story(blocks: int) -> list[str]:
    """One prompt per block."""
    return [
        [prompt for share, prompt in STORY if int(share * blocks) <= block][-1]
        for block in range(blocks)
    ]


def times(frames: int) -> list[int]:
    """The frames that the sheet shows of a video of so many."""
    return np.linspace(0, frames - 1, COLUMNS).round().astype(int).tolist()


class Plan(NamedTuple):
    """What a method is to draw."""

    method: Method
    experiment: Experiment
    prompts: list[str]  # one per block; fewer of a method of one clip
    frames: int  # that were asked for
    seed: int

    @property
    def key(self) -> str:
        """What a finished video has to share with this to be kept."""
        settings = model_folder.experiment_to_json(self.experiment)
        told = [repr(self.method), settings, self.prompts, self.frames, self.seed, weights()]
        return hashlib.sha256(json.dumps([*told, *COLUMN]).encode()).hexdigest()


def plan(name: str, frames: int, seed: int) -> Plan:
    """The Stage model under a method, at the sizes that the method has there."""
    method = METHODS[name]
    exp = with_overrides(model_folder.opened(SHIPPED).experiment, None, (), method)
    prompts = story(-(-frames // exp.cache.block))
    exp = lengthened(method, exp, len(prompts))
    if method.one_clip:
        prompts = prompts[: exp.cache.full_frames // exp.cache.block]
    return Plan(method, exp, prompts, frames, seed)


def weights() -> str:
    """A hash of the model that ships."""
    files = sorted(path for path in SHIPPED.iterdir() if path.is_file())
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


# What a child does


class Compiled(logging.Handler):
    """Which programs JAX says it compiled, and while which block was made."""

    def __init__(self):
        super().__init__()
        self.block = 0
        self.found: list[tuple[str, int]] = []
        jax.config.update("jax_log_compiles", True)
        logging.getLogger("jax").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        begin, _, rest = record.getMessage().partition("jit(")
        if begin == "Finished XLA compilation of ":
            self.found.append((rest.partition(")")[0], self.block))

    def programs(self) -> dict[str, list[int]]:
        """The blocks in which each program of the package was compiled; readers of files do not count."""
        known = ours()
        blocks = collections.defaultdict(list)
        for name, block in self.found:
            if name in known:
                blocks[name].append(block)
        return dict(blocks)


def ours() -> set[str]:
    """Names of the compiled functions of the package, but for those that read weights and text."""
    modules = [
        module
        for name, module in sys.modules.items()
        if name.startswith("packforcing_jax.") and not name.startswith("packforcing_jax.io.")
    ]
    values = [value for module in modules for value in vars(module).values()]
    return {value.__name__ for value in values if hasattr(value, "_cache_size")}


class Spent(NamedTuple):
    """Seconds that a block took."""

    wall: float
    processor: float


def timed(stream: Iterator[Finished]) -> Iterator[tuple[Finished, Spent]]:
    """Each block with the seconds that it took."""
    while True:
        began, busy = time.perf_counter(), time.process_time()
        block = next(stream, None)
        if block is None:
            return
        yield block, Spent(time.perf_counter() - began, time.process_time() - busy)


def draw(name: str, frames: int, seed: int, folder: Path) -> Row:
    """Draws the video of a method and its row of the sheet; what was measured."""
    compiled = Compiled()
    wanted = plan(name, frames, seed)
    exp = wanted.experiment
    shown = times(frames)
    spent: list[Spent] = []
    held, count = 0, 0
    chosen: list[np.ndarray] = []
    height, width = (side * exp.codec.space_factor for side in exp.latent)
    size = (width, height)
    path = folder / f"{name}.mp4"
    path.unlink(missing_ok=True)
    settings = {"experiment": exp.name, "method": name, "seed": seed, "prompts": wanted.prompts}
    with video.Writer(path, fps=exp.fps, size=size, settings=settings, scale=VIDEO_SCALE) as writer:
        stream = timed(Pipeline.from_pretrained(method=name).stream(wanted.prompts, seed=seed))
        blocks = len(wanted.prompts)
        for block, taken in common.progress(stream, name=name, unit="blocks", total=blocks):
            spent.append(taken)
            compiled.block = len(spent)
            held = max(held, sum(leaf.nbytes for leaf in jax.tree.leaves(block.state)))
            writer.write(block.frames)
            chosen += [
                block.frames[frame - count]
                for frame in shown
                if count <= frame < count + len(block.frames)
            ]
            count += len(block.frames)
    strip = np.concatenate(video.to_uint8(chosen), axis=1)
    with atomic.file(folder / f"{name}.png") as fresh:
        Image.fromarray(strip).save(fresh, format="PNG")
    steps = calls.calls(exp.memory, wanted.method, numbered(wanted.prompts))
    cache = exp.cache
    return {
        "key": wanted.key,
        "source": wanted.method.source,
        "trained for": name == model_folder.opened(SHIPPED).experiment.method,
        "one clip": wanted.method.one_clip,
        "frames": count,
        "blocks": len(spent),
        "sink": cache.sink,
        "packed": cache.attended,
        "recent": cache.recent,
        "block": cache.block,
        "window": cache.window,
        "keys": max(call.tokens for call in steps if call.call == calls.DENOISE),
        "bytes": held,
        "first": spent[0].wall,
        "seconds": quartiles([each.wall for each in spent[OPENING:]]),
        "processor": quartiles([each.processor for each in spent[OPENING:]]),
        "compiled": compiled.programs(),
        "device": common.device_line(),
        "jax": jax.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def numbered(prompts: Sequence[str]) -> list[int]:
    """The number of the prompt of each block: equal neighbours share one."""
    changes = [before != after for before, after in zip(prompts, prompts[1:], strict=False)]
    return np.cumsum([0, *changes]).tolist()


def quartiles(seconds: Sequence[float]) -> list[float] | None:
    """Lower quartile, median, upper quartile; None of a video that is too short."""
    return np.percentile(seconds, (25, 50, 75)).tolist() if seconds else None


# The comparison


def compare(names: Sequence[str], frames: int, seed: int, folder: Path) -> dict[str, Row]:
    """Rows of all methods; those that `folder` holds finished are kept, and the others drawn and added to it."""
    folder.mkdir(parents=True, exist_ok=True)
    book = folder / "methods.json"
    rows: dict[str, Row] = json.loads(book.read_text())["methods"] if book.is_file() else {}
    for name in names:
        key = plan(name, frames, seed).key
        files = [folder / f"{name}.mp4", folder / f"{name}.png"]
        if rows.get(name, {}).get("key") == key and all(file.is_file() for file in files):
            print(f"methods: {name} is finished", file=sys.stderr)
            continue
        rows[name] = run_child(name, frames, seed, folder)
        whole = {"frames": frames, "seed": seed, "story": STORY, "methods": rows}
        atomic.write(book, json.dumps(whole, indent=1).encode())
    return {name: rows[name] for name in names}


def run_child(name: str, frames: int, seed: int, folder: Path) -> Row:
    """The row of a method that is drawn in a fresh process, or the reason why there is none."""
    command = [sys.executable, "-m", "benchmarks.methods", "--child", name]
    flags = ["--frames", str(frames), "--seed", str(seed), "--out", str(folder.resolve())]
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    done = subprocess.run(
        [*command, *flags], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        return {"failed": f"its process ended with {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def breaks(row: Row) -> list[str]:
    """What does not hold of a row, in words."""
    if "failed" in row:
        return [row["failed"]]
    often = [name for name, blocks in row["compiled"].items() if len(blocks) > VERSIONS]
    late = [
        name
        for name, blocks in row["compiled"].items()
        if max(blocks) >= max(OPENING, row["blocks"] / 2)
    ]
    return [
        *(f"{name} is compiled {len(row['compiled'][name])} times" for name in often),
        *(f"{name} is compiled in the second half" for name in late),
    ]


def programs(row: Row) -> str:
    """How many programs were compiled, and those of more than one version."""
    counts = {name: len(blocks) for name, blocks in row["compiled"].items()}
    again = [f"{name} {count} times" for name, count in counts.items() if count > 1]
    return ", ".join([f"{len(counts)}, each once" if not again else f"{len(counts)}", *again])


def milliseconds(seconds: Sequence[float] | None) -> str:
    """Their median and quartiles; seconds of the processor depend less on what else a machine does."""
    if seconds is None:
        return "-"
    low, middle, high = (1e3 * each for each in seconds)
    return f"{middle:.0f} [{low:.0f}, {high:.0f}]"


COLUMN: Mapping[str, Callable[[Row], str]] = {
    "trained for": lambda row: "yes" if row["trained for"] else "no",
    "frames (blocks)": lambda row: (
        f"{row['frames']} ({row['blocks']}){', one clip' if row['one clip'] else ''}"
    ),
    "sink, recent, current": lambda row: (
        f"{row['sink']}, {row['recent']}, {max(row['window'], row['block'])}"
    ),
    "packed blocks": lambda row: str(row["packed"]),
    "keys": lambda row: f"{row['keys']:,}",
    "held, bytes": lambda row: f"{row['bytes']:,}",
    "ms a block": lambda row: milliseconds(row["seconds"]),
    "of processor": lambda row: milliseconds(row["processor"]),
    "first, s": lambda row: f"{row['first']:.1f}",
    "programs compiled": programs,
}


def cells(rows: Mapping[str, Row]) -> list[list[str]]:
    """Heading and rows of the table; of a method that failed, the reason."""
    told = [
        [name, *([row["failed"]] if "failed" in row else [tell(row) for tell in COLUMN.values()])]
        for name, row in rows.items()
    ]
    return [["method", *COLUMN], *told]


def table(rows: Mapping[str, Row]) -> str:
    """The comparison as aligned text."""
    lines = cells(rows)
    wide = [max(len(line[at]) for line in lines if len(line) > at) for at in range(len(lines[0]))]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(line, wide)).rstrip() for line in lines
    )


def markdown(rows: Mapping[str, Row]) -> str:
    """The same as a table of the documentation."""
    head, *lines = cells(rows)
    rule = "|".join([*["---"] * 4, *["--:"] * 6, "---"])
    told = [[f"`{line[0]}`", *line[1:]] for line in lines]
    return "\n".join(
        [f"| {' | '.join(head)} |", f"|{rule}|", *(f"| {' | '.join(x)} |" for x in told)]
    )


def sheet(rows: Mapping[str, Row], frames: int, folder: Path) -> Path:
    """One row per method, columns at equal times; a place stays empty where a video has ended."""
    exp = model_folder.opened(SHIPPED).experiment
    side = exp.latent[0] * exp.codec.space_factor
    tile = side * SCALE + GAP
    drawn = {name: row for name, row in rows.items() if "failed" not in row}
    image = Image.new("RGB", (LEFT + COLUMNS * tile, TOP + len(drawn) * tile), PAPER)
    pen = ImageDraw.Draw(image)
    for column, frame in enumerate(times(frames)):
        middle = LEFT + column * tile + tile / 2
        pen.text((middle, TOP / 2), f"{frame / exp.fps:.1f} s", FAINT, font(12), anchor="mm")
    for number, (name, row) in enumerate(drawn.items()):
        top = TOP + number * tile
        with Image.open(folder / f"{name}.png") as strip:
            for column in range(strip.width // side):
                box = (column * side, 0, (column + 1) * side, side)
                big = strip.crop(box).resize((side * SCALE, side * SCALE), Image.Resampling.NEAREST)
                image.paste(big, (LEFT + column * tile, top))
        note = f"one clip, {row['frames']} frames" if row["one clip"] else ""
        trained = "trained for" if row["trained for"] else "not trained for"
        for line, (text, ink) in enumerate([(name, INK), (trained, FAINT), (note, FAINT)]):
            pen.text((4, top + tile / 2 + 16 * (line - 1)), text, ink, font(12), anchor="lm")
    path = folder / "methods.png"
    with atomic.file(path) as fresh:
        image.quantize(256, dither=Image.Dither.NONE).save(fresh, format="PNG", optimize=True)
    return path


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font of labels."""
    return ImageFont.load_default(size)


def chosen_names(text: str | None) -> list[str]:
    """Names of methods as they are given, all of them without any."""
    known = [name for name, method in METHODS.items() if not method.whole_clip]
    names = known if text is None else [name.strip() for name in text.split(",")]
    for name in names:
        require(name in METHODS, f"method {name!r} is unknown; {nearest(name, METHODS)}")
        require_blocks(METHODS[name], "this comparison")
    return names


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table and where the files are; 1 if something does not hold."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("out/methods"))
    parser.add_argument("--frames", type=int, default=480, metavar="N", help="default: 480")
    parser.add_argument("--methods", metavar="A,B", help="only these (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--child", metavar="NAME", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.frames < 1 or not 0 <= args.seed < 2**32:
        parser.error(f"--frames {args.frames} must be at least 1, --seed {args.seed} 0 or more")
    try:
        if args.child is not None:
            print(json.dumps(draw(args.child, args.frames, args.seed, args.out)))
            return 0
        rows = compare(chosen_names(args.methods), args.frames, args.seed, args.out)
    except (InputError, MachineError) as error:
        print(f"methods: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        if args.child is None:
            print("methods: interrupted; the same command goes on", file=sys.stderr)
        return 130
    print(markdown(rows) if args.markdown else table(rows))
    if any("failed" not in row for row in rows.values()):
        print(sheet(rows, args.frames, args.out), file=sys.stderr)
    broken = [f"{name}: {each}" for name, row in rows.items() for each in breaks(row)]
    for each in broken:
        print(f"methods: BROKEN {each}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
