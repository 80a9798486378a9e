"""What a suite of figures is given, and what it gives back: the form that all suites over video files share."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

from packforcing_jax.evaluation.video_files import Prompt, VideoFile

Plain: TypeAlias = "Mapping[str, Plain] | Sequence[Plain] | str | float | int | bool | None"
Watch: TypeAlias = Callable[[Iterable[VideoFile], int, str], Iterable[VideoFile]]
Table: TypeAlias = Mapping[str, Plain]  # as JSON has it
Numbers: TypeAlias = Mapping[str, float | None]  # by figure


@dataclasses.dataclass(frozen=True)
class Options:
    """How videos are measured.

    `window`: seconds of a window; `block`: frames between block borders, found if None; `rule`: which of a video's
    prompts counts, `short` or `extended`; `seed`: of the bootstrap; `watch`: passes work on and shows progress, given
    the number of pieces and what they are called. The others are those of `bridge.Options`.
    """

    window: float = 5.0
    block: int | None = None
    rule: str = "short"
    seed: int = 0
    watch: Watch = lambda work, total, unit: work
    environment: Path | None = None
    metrics: Sequence[str] = ()
    protocol: str = "whole"
    weights_cache: Path | None = None
    allow_network: bool = False
    time_limit: float = 3600.0
    device: str = "cpu"
    rate: float = 2.0


class Meaning(NamedTuple):
    """What a figure says, in which unit, and what is better: `lower`, `higher`, `neither` or `nearer to 0`."""

    unit: str
    better: str
    meaning: str


@dataclasses.dataclass(frozen=True)
class Measured:
    """One video: each figure of the whole, of each window, and where there are such, of its first and last seconds.

    None stands for a figure that is not defined there. `intervals` holds (low, high); `about` what else is known.
    """

    figures: Numbers
    windows: Mapping[str, Sequence[float | None]]
    first: Numbers = dataclasses.field(default_factory=dict)
    last: Numbers = dataclasses.field(default_factory=dict)
    intervals: Mapping[str, Sequence[float] | None] = dataclasses.field(default_factory=dict)
    about: Table = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Results:
    """What a suite found.

    `protocol` is whatever else decides the numbers; `skipped` says in a sentence why a video has none, `lacking` why
    some figures are not there.
    """

    suite: str
    protocol: Table
    figures: Mapping[str, Meaning]
    videos: Mapping[str, Measured]
    skipped: Mapping[str, str]
    lacking: Sequence[str] = ()


class Suite(NamedTuple):
    """A row of the table of suites.

    `check` raises `InputError` before anything is read if something that the suite needs is missing; `flags` names the
    fields of `Options` that it reads; `measure` may keep what it finished in the folder it is given; `defaults` of its
    own for such fields.
    """

    help: str
    flags: frozenset[str]
    check: Callable[[Options], None]
    measure: Callable[
        [Sequence[VideoFile], Mapping[str, Prompt], Options, Path],
        Results,
    ]
    defaults: Mapping[str, float] = {}
