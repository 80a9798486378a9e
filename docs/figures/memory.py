"""The memory in one picture: what is kept of the past, and what one block reads of it: `memory.svg`.

    python -m docs.figures.memory

Sizes and positions are those of the profile `paper` of Wan2.1 1.3B at 480x832, read from its config.
"""

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Rectangle

from docs.figures import style
from packforcing_jax.config import loading

CONFIG = "wan_t2v_1_3b_paper"
FULL, SMALL, STEP = (
    0.92,
    0.34,
    0.46,
)  # sides of a block at full size and packed; from packed to packed
KEPT, READ, GAP = 3.7, 0.95, 0.78  # middles of both rows; room for an arrow
PACKED, RECALLED = 10, (1, 3, 4, 7)  # blocks of the archive that are drawn, and those recalled
SINK, MID, RECENT, NOW = style.BLUE, style.ORANGE, style.GREEN, style.RED
PALE = {MID: "#f6ddb0"}


def block(axes: Axes, left: float, middle: float, side: float, colour: str, **kind) -> None:
    """A square; a packed block that is not recalled is pale."""
    axes.add_patch(
        Rectangle(
            (left, middle - side / 2),
            side,
            side,
            **{"facecolor": colour, "edgecolor": style.CARD, "linewidth": 1.2} | kind,
        )
    )


def arrow(axes: Axes, start: tuple, end: tuple, colour: str, bend: float = 0, **kind) -> None:
    """An arrow, bent to the side by a share of its length."""
    style_of = {"arrowstyle": "-|>", "mutation_scale": 10, "linewidth": 1.2} | kind
    axes.add_patch(
        FancyArrowPatch(
            start,
            end,
            connectionstyle=f"arc3,rad={bend}",
            color=colour,
            shrinkA=0,
            shrinkB=0,
            **style_of,
        )
    )


def label(axes: Axes, x: float, y: float, text: str, colour: str = style.INK, **kind) -> None:
    """Words around a place."""
    axes.text(x, y, text, color=colour, **{"ha": "center", "va": "center", "fontsize": 9.5} | kind)


def kept(axes: Axes, sizes: dict[str, int]) -> dict[str, float]:
    """The upper row, the past in its true order; the places of its parts from left to right."""
    at = {"sink": 0.4}
    for number in range(sizes["sink blocks"]):
        block(axes, at["sink"] + number * (FULL + 0.06), KEPT, FULL, SINK)
    at["archive"] = at["sink"] + sizes["sink blocks"] * (FULL + 0.06) + 0.5
    axes.add_patch(
        Rectangle(
            (at["archive"] - 0.22, KEPT - 0.42),
            PACKED * STEP + 0.8,
            0.84,
            facecolor="#fff8ea",
            edgecolor=MID,
            linestyle=(0, (4, 3)),
        )
    )
    for number in range(PACKED):
        colour = MID if number in RECALLED else PALE[MID]
        block(axes, at["archive"] + number * STEP, KEPT, SMALL, colour, edgecolor=MID)
    label(axes, at["archive"] + PACKED * STEP + 0.16, KEPT, "...", MID, fontsize=14)
    at["recent"] = at["archive"] - 0.22 + PACKED * STEP + 0.8 + GAP
    block(axes, at["recent"], KEPT, FULL, RECENT)
    at["now"] = at["recent"] + FULL + GAP
    block(
        axes, at["now"], KEPT, FULL, "#fbeae7", edgecolor=NOW, linestyle=(0, (4, 2)), linewidth=1.6
    )
    label(axes, at["now"] + FULL / 2, KEPT, "noise\nto clean", NOW, fontsize=8.5)
    return at


def names(axes: Axes, at: dict[str, float], sizes: dict[str, int]) -> None:
    """What stands above the upper row."""
    top = KEPT + 0.86
    parts = (
        (at["sink"] + FULL + 0.03, "sink", "first blocks, full size", SINK),
        (
            at["archive"] + PACKED * STEP / 2 + 0.15,
            f"mid: the archive of packed blocks, up to {sizes['capacity']}",
            f"{sizes['packed']} tokens a block in place of {sizes['full']:,}",
            MID,
        ),
        (at["recent"] + FULL / 2, "recent", "full size", RECENT),
        (at["now"] + FULL / 2, "current", "being made", NOW),
    )
    for x, name, what, colour in parts:
        label(axes, x, top + 0.22, name, colour, fontsize=11, fontweight="bold")
        label(axes, x, top - 0.07, what, style.INK, fontsize=9)


def read(axes: Axes, at: dict[str, float], sizes: dict[str, int]) -> None:
    """The lower row, what attention reads, and the positions it is laid out at."""
    left, gap = 2.1, 0.03
    x, ticks = left, [(left, 0)]
    for number in range(sizes["sink blocks"]):
        block(axes, x, READ, FULL, SINK)
        arrow(
            axes,
            (at["sink"] + number * (FULL + 0.06) + FULL / 2, KEPT - FULL / 2 - 0.06),
            (x + FULL / 2, READ + FULL / 2 + 0.06),
            SINK,
        )
        x += FULL + gap
    ticks.append((x, sizes["sink"]))
    for number in RECALLED:
        block(axes, x + 0.03, READ, SMALL, MID, edgecolor=MID)
        arrow(
            axes,
            (at["archive"] + number * STEP + SMALL / 2, KEPT - SMALL / 2 - 0.04),
            (x + 0.03 + SMALL / 2, READ + SMALL / 2 + 0.06),
            MID,
        )
        x += STEP
    label(axes, x + 0.3, READ, "...", MID, fontsize=14)
    x += 0.7
    ticks.append((x, sizes["sink"] + sizes["top"] * sizes["block"]))
    for part, colour, span in (("recent", RECENT, sizes["recent"]), ("now", NOW, sizes["block"])):
        kind = {
            "facecolor": "#fbeae7",
            "edgecolor": NOW,
            "linestyle": (0, (4, 2)),
            "linewidth": 1.6,
        }
        block(axes, x, READ, FULL, colour, **(kind if part == "now" else {}))
        arrow(
            axes,
            (at[part] + FULL / 2, KEPT - FULL / 2 - 0.06),
            (x + FULL / 2, READ + FULL / 2 + 0.06),
            colour,
        )
        x += FULL + gap
        ticks.append((x, ticks[-1][1] + span))
    positions(axes, left, x, ticks)
    label(
        axes, left - 0.25, READ + 0.14, "what attention", ha="right", fontsize=11, fontweight="bold"
    )
    label(axes, left - 0.25, READ - 0.14, "reads", ha="right", fontsize=11, fontweight="bold")
    for row, line in enumerate(
        (
            "Positions are laid out again",
            "behind the sink after each",
            "selection: no gaps, however",
            "old the recalled blocks are.",
        )
    ):
        label(axes, x + 0.35, READ + 0.45 - 0.28 * row, line, ha="left", fontsize=9.5)


def positions(axes: Axes, left: float, right: float, ticks: list[tuple[float, int]]) -> None:
    """The axis of positions in time below the lower row."""
    base = READ - FULL / 2 - 0.16
    axes.plot((left, right), (base, base), color=style.FAINT, linewidth=1)
    for x, position in ticks:
        axes.plot((x, x), (base, base - 0.07), color=style.FAINT, linewidth=1)
        label(axes, x, base - 0.2, str(position), style.FAINT, fontsize=8.5)
    label(
        axes,
        (left + right) / 2,
        base - 0.46,
        "position in time, latent frames",
        style.FAINT,
        fontsize=9,
    )


def ways(axes: Axes, at: dict[str, float], sizes: dict[str, int]) -> None:
    """How blocks are chosen, and how they come into the archive."""
    top, archive_ends = KEPT + 1.34, at["archive"] - 0.22 + PACKED * STEP + 0.8
    middle = at["archive"] + PACKED * STEP / 2 + 0.15
    arrow(
        axes,
        (at["now"] + FULL / 2, top),
        (middle, top),
        style.INK,
        0.16,
        linestyle=(0, (3, 2)),
    )
    label(
        axes,
        (at["now"] + FULL / 2 + middle) / 2,
        top + 0.78,
        f"recall: each layer takes the top {sizes['top']} by the affinity "
        "of the current block's queries to the packed keys",
        fontsize=10,
    )
    for start, end, word in (
        (at["now"], at["recent"] + FULL, "finished"),
        (at["recent"], archive_ends, "packed"),
    ):
        arrow(axes, (start - 0.09, KEPT), (end + 0.09, KEPT), style.FAINT, mutation_scale=13)
        label(axes, (start + end) / 2, KEPT - 0.22, word, style.FAINT, fontsize=9)
    label(
        axes,
        archive_ends,
        KEPT - 0.6,
        "pale: kept, but not attended",
        style.FAINT,
        ha="right",
        fontsize=9,
    )


def main() -> None:
    """Draws the figure."""
    style.use()
    exp = loading.load_experiment(CONFIG)
    cfg = exp.cache
    sizes = {name: getattr(cfg, name) for name in ("block", "sink", "recent", "top", "capacity")}
    sizes |= {
        "sink blocks": cfg.sink // cfg.block,
        "full": cfg.block * exp.tokens_per_frame,
        "packed": exp.tokens_per_packed_block,
    }
    figure = plt.figure(figsize=(11.9, 6.5))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 11.9), ylim=(-0.4, 6.1))
    axes.axis("off")
    at = kept(axes, sizes)
    names(axes, at, sizes)
    read(axes, at, sizes)
    ways(axes, at, sizes)
    style.save(figure, __file__)


if __name__ == "__main__":
    main()
