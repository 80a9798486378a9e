"""`docs/evidence.md` from stored results: each claim with its criterion, figure, interval and verdict.

    python -m benchmarks.evidence

Nothing is measured here. Results lie in `docs/evidence/`; the page names the commands that make them. Prints which
figures moved against those of the page as it was.
"""

import csv
import json
import re
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import ablations
from packforcing_jax.io import atomic
from packforcing_jax.stage import metrics

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "evidence.md"
COMPARED = ROOT / "docs" / "evidence" / "compare_stage.json"
ATTENTION = ROOT / "docs" / "figures" / "attention.json"
RECALL = ROOT / "docs" / "figures" / "recall_by_gap.csv"
KILLS = ROOT / "docs" / "figures" / "kill_and_continue.jsonl"
LIVE = ROOT / "docs" / "evidence" / "live.json"
SHOWN, CONTRADICTED, OVERLAP, ABSENT = "shown", "contradicted", "not shown", "not shown"
FAR = 16  # blocks: gaps from here on are far
LOWER = ("motion jumps", "hue drift", "gain drift")  # better, the lower
HIGHER = (
    "valid",
    "text mean",
    "kept mark",
    "kept poster",
    "motion pace",
    "motion dynamic",
    "recall guest",
    "recall scene",
)  # better, the higher


class Interval(NamedTuple):
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        digits = 1 if abs(self.value) >= 2 else 3
        return f"{self.value:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


class Finding(NamedTuple):
    """What stored results say of a claim: a verdict, the figures, and what has to be said beside them."""

    verdict: str
    figure: str
    note: str = ""


@dataclass(frozen=True)
class Claim:
    """A sentence that results may bear out: whose it is, what would count, and how the results decide."""

    key: str
    says: str
    source: str
    criterion: str
    find: Callable[[], Finding]


# Stored results


def arm(name: str, model: str = "stage_student") -> Mapping[str, Any]:
    """What the oracle read in the videos of an ablation's arm."""
    return json.loads(ablations.path_of(model, name).read_text())["report"]


def has(model: str, *names: str) -> bool:
    """Whether these arms of a model are stored."""
    return all(ablations.path_of(model, name).exists() for name in names)


def last(report: Mapping[str, Any], figure: str, part: str = "last") -> Interval:
    """A figure of the last window, or of the first."""
    return Interval(*report["windows"][figure][part])


def recalled(report: Mapping[str, Any], kind: str, least: int = FAR) -> Interval:
    """The share of visits at gaps of `least` blocks or more whose mark is that of the first visit."""
    right = count = 0
    for name, row in report["whole"].items():
        start = f"recall {kind}, gap "
        if name.startswith(start) and int(name[len(start) :].rstrip("+").split("-")[0]) >= least:
            right += round(row["value"][0] * row["n"])
            count += row["n"]
    return Interval(*metrics.wilson(right, count))


# Verdicts


def against(
    ours: Interval, other: Interval, names: Sequence[str], *, lower: bool = False
) -> Finding:
    """Whether ours is better by intervals that do not meet."""
    better, worse = ours.low > other.high, ours.high < other.low
    if lower:
        better, worse = worse, better
    figure = f"{names[0]} {ours}, {names[1]} {other}"
    if better:
        return Finding(SHOWN, figure)
    return (
        Finding(CONTRADICTED, figure) if worse else Finding(OVERLAP, figure, "Intervals overlap.")
    )


def between(
    figure: str, other: str, *, ours: str = ablations.AS_TRAINED, note: str = ""
) -> Callable[[], Finding]:
    """A figure of one arm against another's: the verdict is that of the model that ships; what others say is told."""

    def on(model: str) -> Finding:
        read = _reader(figure)
        own, theirs = (read(arm(name, model)) for name in (ours, other))
        return against(own, theirs, (ours, other), lower=figure in LOWER)

    def find() -> Finding:
        shipped, *others = (model for model in ablations.MODELS if has(model, ours, other))
        found = on(shipped)
        told = [
            f"`{model}`: {verdict}, {said}." for model in others for verdict, said, _ in [on(model)]
        ]
        return found._replace(note=" ".join(filter(None, (found.note, note, *told))))

    return find


def _reader(figure: str) -> Callable[[Mapping[str, Any]], Interval]:
    if figure.startswith("recall "):
        return lambda report: recalled(report, figure.removeprefix("recall "))
    return lambda report: last(report, figure)


def unreachable(why: str) -> Callable[[], Finding]:
    """A claim for which there is no result."""
    return lambda: Finding(ABSENT, "-", why)


def flat(figure: str, within: float) -> Callable[[], Finding]:
    """The last of 24 training clips against the first: no worse than by `within`."""

    def find() -> Finding:
        report = arm(ablations.AS_TRAINED)
        first, end = last(report, figure, "first"), last(report, figure)
        verdict = SHOWN if end.low >= first.value - within else OVERLAP
        return Finding(verdict, f"first window {first}, last {end}")

    return find


def chosen_by(way: str, measure: str, gap: int) -> list[Interval]:
    """Recall behind true histories by a way of choosing: of each of the four models."""
    lines = [line for line in RECALL.read_text().splitlines() if not line.startswith("#")]
    return [
        Interval(*(float(row[name]) for name in ("value", "low", "high")))
        for row in csv.DictReader(lines)
        if (row["way"], row["measure"], int(row["gap"])) == (way, measure, gap)
    ]


def affinity_recalls() -> Finding:
    """On how many models affinity recalls, and FIFO does not."""
    ours, fifo = (chosen_by(way, "mark drawn", 110) for way in ("affinity", "recency"))
    wins = sum(one.low > other.high for one, other in zip(ours, fifo, strict=True))
    worst = min(ours, key=lambda one: one.value)
    best = max(fifo, key=lambda one: one.value)
    figure = f"{wins} of {len(ours)} models; affinity at least {worst}, FIFO at most {best}"
    return Finding(SHOWN if wins == len(ours) else OVERLAP, figure)


def paper_score() -> Finding:
    """Whether the sum over queries and keys loses a call-back on every model."""
    ours, theirs = (chosen_by(way, "mark drawn", 110) for way in ("affinity", "paper_sum"))
    losses = sum(one.low > other.high for one, other in zip(ours, theirs, strict=True))
    found = ", ".join(str(each) for each in theirs)
    return Finding(
        SHOWN if losses == len(ours) else OVERLAP,
        f"affinity is better on {losses} of {len(ours)} models; the sum: {found}",
        "All four were trained with a loss on affinity, so the sentence is about these models. The same with none, or "
        "with a loss on the paper's score, was not trained.",
    )


def kills() -> Finding:
    """Runs that were killed and went on."""
    runs = [json.loads(line) for line in KILLS.read_text().splitlines()[1:]]
    hit = [run for run in runs if run.get("missed") is False]
    wrong = sum(bool(run["differing"] or run["left"]) for run in hit)
    return Finding(
        SHOWN if hit and not wrong else CONTRADICTED,
        f"{wrong} of {len(hit)} ends differ or leave something behind",
    )


def attended() -> Mapping[str, Any]:
    """Figures of the attention study, mean over layers, of the model that ships."""
    return json.loads(ATTENTION.read_text())["stage_student"]["sections"][
        "affinity, mean over layers"
    ]


def importance() -> Finding:
    """How evenly attention lies on all packed blocks of a long history."""
    rows = attended()
    even = Interval(*rows["packed blocks: entropy / log n, true distances"]["value"])
    mean = Interval(*rows["packed blocks: min-max mean, true distances"]["value"])
    return Finding(
        SHOWN if even.low >= 0.95 else OVERLAP,
        f"entropy over log n {even}; min-max mean {mean}",
        "The paper's mean of .499 is not reached; it says nothing of order, and a random network has .47.",
    )


def turnover() -> Finding:
    """How much of a choice of packed blocks is new from one block to the next."""
    row = attended()["Jaccard distance, late blocks"]
    found, chance = Interval(*row["value"]), row["chance"]
    return Finding(
        SHOWN if found.low >= 0.75 else CONTRADICTED,
        f"Jaccard distance {found}, of random choices {chance:.2f}",
        "Choices are far steadier than chance on Stage, whose guests stay for blocks.",
    )


def live_latency() -> Finding:
    """How soon a new prompt is seen, as it is played."""
    found = json.loads(LIVE.read_text())["prompt"]["pace 1"]
    soon = found["worst_s"] <= 2 * found["block_worst_s"]
    return Finding(
        SHOWN if soon else CONTRADICTED,
        f"median {found['median_s']:.3f} s, worst {found['worst_s']:.3f} s of {found['count']}; a block is played in "
        f"{found['block_median_s']:.2f} s",
    )


def live_kills() -> Finding:
    """What a server that was killed finds again."""
    found = json.loads(LIVE.read_text())["kill"]
    wrong = len(found["broken"]) + found["seen_blocks_lost"]
    return Finding(
        SHOWN if not wrong else CONTRADICTED,
        f"{wrong} faults in {sum(found['blocks'])} blocks of {found['sessions']} sessions after {found['kills']} kills",
    )


def live_bounds() -> Finding:
    """What slow, talkative and many clients cost the others and the server."""
    found = json.loads(LIVE.read_text())["hold"]
    rates = found["rates"]
    least = min(rates.values()) / rates["alone"]
    grown = found["memory_after_mb"] - found["memory_before_mb"]
    return Finding(
        SHOWN if least >= 0.9 else CONTRADICTED,
        f"another client's blocks a second: {least:.1%} of those alone, at least; memory + {grown:.0f} MB",
    )


CLAIMS = (
    Claim(
        "length",
        "Quality holds over 24 times the training clip.",
        "paper 4.4",
        "valid frames of the last window of 20 frames, lower end, within 2 points of the first window",
        flat("valid", 0.02),
    ),
    Claim(
        "packed",
        "What only packed memory can know comes back.",
        "paper 3.2",
        f"marks of guests called back after {FAR} blocks or more, with and without packed memory",
        between("recall guest", "no packed memory"),
    ),
    Claim(
        "scene",
        "So does a scene.",
        "paper 3.2",
        f"posters of scenes called back after {FAR} blocks or more",
        between("recall scene", "no packed memory"),
    ),
    Claim(
        "fifo",
        "Selection by affinity recalls more than FIFO.",
        "paper table 5",
        f"guests called back after {FAR} blocks or more, running freely",
        between("recall guest", "FIFO"),
    ),
    Claim(
        "random",
        "Selection by affinity recalls more than random selection.",
        "paper table 5",
        "the same",
        between("recall guest", "random"),
    ),
    Claim(
        "four models",
        "It does so behind true histories, at a gap of 110 blocks, on every model.",
        "ours",
        "96 calls a model, four models",
        affinity_recalls,
    ),
    Claim(
        "sum",
        "The sum over queries and keys, the bilinear form of the paper's score, loses call-backs.",
        "ours",
        "the same histories",
        paper_score,
    ),
    Claim(
        "paper's score",
        "The paper's score as stated recalls less than affinity, running freely.",
        "ours",
        f"guests called back after {FAR} blocks or more",
        between(
            "recall guest",
            "paper's score",
            note="The model was trained with a loss on affinity.",
        ),
    ),
    Claim(
        "sink",
        "Sink blocks keep the subject what it was.",
        "paper table 3",
        "the subject's mark in the last window, sink of 8 frames and none",
        between("kept mark", "sink 0"),
    ),
    Claim(
        "sink hue",
        "Sink blocks keep a continuous hidden attribute from drifting.",
        "paper table 3",
        "hue drift in the last window, sink of 8 frames and none",
        between("hue drift", "sink 0"),
    ),
    Claim(
        "large sink",
        "A sink of 16 frames takes motion away.",
        "paper table 3",
        "pace of the text in the last window, sink of 8 frames and of 16",
        between("motion pace", "sink 16"),
    ),
    Claim(
        "rope valid",
        "RoPE adjustment keeps frames valid.",
        "paper 3.4",
        "valid frames in the last window, adjustment on and off",
        between("valid", "RoPE adjustment off"),
    ),
    Claim(
        "rope jumps",
        "RoPE adjustment prevents jumps.",
        "paper 3.4",
        "steps over more than one lane in the last window, on and off",
        between(
            "motion jumps",
            "RoPE adjustment off",
            note="All models saw jittered positions in training; one without was not trained.",
        ),
    ),
    Claim(
        "rope recall",
        "RoPE adjustment keeps packed blocks within reach.",
        "paper 3.4",
        f"guests called back after {FAR} blocks or more, on and off",
        between("recall guest", "RoPE adjustment off"),
    ),
    Claim(
        "branches",
        "Both branches together are better than the high-resolution one alone.",
        "paper table 5",
        "valid frames in the last window",
        between(
            "valid",
            "high-resolution branch alone",
            note="The codec is exact and frames are 32x32, which leaves the other branch little to add.",
        ),
    ),
    Claim(
        "branches recall",
        "Both branches together recall more than the low-resolution one alone.",
        "paper table 5",
        f"guests called back after {FAR} blocks or more",
        between(
            "recall guest",
            "low-resolution branch alone",
            note="The model was trained with both; one trained with the low-resolution branch alone may do better.",
        ),
    ),
    Claim(
        "one block",
        "One selected block gives fewer jumps than sixteen.",
        "the public reproduction",
        "steps over more than one lane in the last window, top 1 and top 16",
        between("motion jumps", ablations.AS_TRAINED, ours="top 1"),
    ),
    Claim(
        "top",
        "Sixteen selected blocks recall more than four.",
        "ours",
        f"guests called back after {FAR} blocks or more",
        between("recall guest", "top 4"),
    ),
    Claim(
        "span",
        "Without selection, packed blocks have to be squeezed into a trained span.",
        "ours",
        "valid frames in the last window, all attended, span fitted and true",
        between("valid", "all attended", ours="all attended, span fitted"),
    ),
    Claim(
        "importance",
        "Late in a video, old blocks are attended to about as much as new ones.",
        "paper figure 3c",
        "entropy of the attention on all packed blocks over that of flat attention, at least .95",
        importance,
    ),
    Claim(
        "turnover",
        "Consecutive choices of packed blocks differ by a Jaccard distance of .75.",
        "paper figure 3d",
        "late blocks, at least .75",
        turnover,
    ),
    Claim(
        "kills",
        "A killed run goes on bit for bit.",
        "ours",
        "50 `kill -9` over four verbs",
        kills,
    ),
    Claim(
        "live latency",
        "A new prompt is seen after the block in progress and one more.",
        "ours",
        "a prompt's arrival to its first frame, worst, within two blocks",
        live_latency,
    ),
    Claim(
        "live kills",
        "A server that is killed finds its sessions again and goes on bit for bit.",
        "ours",
        "blocks that differ from unbroken runs, or were seen and are gone",
        live_kills,
    ),
    Claim(
        "live bounds",
        "A client that reads nothing, 10,000 messages or 50 clients do not slow others.",
        "ours",
        "another client's blocks a second, within 10 % of those alone",
        live_bounds,
    ),
    Claim(
        "tables",
        "The figures of the paper's tables 1 and 2.",
        "paper 5",
        "VBench and CLIP windows of 128 prompts, 60 and 120 s",
        unreachable(
            "No weights are public. The comparison is planned and runs at toy size (docs/evaluation.md)."
        ),
    ),
    Claim(
        "speed",
        "Speed on a GPU.",
        "paper 5",
        "seconds a block on an H200",
        unreachable(
            "Everything was run on CPUs; the block step was compiled for an H200, not run."
        ),
    ),
    Claim(
        "real video",
        "Packed memory helps in real video.",
        "paper 5",
        "any of the above with weights of the Wan2.1 family",
        unreachable("No compressor of that family is trained, here or in public."),
    ),
)


# The page


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(str(cell) for cell in line) + " |" for line in lines]


def claims(found: Mapping[str, Finding]) -> list[str]:
    """All claims with their verdicts."""
    rows = []
    for each in CLAIMS:
        verdict, figure, note = found[each.key]
        rows.append(
            (each.says, each.source, each.criterion, figure, f"**{verdict}**. {note}".strip())
        )
    return table(("claim", "whose", "criterion", "figure", "verdict"), rows)


COLUMNS = (
    "valid",
    "text mean",
    "kept mark",
    "kept poster",
    "motion pace",
    "motion jumps",
    "hue drift",
)


def ablation_table(model: str) -> list[str]:
    """The arms of a model that are stored; `=` where an interval meets that of the model as it was trained."""
    base = arm(ablations.AS_TRAINED, model)
    rows = []
    for name in ablations.ARMS:
        if not has(model, name):
            continue
        report = arm(name, model)
        cells = [_cell(last(report, column), last(base, column)) for column in COLUMNS]
        cells += [
            _cell(recalled(report, kind), recalled(base, kind)) for kind in ("guest", "scene")
        ]
        rows.append((name, report["videos"], *cells))
    far = [f"recall of a {kind}, {FAR} blocks or more" for kind in ("guest", "scene")]
    return table(("at read", "videos", *COLUMNS, *far), rows)


def _cell(own: Interval, base: Interval) -> str:
    meets = own != base and own.low <= base.high and base.low <= own.high
    return f"{own}{' =' if meets else ''}"


def model_table() -> list[str]:
    """The models that ship, side by side: first and last window, and call-backs."""
    reports = stored(ablations.AS_TRAINED)
    shipped = arm(ablations.AS_TRAINED)
    rows: list[Sequence[object]] = [
        (
            name,
            f"{each['chance']:.2f}",
            *(
                f"{last(report, name, 'first')} / {last(report, name)}"
                for report in reports.values()
            ),
        )
        for name, each in shipped["windows"].items()
    ]
    for name in ("first-mark entropy", "distinct guest marks"):
        row = shipped["whole"][name]
        values = (Interval(*report["whole"][name]["value"]) for report in reports.values())
        rows.append((name, f"{row['chance']:.2f}", *values))
    for kind in ("guest", "scene"):
        values = (recalled(report, kind, 0) for report in reports.values())
        rows.append((f"recall of a {kind}, any gap", f"{1 / 16:.2f}", *values))
    rows.append(("videos", "", *(report["videos"] for report in reports.values())))
    return table(("figure, first / last window", "chance", *reports), rows)


def against_others() -> str:
    """The model that ships beside the others: in how many figures of the last window, and of recall, it is better."""
    ours, *others = stored(ablations.AS_TRAINED).items()
    told = []
    for name, report in others:
        names = {"better": [], "within intervals": [], "worse": []}
        for figure in (*HIGHER, *LOWER):
            read = _reader(figure)
            found = against(read(ours[1]), read(report), ("", ""), lower=figure in LOWER)
            kind = {SHOWN: "better", OVERLAP: "within intervals", CONTRADICTED: "worse"}
            names[kind[found.verdict]].append(figure)
        counts = [
            f"{kind} in {len(listed)}" + f" ({', '.join(listed)})" * (0 < len(listed) < 5)
            for kind, listed in names.items()
        ]
        told.append(f"against `{name}` {', '.join(counts)}")
    return "; ".join(told)


def stored(name: str) -> dict[str, Mapping[str, Any]]:
    """An arm's reports, of the models of which it is stored."""
    return {model: arm(name, model) for model in ablations.MODELS if has(model, name)}


def gap_table() -> list[str]:
    """Call-backs by gap: of each model as it was trained, and without packed memory."""
    arms = {
        f"{model}, {name}": report
        for name in (ablations.AS_TRAINED, "no packed memory")
        for model, report in stored(name).items()
    }
    rows = [
        (name, *(_counted(report["whole"].get(name)) for report in arms.values()))
        for name in arm(ablations.AS_TRAINED)["whole"]
        if name.startswith("recall ")
    ]
    return table(("gap in blocks", *arms), rows)


def _counted(row: Mapping[str, Any] | None) -> str:
    return "-" if row is None else f"{Interval(*row['value'])} of {row['n']}"


def compared() -> list[str]:
    """The comparison of all methods, if it is stored."""
    if not COMPARED.exists():
        return ["Not stored."]
    found = json.loads(COMPARED.read_text())
    names = [*found["protocol"]["figures"]]
    rows = []
    for name, each in found["arms"].items():
        figures = [each["figures"].get(figure) for figure in names]
        cells = [_averaged(one) for one in figures]
        frames = "-".join(map(str, each["frames"]))
        rows.append((name, "yes" if each["trained for"] else "no", frames, *cells))
    return table(("method", "trained for it", "frames", *names), rows)


def _averaged(one: Mapping[str, Any] | None) -> str:
    """A mean over videos; without an interval where there is one value."""
    if one is None or one["mean"] is None:
        return "-"
    mean, low, high = (one[part] for part in ("mean", "low", "high"))
    return f"{mean:.3f}" if low is None else str(Interval(mean, low, high))


def page(found: Mapping[str, Finding]) -> str:
    """The whole page."""
    counts = {
        verdict: sum(each.verdict == verdict for each in found.values())
        for verdict in dict.fromkeys((SHOWN, OVERLAP, CONTRADICTED))
    }
    told = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    student = arm(ablations.AS_TRAINED)
    parts = [
        "# Evidence",
        f"Rebuilt from stored results by `make evidence` (`benchmarks/evidence.py`). {len(CLAIMS)} claims: {told}. "
        "*Not shown* says that no result bears a claim out: intervals overlap, or nothing was measured. Brackets hold "
        "95 % intervals. Two virtual CPUs (AMD EPYC), Python 3.11.7, jax 0.10.2, 2026-11-29.",
        *_block(claims(found)),
        "## Ablations that need no training",
        "`python -m benchmarks.ablations`: one setting changed at read, the same stories and noise in all arms, 120 "
        f"blocks (24 training clips), figures of the last window. The model that ships, seed {1_000_003}. `=`: the "
        "interval meets that of the model as it was trained. The memory keeps whole blocks of 4 frames behind a sink, "
        "so a sink of 2 frames is shown without packed memory alone.",
        *_block(ablation_table("stage_student")),
        *_more_ablations(),
        "## The models that ship",
        "`packforcing evaluate --mode rollout --videos 256 --weights packforcing_jax/weights/MODEL`, the same stories. "
        "`stage_student` (four steps) is what every command takes unless told: it needs a quarter of the steps. "
        "`stage_recipe` (sixteen steps) is what it was distilled from, and a start for training. `stage` (sixteen "
        "steps) was trained while the recipe was found; it follows the word for speed best and forgets posters.",
        f"By {len(HIGHER) + len(LOWER)} figures of the last window and of call-backs after {FAR} blocks or more, the "
        f"model that ships is {against_others()}.",
        *_block(model_table()),
        "## Call-backs by gap",
        "The same videos: the share of visits on which a guest wears the mark, or a scene the poster, of the first "
        "visit; a gap is the number of blocks of 4 frames since the last one. Chance is 1 in 16.",
        *_block(gap_table()),
        "## All methods on Stage",
        "`packforcing compare examples/compare_stage.json`: 32 seeds, 240 frames, figures of the last window, the "
        "model that ships; 36 minutes on one core beside other work. **The weights were made for `packforcing` "
        "alone**, so this compares memories under weights that fit one of them.",
        *_block(compared()),
    ]
    assert student["frames"] == 4 * ablations.BLOCKS
    return "\n\n".join(map(wrapped, parts)) + "\n"


def wrapped(paragraph: str) -> str:
    """A paragraph in short lines, whose code spans stay whole; tables as they are."""
    if paragraph.startswith("|"):
        return paragraph
    held = re.sub(r"`[^`]*`", lambda span: span[0].replace(" ", "\0"), paragraph)
    lines = textwrap.wrap(held, 118, break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines).replace("\0", " ")


def _block(lines: Sequence[str]) -> list[str]:
    return ["\n".join(lines)]


def _more_ablations() -> list[str]:
    """The same of the other models, as far as it is stored."""
    return [
        part
        for model in ablations.MODELS[1:]
        if sum(has(model, name) for name in ablations.ARMS) > 1
        for part in (f"`{model}`:", *_block(ablation_table(model)))
    ]


def figures_of(text: str) -> dict[str, dict[str, str]]:
    """The figures of a page: by row (its section and first cell), by column."""
    found: dict[str, dict[str, str]] = {}
    section, head = "Evidence", []
    for line in text.splitlines():
        if line.startswith("## ") or line.endswith("`:"):
            section, head = line.strip("# `:"), []
        elif line.startswith("| "):
            cells = [cell.strip() for cell in line.strip("|").split(" | ")]
            if not head:
                head = cells
            elif not set(cells[0]) <= {"-"}:
                found[f"{section}: {cells[0]}"] = dict(zip(head[1:], cells[1:], strict=True))
    return found


def moved(before: str, now: str) -> list[str]:
    """A line for each figure of a page that is another one than before, is new, or is gone."""
    old, new = figures_of(before), figures_of(now)
    return [
        f"{row}, {column}: {old.get(row, {}).get(column, 'new')} -> {new.get(row, {}).get(column, 'gone')}"
        for row in dict.fromkeys([*old, *new])
        for column in dict.fromkeys([*old.get(row, {}), *new.get(row, {})])
        if old.get(row, {}).get(column) != new.get(row, {}).get(column)
    ]


def main() -> None:
    """Writes the page and prints what moved."""
    before = PAGE.read_text() if PAGE.exists() else ""
    now = page({each.key: each.find() for each in CLAIMS})
    atomic.write(PAGE, now.encode())
    lines = moved(before, now)
    print("\n".join(lines) if lines else "evidence: no figure moved")
    count = sum(map(len, figures_of(now).values()))
    print(
        f"evidence: {PAGE.relative_to(ROOT)}, {len(lines)} of {count} figures moved",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
