"""What the drawn figures share: colours that differ for colour-blind readers too, a white card, files that repeat."""

from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, RED, PURPLE, GREY = (
    "#0072b2",
    "#d98200",
    "#009e73",
    "#c0392b",
    "#8e5ea2",
    "#7a7f87",
)
INK, FAINT, CARD = "#22262c", "#6b7078", "#ffffff"


def use() -> None:
    """Sets matplotlib up; letters become outlines, so that a figure looks the same everywhere."""
    mpl.rcdefaults()
    mpl.use("Agg")
    mpl.rcParams |= {
        "svg.fonttype": "path",
        "svg.hashsalt": "packforcing-jax",  # the same names inside the file each time
        "figure.facecolor": CARD,
        "font.size": 10,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": FAINT,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.titlesize": 10.5,
        "grid.color": "#e6e8eb",
        "xtick.color": INK,
        "ytick.color": INK,
        "legend.frameon": False,
    }


def save(figure: Figure, script: str) -> None:
    """Writes the figure as SVG beside its script, on an opaque card, so that it reads on dark pages too."""
    out = Path(script).with_suffix(".svg")
    # No date in the file: drawn again from the same numbers, it stays the same.
    figure.savefig(out, metadata={"Date": None})
    print(f"{out.name}: {out.stat().st_size} bytes")
