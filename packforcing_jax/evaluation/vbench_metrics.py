"""VBench's seven metrics of ordinary videos and the windows of CLIP score: files they read, videos they can judge.

Facts of vbench 0.1.5, found by running it with files missing, pictures too small and videos too short (docs/vbench.md).
"""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from packforcing_jax.errors import require

RAFT_SIDE = 121  # pixels: padded to a multiple of 8, and below 128 the flow is not a number, without an error
AMT_SIDE = (
    49  # pixels: padded to a multiple of 16, and below 64 the coarsest of four levels is empty
)
STAND_INS = "STAND_INS"  # a file in VBench's cache that says that its weights are random
NO_LONG = (
    "VBench-Long cannot be run: it reads configs/*.yaml and a table of its folder vbench2_beta_long, which the package "
    "vbench does not contain; use --protocol whole, or run its own repository by hand."
)


# Weights


@dataclasses.dataclass(frozen=True)
class Weight:
    """A file that official code reads, or a folder with `members`.

    `places` start with `vbench/`, `torch/` or `clip/` (see `Caches`); one of them is enough. `size` in bytes is about
    that of the published file. `sha256`: how that file's hash begins, where it is known. `origin`: who published it.
    """

    places: tuple[str, ...]
    size: int
    origin: str
    members: tuple[str, ...] = ()
    sha256: str = ""

    @property
    def name(self) -> str:
        return Path(self.places[0]).name

    @property
    def least(self) -> int:
        """Fewer bytes than this are a file that was cut off."""
        return 0 if self.members else self.size - max(self.size // 50, 1000)


DINO = Weight(
    (
        "torch/hub/checkpoints/dino_vitbase16_pretrain.pth",
        "vbench/dino_model/dino_vitbase16_pretrain.pth",
    ),
    343_249_363,
    "facebookresearch/dino",
)
DINO_CODE = Weight(
    ("vbench/dino_model/facebookresearch_dino_main",),
    45_000,
    "facebookresearch/dino, commit 7c446df",
    ("hubconf.py", "vision_transformer.py", "utils.py"),
)
CLIP_B = Weight(
    ("vbench/clip_model/ViT-B-32.pt",),
    353_679_721,
    "openai/CLIP",
    sha256="40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
)
CLIP_L = Weight(
    ("vbench/clip_model/ViT-L-14.pt",),
    932_408_861,
    "openai/CLIP",
    sha256="b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
)
HEAD = Weight(
    ("vbench/aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth",),
    4_000,
    "LAION-AI/aesthetic-predictor",
)
MUSIQ = Weight(
    ("vbench/pyiqa_model/musiq_spaq_ckpt-358bb6af.pth",),
    108_610_541,
    "chaofengc/IQA-PyTorch, v0.1-weights",
    sha256="358bb6af",
)
RAFT = Weight(
    ("vbench/raft_model/models/raft-things.pth",), 21_096_425, "princeton-vl/RAFT, models.zip"
)
AMT = Weight(("vbench/amt_model/amt-s.pth",), 12_020_000, "lalala125/AMT")
VICLIP = Weight(
    ("vbench/ViCLIP/ViClip-InternVid-10M-FLT.pth",),
    1_710_545_750,
    "OpenGVLab/VBench_Used_Models",
)
WORDS = Weight(
    ("vbench/ViCLIP/bpe_simple_vocab_16e6.txt.gz", "clip/bpe_simple_vocab_16e6.txt.gz"),
    1_356_917,
    "the package openai-clip",
)


class Caches(NamedTuple):
    """VBench's cache, torch's, and the folder of the package `clip` in VBench's environment."""

    vbench: Path
    torch: Path
    clip: Path

    def path(self, place: str) -> Path:
        """A place of a weight on this disk."""
        cache, _, rest = place.partition("/")
        return {"vbench": self.vbench, "torch": self.torch, "clip": self.clip}[cache] / rest

    def found(self, weight: Weight) -> Path | None:
        """Where a weight lies whole, or None."""
        places = map(self.path, weight.places)
        return next((path for path in places if problem(weight, path) is None), None)

    def broken(self, weight: Weight) -> bool:
        """Whether something lies at a place of a weight that is not whole."""
        return self.found(weight) is None and any(self.path(x).exists() for x in weight.places)

    def variables(self) -> dict[str, str]:
        """The variables by which VBench and torch find their caches."""
        return {"VBENCH_CACHE_DIR": str(self.vbench), "TORCH_HOME": str(self.torch)}

    @property
    def stand_ins(self) -> bool:
        """Whether VBench's cache is marked as holding random weights."""
        return (self.vbench / STAND_INS).exists()


def problem(weight: Weight, path: Path) -> str | None:
    """What is wrong with a weight at a place: it is absent, incomplete or cut off; None if nothing is seen."""
    if weight.members:
        lacking = [name for name in weight.members if not (path / name).is_file()]
        whole = len(lacking) == len(weight.members)
        return None if not lacking else "is missing" if whole else f"lacks {', '.join(lacking)}"
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    return f"is cut off at {size:,} bytes" if size < weight.least else None


# Metrics


class Film(NamedTuple):
    """What VBench's own readers say of a video."""

    frames: int
    width: int
    height: int
    fps: float


@dataclasses.dataclass(frozen=True)
class Metric:
    """A metric of the official code: `weights` it reads, `frames` and `side` (pixels of the shorter side) that a video
    needs at least, whether it reads a prompt.

    Of a pair-wise metric a data set's value counts pairs of frames, not videos (`by_pair`); `scale` divides it.
    """

    what: str
    unit: str
    weights: tuple[Weight, ...]
    frames: int = 1
    side: int = 1
    text: bool = False
    by_pair: bool = False
    scale: float = 1.0


METRICS: Mapping[str, Metric] = {
    "subject_consistency": Metric(
        "DINO similarity of each frame to the one before and to the first",
        "similarity, 0 to 1",
        (DINO, DINO_CODE),
        frames=2,
        by_pair=True,
    ),
    "background_consistency": Metric(
        "CLIP similarity of each frame to the one before and to the first",
        "similarity, 0 to 1",
        (CLIP_B,),
        frames=2,
        by_pair=True,
    ),
    "motion_smoothness": Metric(
        "1 less the error of AMT's frames between frames",
        "0 to 1",
        (AMT,),
        frames=3,
        side=AMT_SIDE,
    ),
    "dynamic_degree": Metric("whether RAFT sees large motion", "0 or 1", (RAFT,), side=RAFT_SIDE),
    "aesthetic_quality": Metric("LAION's linear head on CLIP", "about 0 to 1", (CLIP_L, HEAD)),
    "imaging_quality": Metric("MUSIQ of each frame", "0 to 100", (MUSIQ,), scale=100.0),
    "overall_consistency": Metric(
        "ViCLIP similarity of eight frames and the prompt", "cosine", (VICLIP, WORDS), text=True
    ),
}
CLIP: Mapping[str, Metric] = {
    "clip": Metric(
        "CLIP similarity of frames and prompt, mean over windows",
        "100 x cosine",
        (CLIP_B,),
        text=True,
    )
}
SUITES: Mapping[str, Mapping[str, Metric]] = {"vbench": METRICS, "clip": CLIP}


def unfit(name: str, metric: Metric, film: Film, text: str | None) -> str | None:
    """Why a metric cannot judge a video, although the official code may return a value; None if it can."""
    if film.frames < metric.frames:
        return f"has {film.frames} frame{'s' * (film.frames != 1)}; {name} needs {metric.frames} at least"
    if min(film.width, film.height) < metric.side:
        size = f"is {film.width}x{film.height} pixels"
        return f"{size}; {name} needs {metric.side} on the shorter side at least"
    if metric.text and not (text or "").strip():
        return f"has no prompt under this rule; {name} reads one: give it in --prompts"
    return _too_few_for_raft(film) if name == "dynamic_degree" else None


def _too_few_for_raft(film: Film) -> str | None:
    """Of two sampled frames no pair has to move, and the official answer is always True."""
    sampled = -(-film.frames // max(1, round(film.fps / 8)))
    if sampled >= 3:
        return None
    count = f"has {film.frames} frame{'s' * (film.frames != 1)} at {film.fps:g} a second"
    return (
        f"{count}, of which dynamic_degree takes {sampled}; it needs 3: with fewer the official answer does not depend "
        "on motion"
    )


def dataset_value(metric: Metric, values: Mapping[str, float], films: Mapping[str, Film]) -> float:
    """The value of several videos as the official code forms it, from the value of each."""
    require(len(values) > 0, "a data set's value needs a video at least.")
    counts = {name: films[name].frames - 1 if metric.by_pair else 1 for name in values}
    total = sum(values[name] * count for name, count in counts.items())
    return total / sum(counts.values()) / metric.scale


def listing(lacking: Iterable[tuple[Weight, Iterable[str]]], caches: Caches) -> list[str]:
    """A line for each weight that is not there whole: file, size, place, what is wrong, which metrics wait for it."""
    return [
        f"{weight.name} ({weight.size:,} bytes, of {weight.origin}) {fault}: "
        f"{caches.path(weight.places[0])}; for {', '.join(metrics)}"
        for weight, metrics in lacking
        for fault in [problem(weight, caches.path(weight.places[0])) or "is missing"]
    ]
