"""The losses of the Stage recipe by step: `training.svg`.

    python -m docs.figures.training

The numbers are those of `docs/training.md`, kept in `training.csv`: means over the 50 steps up to each.
"""

import csv
from pathlib import Path

from matplotlib import pyplot as plt

from docs.figures import style

PANELS = (  # title, (column, name, colour) of each line
    (
        "causal model",
        (
            ("causal", "loss", style.BLUE),
            ("matching", "affinity loss", style.ORANGE),
        ),
    ),
    (
        "what follows it",
        (
            ("teacher", "teacher: loss", style.PURPLE),
            ("critic", "student: critic's loss", style.GREEN),
            ("consistency", "consistency: loss", style.RED),
        ),
    ),
)
FOUND = 1200  # step by which called-back guests are recalled, with both seeds (docs/recall.md)


def read() -> list[dict[str, float | None]]:
    """The rows of the table; None where a stage had ended."""
    lines = Path(__file__).with_suffix(".csv").read_text().splitlines()
    rows = csv.DictReader(line for line in lines if not line.startswith("#"))
    return [{name: float(value) if value else None for name, value in row.items()} for row in rows]


def main() -> None:
    """Draws a panel for the causal model and one for the stages behind it."""
    style.use()
    rows = read()
    figure, grid = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for (title, lines), axes in zip(PANELS, grid, strict=True):
        for column, name, colour in lines:
            points = [(row["step"], row[column]) for row in rows if row[column] is not None]
            axes.plot(*zip(*points, strict=True), "o-", color=colour, markersize=4, label=name)
        axes.set_title(title, loc="left")
        axes.set(xlabel="training step", ylabel="loss, log scale", yscale="log", xlim=(0, None))
        axes.legend()
    grid[0].axvline(FOUND, color=style.GREY, linestyle=":")
    grid[0].annotate(
        "called-back guests\nare recalled from\nabout here on",
        (FOUND, 0.2),
        (8, 0),
        textcoords="offset points",
        color=style.FAINT,
        va="top",
    )
    grid[0].set(
        ylim=(0.012, 0.5), yticks=(0.02, 0.05, 0.1, 0.2), yticklabels=(0.02, 0.05, 0.1, 0.2)
    )
    grid[0].minorticks_off()
    style.save(figure, __file__)


if __name__ == "__main__":
    main()
