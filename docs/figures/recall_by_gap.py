"""Which score brings a called-back guest's mark back, by how long ago it was shown: `recall_by_gap.svg`.

    python -m docs.figures.recall_by_gap

The numbers are those of `docs/recall.md`, kept in `recall_by_gap.csv`, which holds all ways of choosing and, beside
the mark, whether the block was among those recalled.
"""

import csv
from pathlib import Path

from matplotlib import pyplot as plt

from docs.figures import style

MEASURE, CHANCE = "mark drawn", 1 / 16  # there are 16 marks
MODELS = {  # name in the table: name in the legend, colour, shift along the axis
    "seed 0": ("seed 0, the recipe", style.BLUE, -1.8),
    "seed 1": ("seed 1, the recipe", style.GREEN, -0.6),
    "seed 2": ("seed 2", style.ORANGE, 0.6),
    "shipped": ("shipped weights", style.PURPLE, 1.8),
}
WAYS = {  # name in the table: title
    "affinity": "affinity (default)",
    "mass_sum": "mass_sum",
    "mass_max": "mass_max",
    "centred_logit_max": "centred_logit_max",
    "logit_max": "logit_max",
    "log_sum_exp": "log_sum_exp",
    "paper_sum": "paper_sum (bilinear form)",
    "all-true": "no choice: all 109 attended",
    "random": "random",
    "recency": "recency",
}


def read() -> dict[tuple[str, str], list[tuple[int, float, float, float]]]:
    """(gap, value, low, high) in order, by way and model."""
    lines = Path(__file__).with_suffix(".csv").read_text().splitlines()
    found: dict[tuple[str, str], list[tuple[int, float, float, float]]] = {}
    for row in csv.DictReader(line for line in lines if not line.startswith("#")):
        if row["measure"] == MEASURE:
            point = int(row["gap"]), *(float(row[name]) for name in ("value", "low", "high"))
            found.setdefault((row["way"], row["model"]), []).append(point)
    return found


def main() -> None:
    """Draws a small plot for each way of choosing."""
    style.use()
    table = read()
    figure, grid = plt.subplots(
        2, 5, figsize=(12, 5.2), sharex=True, sharey=True, layout="constrained"
    )
    for (way, title), axes in zip(WAYS.items(), grid.flat, strict=True):
        axes.axhline(CHANCE, color=style.INK, linestyle=":", linewidth=1, label="chance (1 in 16)")
        for model, (name, colour, shift) in MODELS.items():
            gaps, values, lows, highs = zip(*table[way, model], strict=True)
            errors = (
                [value - low for value, low in zip(values, lows, strict=True)],
                [high - value for value, high in zip(values, highs, strict=True)],
            )
            # Shifted a little, so that intervals do not hide each other.
            axes.errorbar(
                [gap + shift for gap in gaps],
                values,
                errors,
                color=colour,
                marker="o",
                markersize=3.5,
                linewidth=1.3,
                elinewidth=1,
                label=name,
            )
        axes.set_title(title, loc="left")
        axes.set(ylim=(-0.03, 1.05), xticks=(8, 32, 64, 110))
    figure.supxlabel("gap: blocks between the guest's only visit and its call", fontsize=10)
    figure.supylabel("share of calls whose mark is drawn again", fontsize=10)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=5)
    style.save(figure, __file__)


if __name__ == "__main__":
    main()
