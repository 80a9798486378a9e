"""Reads the diary of a run: what must hold in it, what the layers recalled as a table, and the whole as a picture."""

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import einops
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from packforcing_jax.config import CacheConfig
from packforcing_jax.sampling.trace import Block, Trace

IN_ROW = (
    "sink",
    "incremental",
)  # rules that lay packed blocks in one row; others leave them at their true frames
EPS = 2.0**-23  # of float32
AGES = (4, 8, 16, 32, 64, 128)  # upper ends of the table's ranges of ages, in blocks
OLD = 16
RANGES = 6
SIDE = 720
MOST = 2048  # pixels: a map is enlarged to about SIDE and never exceeds MOST
RAMP = (
    (16, 18, 36),
    (92, 32, 104),
    (226, 92, 60),
    (255, 240, 160),
)  # recalled by no layer ... by all
GONE = (0, 0, 0)
FULL_RES = (44, 72, 66)
NOW = (255, 255, 255)
MEANINGS = (  # colours of the map beside RAMP
    (NOW, "the block itself"),
    (FULL_RES, "seen at full size", "(sink, recent)"),
    (GONE, "forgotten, or", "still to come"),
)
PAPER = (250, 250, 250)
INK = (30, 30, 30)
LEFT = 66
TOP = 16
RIGHT = 172
BOTTOM = 52  # pixels around the cells, for axes and legend
FONT = 13
TITLE = 15
SWATCH = 18
BAR = 120
LEGEND_HEIGHT = 40 + BAR + 24 + 42 * len(MEANINGS)
TICK_ROOM = 44  # pixels between two numbers of an axis, at least
COLUMNS = (  # of the table: figure, title, width, form
    ("layer", "layer", 6, "d"),
    ("recalled", "recalled", 9, ".1f"),
    ("mean_age", "mean age", 9, ".1f"),
    ("median_age", "median", 7, ".0f"),
    ("oldest", "oldest", 7, ".0f"),
    ("old_share", f">{OLD}", 6, ".2f"),
    ("change", "change", 7, ".2f"),
    ("distinct", "distinct", 9, "d"),
    ("best", "best", 9, ".2g"),
    ("last", "last", 9, ".2g"),
)


def visible(cfg: CacheConfig, block: int) -> list[int]:
    """Ids of the packed blocks that `block` may recall."""
    first = cfg.sink // cfg.block
    written = max(0, block - cfg.sink // cfg.block)
    in_slots = np.asarray(cfg.evicts.ids_in(written, cfg.slots)) if cfg.top else np.zeros(0, int)
    return sorted(int(id) + first for id in in_slots if 0 <= id < written - cfg.recent // cfg.block)


def due(cfg: CacheConfig, block: int) -> int:
    """How many packed blocks `block` has to recall."""
    return min(len(visible(cfg, block)), cfg.attended)


def _same(reading: float, wanted: float) -> bool:
    """Whether two places agree as far as float32 tells them apart, a thousandth of a frame at least."""
    return math.isfinite(wanted) and abs(reading - wanted) <= max(1e-3, 4 * EPS * abs(wanted))


def _order(cfg: CacheConfig, before: Block | None, block: Block) -> Iterator[str]:
    """Blocks are numbered 0, 1, 2 ..."""
    wanted = 0 if before is None else before.index + 1
    if block.index != wanted:
        yield f"Block {block.index} stands where block {wanted} was due."


def _sink(cfg: CacheConfig, before: Block | None, block: Block) -> Iterator[str]:
    """Nothing writes a sink that is full."""
    if before is None or (before.index + 1) * cfg.block < cfg.sink:
        return
    if before.sink_sum != block.sink_sum:
        yield f"Block {block.index}: the full sink's checksum went from {before.sink_sum} to {block.sink_sum}."


def _layout(cfg: CacheConfig, before: Block | None, block: Block) -> Iterator[str]:
    """Sink, packed row, recent frames and the block itself stand one behind the other, each of its size."""
    has = block.layout
    start = block.index * cfg.block
    rule = cfg.rope_adjustment
    sink = min(start, cfg.sink)
    count = due(cfg, block.index)
    left = max(
        cfg.max_position - cfg.sink - cfg.recent - cfg.block, 1
    )  # trained frames for the packed row
    wanted = [
        ("number of frames of the sink", "sink", sink),
        ("number of frames of the recent blocks", "recent", min(start - sink, cfg.recent)),
        ("number of frames of the block", "block", cfg.block),
        ("number of packed blocks", "num_selected", count),
        (
            "span of a packed block",
            "step",
            min(cfg.block, left / max(count, 1)) if cfg.span == "fit" else cfg.block,
        ),
        (
            "place of the block, behind the recent frames,",
            "current_position",
            has["recent_position"] + has["recent"],
        ),
    ]
    if rule in ("sink", "none"):
        wanted.append(("place of the sink", "sink_position", 0))
    if rule != "sink":
        wanted.append(("place of the block, its true frame,", "current_position", start))
    if rule != "none":
        row_ends = has["sink_position"] + has["sink"] + has["num_selected"] * has["step"]
        wanted.append(
            ("place of the recent frames, behind the packed row,", "recent_position", row_ends)
        )
    for what, name, value in wanted:
        if not _same(has[name], value):
            yield f"Block {block.index}: the {what} is {has[name]:.9g}, but {value:.9g} was due."


def _recalled(cfg: CacheConfig, before: Block | None, block: Block) -> Iterator[str]:
    """Every layer recalls as many visible blocks as there should be, in time order, none twice."""
    visible_ids = visible(cfg, block.index)
    count = due(cfg, block.index)
    for number, layer in enumerate(block.layers):
        where = f"Block {block.index}, layer {number}"
        ids = layer.ids.tolist()
        if len(ids) != count:
            yield f"{where}: {len(ids)} packed blocks were recalled, but {count} were due."
        for id in sorted(set(ids) - set(visible_ids)):
            may = (
                f"only {visible_ids[0]} to {visible_ids[-1]} could be"
                if visible_ids
                else "none could be"
            )
            yield f"{where}: packed block {id} was recalled, but {may}."
        for one, other in zip(ids, ids[1:]):
            if one >= other:
                yield f"{where}: packed block {other} " + (
                    "came twice." if one == other else f"came behind {one}."
                )


def _positions(cfg: CacheConfig, before: Block | None, block: Block) -> Iterator[str]:
    """Packed blocks stand in one row behind the sink, or at their true frames, with finite scores and true ages."""
    row = block.layout["sink_position"] + block.layout["sink"]
    step = block.layout["step"]
    in_row = cfg.rope_adjustment in IN_ROW
    for number, layer in enumerate(block.layers):
        where = f"Block {block.index}, layer {number}: packed block"
        for rank, (id, score, age, at) in enumerate(
            zip(layer.ids, layer.scores, layer.ages, layer.positions)
        ):
            wanted = row + rank * step if in_row else id * cfg.block
            if not _same(at, wanted):
                yield f"{where} {id} begins at {at:.9g}, but {wanted:.9g} was due."
            if age != block.index - id:
                yield f"{where} {id} is said to be {age} blocks old, but is {block.index - id}."
            if not np.isfinite(score):
                yield f"{where} {id} has a score that is not finite."


def _shared(cfg: CacheConfig, before: Block | None, block: Block) -> Iterator[str]:
    """A choice for all layers is the same in all."""
    first = block.layers[0].ids.tolist()
    for number, layer in enumerate(block.layers):
        if cfg.scope == "shared" and layer.ids.tolist() != first:
            yield f"Block {block.index}, layer {number}: recalled {layer.ids.tolist()}, but layer 0 recalled {first}."


INVARIANTS = (_order, _sink, _layout, _recalled, _positions, _shared)


def problems(trace: Trace) -> list[str]:
    """One sentence for everything in the trace that must not be; none if all holds."""
    pairs = list(zip((None, *trace.blocks), trace.blocks))
    return [
        problem
        for before, block in pairs
        for check in INVARIANTS
        for problem in check(trace.cache, before, block)
    ]


def _mean(values: Iterable[float]) -> float | None:
    """The mean of the finite values, None if there are none."""
    finite = [float(value) for value in values if np.isfinite(value)]
    return sum(finite) / len(finite) if finite else None


def _ages(ages: np.ndarray, weights: np.ndarray) -> dict[str, float | None]:
    """Mean, median and largest of weighted ages, and the share above OLD; None where there are none."""
    if len(ages) == 0:
        return dict.fromkeys(("mean_age", "median_age", "oldest", "old_share"))
    order = np.argsort(ages, kind="stable")
    half = np.searchsorted(weights[order].cumsum(), weights.sum() / 2)
    return {
        "mean_age": float(np.average(ages, weights=weights)),
        "median_age": float(ages[order][half]),
        "oldest": float(ages.max()),
        "old_share": float(weights[ages > OLD].sum() / weights.sum()),
    }


def jaccard_distance(one: np.ndarray, other: np.ndarray) -> float:
    """Jaccard distance of two sets of ids: 0 for the same, 1 for nothing in common."""
    return 1 - len(np.intersect1d(one, other)) / max(len(np.union1d(one, other)), 1)


def jaccard_at_random(cfg: CacheConfig, one: int, other: int) -> float:
    """The mean Jaccard distance of what two blocks, `one` before `other`, choose at random of what they may recall."""
    chosen = due(cfg, one) + due(cfg, other)
    return sum(
        share * (1 - common / max(chosen - common, 1))
        for common, share in enumerate(in_common_at_random(cfg, one, other))
    )


def in_common_at_random(cfg: CacheConfig, one: int, other: int) -> list[float]:
    """The probability that choices at random of two blocks have 0, 1, 2 ... packed blocks in common."""
    before, after = visible(cfg, one), visible(cfg, other)
    drawn, wanted = due(cfg, one), due(cfg, other)
    shares = [0.0] * (min(drawn, wanted) + 1)
    still_there = _hypergeometric(len(before), len(set(before) & set(after)), drawn)
    for there, first in enumerate(still_there):
        for common, second in enumerate(_hypergeometric(len(after), there, wanted)):
            shares[common] += first * second
    return shares


def _hypergeometric(population: int, marked: int, drawn: int) -> list[float]:
    """The probability of 0, 1, 2 ... marked ones among `drawn` of a population, all draws being as likely."""
    return [
        math.comb(marked, hits)
        * math.comb(population - marked, drawn - hits)
        / math.comb(population, drawn)
        for hits in range(min(marked, drawn) + 1)
    ]


def _free(trace: Trace) -> list[tuple[Block, Block]]:
    """Consecutive blocks that both saw more packed blocks than they may recall, and so had a choice."""
    free = [
        len(visible(trace.cache, block.index)) > due(trace.cache, block.index) > 0
        for block in trace.blocks
    ]
    return [
        pair
        for pair, both in zip(itertools.pairwise(trace.blocks), itertools.pairwise(free))
        if all(both)
    ]


def _of_layer(trace: Trace, number: int) -> dict[str, Any]:
    """The figures of one layer's choices."""
    choices = [block.layers[number] for block in trace.blocks if len(block.layers[number].ids)]
    ages = np.concatenate([layer.ages for layer in choices] or [np.zeros(0)])
    changes = [
        jaccard_distance(one.layers[number].ids, other.layers[number].ids)
        for one, other in _free(trace)
    ]
    return (
        {"layer": number, "recalled": _mean(len(layer.ids) for layer in choices)}
        | _ages(ages, np.ones(len(ages)))
        | {
            "change": _mean(changes),
            "distinct": len({id for layer in choices for id in layer.ids.tolist()}),
            "best": _mean(np.fmax.reduce(layer.scores) for layer in choices),
            "last": _mean(np.fmin.reduce(layer.scores) for layer in choices),
        }
    )


def _at_random(trace: Trace) -> dict[str, Any]:
    """The same figures if every block chose at random among what it could see."""
    candidates = [
        (block.index, visible(trace.cache, block.index), due(trace.cache, block.index))
        for block in trace.blocks
    ]
    candidates = [(index, np.array(ids), count) for index, ids, count in candidates if count]
    ages = np.concatenate([index - ids for index, ids, _ in candidates] or [np.zeros(0)])
    weights = np.concatenate(
        [np.full(len(ids), count / len(ids)) for _, ids, count in candidates] or [np.zeros(0)]
    )
    return (
        {"layer": "random", "recalled": _mean(count for *_, count in candidates)}
        | _ages(ages, weights)
        | {
            "change": _mean(
                jaccard_at_random(trace.cache, one.index, other.index)
                for one, other in _free(trace)
            ),
            "distinct": None,
            "best": None,
            "last": None,
        }
    )


def rows(trace: Trace) -> list[dict[str, Any]]:
    """The figures of every layer, then those of choices at random; None where nothing was recalled."""
    return [
        *(_of_layer(trace, number) for number in range(len(trace.blocks[0].layers))),
        _at_random(trace),
    ]


def _cell(value: Any, form: str) -> str:
    """One cell of the table."""
    return "-" if value is None else value if isinstance(value, str) else format(value, form)


def by_age(trace: Trace) -> list[tuple[str, list[float] | None]]:
    """For RANGES ranges of blocks: their name, and the share of all layers' choices in each range of AGES."""
    shares = []
    for part in np.array_split(np.arange(len(trace.blocks)), min(RANGES, len(trace.blocks))):
        blocks = [trace.blocks[i] for i in part]
        ages = np.concatenate([layer.ages for block in blocks for layer in block.layers])
        counts = np.bincount(np.searchsorted(AGES, ages), minlength=len(AGES) + 1)
        name = f"{blocks[0].index}-{blocks[-1].index}"
        shares.append((name, (counts / len(ages)).tolist() if len(ages) else None))
    return shares


def table(trace: Trace) -> str:
    """The whole run in at most 80 columns: a summary, a row per layer, and the ages of what was recalled."""
    cfg = trace.cache
    blocks = trace.blocks
    ever = {id for block in blocks for id in visible(cfg, block.index)}
    lines = [
        f"{trace.header['experiment']}: {len(blocks)} blocks, {len(blocks[0].layers)} layers, {len(ever)} packed "
        f"blocks, at most {cfg.attended if cfg.top else 0} recalled at once",
        f"selection {cfg.selection}, scope {cfg.scope}, timing {cfg.timing}",
        f"rope_adjustment {cfg.rope_adjustment}, span {cfg.span}",
        "",
    ]
    lines.append("".join(f"{title:>{width}}" for _, title, width, _ in COLUMNS))
    lines += [
        "".join(f"{_cell(row[name], form):>{width}}" for name, _, width, form in COLUMNS)
        for row in rows(trace)
    ]
    lines += [
        "ages in blocks; best, last: mean of each block's highest and lowest score",
        "change: Jaccard distance of consecutive choices, where there was more to choose",
        "",
        "share of choices by age",
    ]
    names = [f"{one + 1}-{other}" for one, other in itertools.pairwise((0, *AGES))] + [
        f">{AGES[-1]}"
    ]
    lines.append(f"{'blocks':>12}" + "".join(f"{name:>8}" for name in names))
    lines += [
        f"{name:>12}"
        + "".join(f"{_cell(share, '.2f'):>8}" for share in shares or [None] * len(names))
        for name, shares in by_age(trace)
    ]
    return "\n".join(lines)


def _shares(trace: Trace, size: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """For [drawing block, packed block], `step` of each in a cell: share of layers that recalled it, and who could."""
    count = len(trace.blocks)
    share = np.zeros((size, size))
    may = np.zeros((size, size), bool)
    for block in (block for block in trace.blocks if 0 <= block.index < count):
        ids = np.concatenate([np.unique(layer.ids) for layer in block.layers])
        hits = np.bincount(ids[(ids >= 0) & (ids < count)], minlength=count) / len(block.layers)
        row = block.index // step
        visible_ids = visible(trace.cache, block.index)
        share[row] = np.maximum(share[row], np.maximum.reduceat(hits, np.arange(0, count, step)))
        may[row, np.array(visible_ids, int) // step] = True
    return share, may


def _grid(trace: Trace) -> tuple[int, int]:
    """How many cells a side of the map has, and how many blocks stand in one of them."""
    count = len(trace.blocks)
    step = -(-count // MOST)
    return -(-count // step), step


def cells(trace: Trace) -> np.ndarray:
    """The map without its frame [h, w, 3], uint8: a row per block, a column per packed block.

    A cell is brighter if more layers recalled it. White is the block itself, green what it saw at full size,
    black what is gone or still to come.
    """
    cfg = trace.cache
    size, step = _grid(trace)
    share, may = _shares(trace, size, step)
    row, column = np.ogrid[:size, :size]
    full_res = (column * step < cfg.sink // cfg.block) | (
        (row - column) * step <= cfg.recent // cfg.block
    )
    stops = np.linspace(0, 1, len(RAMP))
    colours = np.stack([np.interp(share, stops, level) for level in np.transpose(RAMP)], axis=-1)
    other = ~may & (share == 0)
    for where, colour in (
        (other, GONE),
        (other & full_res & (column < row), FULL_RES),
        (row == column, NOW),
    ):
        colours[where] = colour
    scale = max(1, SIDE // size)
    return einops.repeat(
        np.rint(colours).astype(np.uint8), "h w c -> (h a) (w b) c", a=scale, b=scale
    )


def heat_map(trace: Trace) -> np.ndarray:
    """The picture [h, w, 3], uint8: the cells, axes that number their blocks, and what the colours say."""
    inner = cells(trace)
    size, step = _grid(trace)
    side = len(inner)
    scale = len(inner) // size
    shape = LEFT + side + RIGHT, TOP + max(side, LEGEND_HEIGHT) + BOTTOM
    image = Image.new("RGB", shape, PAPER)
    image.paste(Image.fromarray(inner), (LEFT, TOP))
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(FONT)
    for block in range(0, len(trace.blocks), _tick_step(len(trace.blocks), side)):
        at = (block // step + 0.5) * scale
        across = LEFT + at
        down = TOP + at
        draw.line((across, TOP + side, across, TOP + side + 4), INK)
        draw.text((across, TOP + side + 7), str(block), INK, font, anchor="mt")
        draw.line((LEFT - 5, down, LEFT - 1, down), INK)
        draw.text((LEFT - 9, down), str(block), INK, font, anchor="rm")
    draw.text(
        (LEFT + side / 2, TOP + side + 27),
        "block recalled",
        INK,
        ImageFont.load_default(TITLE),
        "mt",
    )
    _write_upwards(image, "block being made", (8, TOP + side // 2))
    _legend(draw, (LEFT + side + 20, TOP))
    return np.asarray(image)


def _tick_step(count: int, side: int) -> int:
    """Blocks between two numbers of an axis: 1, 2 or 5 times a power of ten, so that numbers do not touch."""
    wanted = count * TICK_ROOM / side
    powers = (10**power for power in itertools.count())
    return next(n * power for power in powers for n in (1, 2, 5) if n * power >= wanted)


def _write_upwards(image: Image.Image, text: str, middle: tuple[int, int]) -> None:
    """Writes a title that reads from below to above, its left edge and middle at `middle`."""
    font = ImageFont.load_default(TITLE)
    _, _, width, height = map(math.ceil, font.getbbox(text))
    strip = Image.new("RGB", (width, height + 2), PAPER)
    ImageDraw.Draw(strip).text((0, 0), text, INK, font)
    left, down = middle
    image.paste(strip.transpose(Image.Transpose.ROTATE_90), (left, max(0, down - width // 2)))


def _legend(draw: ImageDraw.ImageDraw, corner: tuple[int, int]) -> None:
    """The colours and what they say, one below the other."""
    left, top = corner
    font = ImageFont.load_default(FONT)
    stops = np.linspace(0, 1, len(RAMP))
    draw.text((left, top), "layers that recall", INK, font)
    draw.text((left, top + 17), "the packed block", INK, font)
    for row in range(BAR):
        colour = [np.interp(1 - row / (BAR - 1), stops, level) for level in np.transpose(RAMP)]
        y = top + 40 + row
        draw.line((left, y, left + SWATCH - 1, y), tuple(int(round(value)) for value in colour))
    for share, name in ((0, "all"), (0.5, "half"), (1, "none")):
        y = top + 40 + share * (BAR - 1)
        draw.text((left + SWATCH + 8, y), name, INK, font, anchor="lm")
    for number, (colour, *lines) in enumerate(MEANINGS):
        y = top + 40 + BAR + 24 + number * 42
        draw.rectangle((left, y, left + SWATCH - 1, y + SWATCH - 1), colour, INK)
        for row, line in enumerate(lines):
            draw.text((left + SWATCH + 8, y - 2 + 16 * row), line, INK, font)
