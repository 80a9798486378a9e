"""Keys and values that one video holds, against its length: `memory_by_length.svg`.

    python -m docs.figures.memory_by_length

Every number comes from the closed formulas of `packforcing plan`, for Wan2.1 1.3B at 480x832 in bfloat16 with the
memory profile `published`. A window that slides is Self-Forcing's of 21 latent frames, the current block among them.
"""

import dataclasses

import numpy as np
from matplotlib import pyplot as plt

from docs.figures import style
from packforcing_jax.config import Experiment, loading
from packforcing_jax.plan import formulas
from packforcing_jax.sampling import pipeline

CONFIG, WINDOW = "wan_t2v_1_3b", 21
SECONDS = np.linspace(5, 300, 60)
GB = 1e9


def full_history(exp: Experiment, seconds: float) -> float:
    """Gigabytes if every block were kept at full size."""
    blocks = pipeline.blocks_of(exp, seconds)
    return formulas.bytes_of(exp, blocks, 1)["bytes/every block at full size"] / GB


def packforcing(exp: Experiment) -> tuple[float, float]:
    """Gigabytes of the whole memory, and of what is left on the device if the archive lies on the host."""
    resident = formulas.resident(exp, 1)
    return resident["held/keys and values"] / GB, (
        resident["held/keys and values"] - resident["held/archive"]
    ) / GB


def sliding(exp: Experiment) -> float:
    """Gigabytes of a window of WINDOW frames; its keys stay where they are in time, so nothing is kept un-rotated."""
    cache = dataclasses.replace(
        exp.cache,
        sink=0,
        recent=WINDOW - exp.cache.block,
        top=0,
        capacity=0,
        rope_adjustment="none",
    )
    return formulas.resident(dataclasses.replace(exp, cache=cache), 1)["held/keys and values"] / GB


def main() -> None:
    """Draws the figure."""
    style.use()
    exp = loading.load_experiment(CONFIG)
    whole, device = packforcing(exp)
    lines = [
        ("full history", [full_history(exp, each) for each in SECONDS], style.RED, "-", 0),
        ("PackForcing, with its archive", [whole] * len(SECONDS), style.BLUE, "-", 1),
        (f"sliding window, {WINDOW} frames", [sliding(exp)] * len(SECONDS), style.GREY, "--", 1),
        (
            "PackForcing on the device, archive on the host",
            [device] * len(SECONDS),
            style.BLUE,
            ":",
            -1,
        ),
    ]
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    for name, values, colour, dash, _ in lines:
        axes.plot(SECONDS, values, dash, color=colour, linewidth=2.2, label=name)
    for name, values, colour, _, side in lines:
        axes.annotate(
            f"{name}: {values[-1]:.0f} GB" if values[-1] > 100 else f"{name}: {values[-1]:.1f} GB",
            (SECONDS[-1], values[-1]),
            (-4, 5 * side if side else -14),
            textcoords="offset points",
            ha="right",
            va={0: "top", 1: "bottom", -1: "top"}[side],
            color=colour,
        )
    axes.set(
        yscale="log",
        ylim=(3, 600),
        xlim=(0, 302),
        xlabel="length of the video, seconds",
        ylabel="keys and values held, GB",
    )
    axes.set_title("Memory of one video, Wan2.1 1.3B at 480x832, bfloat16", loc="left")
    axes.set_xticks([5, 30, 60, 120, 180, 240, 300])
    axes.set_yticks([5, 10, 20, 50, 100, 200, 500], [5, 10, 20, 50, 100, 200, 500])
    axes.minorticks_off()
    style.save(figure, __file__)


if __name__ == "__main__":
    main()
