"""How flat attention is over a long history, and how much choices change from block to block: `attention.svg`.

    packforcing evaluate --mode attention --ways affinity,paper,recency --weights DIR --json > RESULT
    python -m docs.figures.attention RESULT...     # keeps what is drawn, and the figures, in attention.json
    python -m docs.figures.attention               # draws it

The figures are those of `docs/attention.md`.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from docs.figures import style

STORED = Path(__file__).with_suffix(".json")
PROFILE = "packed blocks"
DIGITS = 3
PLACES = {"true": "true distances", "fit": "squeezed"}
COLOURS = (style.BLUE, style.GREEN, style.ORANGE, style.PURPLE)  # of the layers
WAYS = {"affinity": style.BLUE, "paper": style.RED, "recency": style.GREY}


def keep(results: Sequence[str]) -> None:
    """Writes what is drawn of several results, and their figures, into one file."""
    kept = {}
    for path in results:
        result = json.loads(Path(path).read_text())
        curves = {
            way: {
                "importance": {
                    span: profiles[PROFILE] for span, profiles in each["importance"].items()
                },
                "jaccard": each["jaccard"],
            }
            for way, each in result["curves"].items()
        }
        kept[result["experiment"]] = result | {"curves": curves}
    STORED.write_text(json.dumps(rounded(kept), separators=(",", ":")) + "\n")


def rounded(tree):
    """A result with its numbers rounded."""
    if isinstance(tree, dict):
        return {name: rounded(each) for name, each in tree.items()}
    if isinstance(tree, list):
        return [rounded(each) for each in tree]
    return round(tree, DIGITS) if isinstance(tree, float) else tree


def main() -> None:
    """A row for each model: importance by age at either place of the packed blocks, and Jaccard distances by block."""
    style.use()
    models = json.loads(STORED.read_text())
    figure, grid = plt.subplots(
        len(models), 3, figsize=(12, 3.1 * len(models)), layout="constrained", squeeze=False
    )
    for (name, result), row in zip(models.items(), grid, strict=True):
        for axes, span in zip(row, PLACES, strict=False):
            importance(axes, result["curves"]["affinity"]["importance"][span])
            axes.set_title(f"{name}: importance, {PLACES[span]}", loc="left")
        distances(row[2], result["curves"])
        row[2].set_title(f"{name}: consecutive choices", loc="left")
    for axes in grid[-1, :2]:
        axes.set_xlabel("age of the packed block (blocks)")
    grid[-1, 2].set_xlabel("block")
    for axes in grid[:, 0]:
        axes.set_ylabel("attention mass, normalised")
    for axes in grid[:, 2]:
        axes.set_ylabel("Jaccard distance")
    left, right = (axes.get_legend_handles_labels() for axes in (grid[0, 0], grid[0, 2]))
    figure.legend(*left, loc="outside upper left", ncols=len(left[1]), fontsize=8)
    figure.legend(*right, loc="outside upper right", ncols=len(right[1]), fontsize=8)
    style.save(figure, __file__)


def importance(axes: Axes, profile: dict) -> None:
    """Importance by age, thin for each layer, bold for the mean of the layers' masses."""
    *layers, mean = profile["normalised"]
    for number, (curve, colour) in enumerate(zip(layers, COLOURS, strict=True)):
        axes.plot(profile["age"], curve, color=colour, linewidth=0.9, label=f"layer {number}")
    axes.plot(profile["age"], mean, color=style.INK, linewidth=2, label="mean of layers")
    axes.axhline(0.499, color=style.RED, linestyle=":", linewidth=1, label="paper's mean, .499")
    axes.set(ylim=(0, 1.02))


def distances(axes: Axes, curves: dict) -> None:
    """Jaccard distances by block, the mean over layers, beside those of choices at random."""
    for way, colour in WAYS.items():
        if way in curves:
            found = curves[way]["jaccard"]
            axes.plot(found["block"], smooth(found["layers"][-1]), color=colour, label=way)
    found = curves["affinity"]["jaccard"]
    axes.plot(found["block"], found["chance"], color=style.INK, linestyle="--", label="at random")
    axes.axhline(0.75, color=style.RED, linestyle=":", linewidth=1, label="paper, .75")
    axes.set(ylim=(0, 1.02))


def smooth(values: Sequence[float], width: int = 5) -> np.ndarray:
    """The mean of `width` neighbours, fewer at either end."""
    ones = np.convolve(np.ones(len(values)), np.ones(width), "same")
    return np.convolve(values, np.ones(width), "same") / ones


if __name__ == "__main__":
    if sys.argv[1:]:
        keep(sys.argv[1:])
    else:
        main()
