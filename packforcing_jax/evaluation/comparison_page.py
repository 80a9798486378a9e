"""One page of a comparison: tables with intervals, curves, contact sheets, and any two videos side by side."""

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from packforcing_jax.evaluation import comparison as comparing
from packforcing_jax.evaluation.comparison import Comparison, Job
from packforcing_jax.evaluation.results import markdown_table, shown
from packforcing_jax.io import atomic, video

COLUMNS, TALLEST = 12, 96  # frames of a row of a sheet; pixels of one
WIDTH, HEIGHT, MARGIN = 420, 160, 34  # of a curve
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#222222", "#999933")
DASHES = ("", "6 3", "2 2")
PUBLISHED = "published"
SHEETS = 4  # contact sheets on a page, of the first videos
LABEL = 14  # pixels above a row of a sheet
ARROWS = {"higher": "↑", "lower": "↓", "nearer to 0": "→ 0", "neither": ""}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; font-size: 13px } td, th { padding: .2rem .6rem; text-align: right }
th:first-child, td:first-child { text-align: left } tr:nth-child(even) { background: #f4f4f4 }
.wide { overflow-x: auto } img, video { max-width: 100%; image-rendering: pixelated }
.two { display: flex; gap: 1rem } .two > div { flex: 1 }
.two video { display: block } figure { margin: 1rem 0 } svg { margin: .5rem 1rem .5rem 0 }
small { color: #666 }
"""
PLAYER = """
const pick = [...document.querySelectorAll('.two select')], shown = [...document.querySelectorAll('.two video')];
const seed = document.querySelector('#video');
const show = () => shown.forEach((v, i) => { v.src = 'videos/' + pick[i].value + '/' + seed.value + '.mp4' });
[...pick, seed].forEach(x => x.addEventListener('change', show));
document.querySelector('#play').addEventListener('click', () => shown.forEach(v => { v.currentTime = 0; v.play() }));
show();
"""

Results = Mapping[str, Any]


def write(comparison: Comparison, out: Path) -> Path:
    """`results.json`, `results.md`, the sheets and `index.html` of a comparison whose videos are all finished."""
    found = comparing.results(comparison, out)
    atomic.write(out / "results.json", (json.dumps(found, indent=1) + "\n").encode())
    atomic.write(out / "results.md", markdown(found).encode())
    sheets = [sheet(comparison, job, out) for job in _of_one_arm(comparison)[:SHEETS]]
    page = out / "index.html"
    atomic.write(page, document(comparison, found, sheets).encode())
    return page


def _of_one_arm(comparison: Comparison) -> list[Job]:
    first = comparison.arms[0]
    return [job for job in comparing.jobs(comparison) if job.arm == first]


# Tables


def rows(found: Results) -> list[list[str]]:
    """Heading and one row per arm: what the weights were trained for, and each figure beside the published one."""
    units = found["protocol"]["figures"]
    told = told_of(found, "figures")
    names = [*units, *(name for name in told if name not in units)]
    heads = ["arm", "trained for it", "frames"]
    for name in names:
        heads += [f"{name} {ARROWS[units[name]['better']]}".strip()] if name in units else []
        heads += [f"{name}, {PUBLISHED}"] if name in told else []
    lines = [heads]
    for name, arm in found["arms"].items():
        theirs = published(found, name).get("figures", {})
        line = [
            name,
            "yes" if arm["trained for"] else "no",
            "-".join(str(count) for count in arm["frames"]),
        ]
        for figure in names:
            line += [spell(arm["figures"].get(figure))] if figure in units else []
            line += [shown(theirs.get(figure))] if figure in told else []
        lines.append(line)
    return lines


def published(found: Results, arm: str) -> Mapping[str, Any]:
    """What another source says of an arm or, where it says nothing of it, of its method."""
    told = found["protocol"]["published"]
    return told.get(arm, told.get(found["arms"][arm]["method"], {}))


def told_of(found: Results, part: str) -> list[str]:
    """The `figures` or `curves` that another source gives of any arm, in its order."""
    every = found["protocol"]["published"].values()
    return list(dict.fromkeys(name for each in every for name in each.get(part, {})))


def windows(found: Results) -> dict[str, list[list[str]]]:
    """Of each figure that another source gives window by window: two rows per arm, ours and theirs."""
    tables = {}
    for name in told_of(found, "curves"):
        lines = []
        for arm, each in found["arms"].items():
            theirs = published(found, arm).get("curves", {}).get(name, [])
            lines.append([arm, "here", *map(shown, each["curves"].get(name, []))])
            lines.append([arm, PUBLISHED, *map(shown, theirs)])
        count = max(map(len, lines))
        padded = [line + ["-"] * (count - len(line)) for line in lines]
        tables[name] = [["arm", "", *(f"window {i}" for i in range(1, count - 1))], *padded]
    return tables


def spell(average: Mapping[str, Any] | None) -> str:
    """A mean with its interval, as `.82 [.79, .85]`; the mean alone where there is one video."""
    if average is None or average["mean"] is None:
        return "-"
    if average["low"] is None:
        return shown(average["mean"])
    return f"{shown(average['mean'])} [{shown(average['low'])}, {shown(average['high'])}]"


def markdown(found: Results) -> str:
    """The tables as Markdown, and what their columns mean."""
    head, *lines = rows(found)
    parts = [f"# {found['name']}", markdown_table(head, lines)]
    for name, (head, *lines) in windows(found).items():
        parts += [f"{name}, window by window:", markdown_table(head, lines)]
    parts.append("\n".join(f"- {line}" for line in meaning(found)))
    return "\n\n".join(parts) + "\n"


def meaning(found: Results) -> list[str]:
    """What the figures are and how they were measured, in sentences."""
    protocol = found["protocol"]
    units = [
        f"{name}: {each['unit']}; {each['meaning']}" for name, each in protocol["figures"].items()
    ]
    return [
        f"Videos of each arm: {len(next(iter(found['arms'].values()))['videos'])}; brackets hold the "
        f"{protocol['interval']}, where there are two or more.",
        "An arrow says where better lies. An arm is trained for it where the weights were made for this very memory.",
        *(
            f"Suite {suite}: {_facts(each)}."
            for suite, listed in protocol["measured"].items()
            for each in listed
        ),
        *units,
    ]


def _facts(protocol: Mapping[str, Any]) -> str:
    """A protocol in a line; the hashes of weights are in the results alone."""
    told = {name: each for name, each in protocol.items() if name != "weights"}
    flat = {
        name: each
        for key, value in told.items()
        for name, each in (value.items() if isinstance(value, dict) else [(key, value)])
    }
    return ", ".join(f"{name} {value}" for name, value in flat.items() if value is not None)


# The page


def document(comparison: Comparison, found: Results, sheets: Sequence[Path]) -> str:
    """The page, which needs the files beside it and nothing else."""
    pictures = "".join(
        f'<figure><img src="{path.name}" alt="contact sheet"><figcaption>{job.name}</figcaption></figure>'
        for path, job in zip(sheets, _of_one_arm(comparison), strict=False)
    )
    told = "".join(f"<li>{html.escape(line)}</li>" for line in meaning(found))
    names = [*found["arms"]]
    name = html.escape(found["name"])
    sections = [
        f"<h1>{name}</h1>{_html(rows(found))}",
        *(
            f"<h2>{html.escape(figure)}, window by window</h2>{_html(table)}"
            for figure, table in windows(found).items()
        ),
        f"<ul>{told}</ul>",
        f"<h2>Two videos</h2>{player(names, _of_one_arm(comparison))}",
        f"<h2>Frames at equal times</h2>{pictures}",
        f"<h2>Over time</h2><p><small>Means of all videos, window by window.</small></p>{curves(found)}",
    ]
    begin = f'<!doctype html><meta charset="utf-8"><title>{name}</title><style>{STYLE}</style>'
    return f"{begin}{''.join(sections)}<script>{PLAYER}</script>\n"


def _html(table: Sequence[Sequence[str]]) -> str:
    lines = [("th", table[0]), *(("td", line) for line in table[1:])]
    told = "".join(
        f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in line)}</tr>"
        for tag, line in lines
    )
    return f'<div class="wide"><table>{told}</table></div>'


def player(names: Sequence[str], own: Sequence[Job]) -> str:
    """Two videos of the same prompt and seed under any two arms."""

    def choice(chosen: int) -> str:
        return "".join(
            f"<option{' selected' * (i == chosen)}>{html.escape(name)}</option>"
            for i, name in enumerate(names)
        )

    videos = "".join(f"<option>{job.name}</option>" for job in own)
    sides = "".join(
        f"<div><select>{choice(min(side, len(names) - 1))}</select><video muted controls></video></div>"
        for side in range(2)
    )
    return (
        f'<p><select id="video">{videos}</select> <button id="play">play both</button></p>'
        f'<div class="two">{sides}</div>'
    )


def curves(found: Results) -> str:
    """A curve of each figure that has windows, all arms in one."""
    names = list(dict.fromkeys(name for arm in found["arms"].values() for name in arm["curves"]))
    legend = " ".join(
        f'<span style="color:{COLOURS[i % len(COLOURS)]}">{html.escape(arm)}</span>'
        for i, arm in enumerate(found["arms"])
    )
    drawn = "".join(
        curve(name, [arm["curves"].get(name, []) for arm in found["arms"].values()])
        for name in names
    )
    return f"<p><small>{legend}</small></p>{drawn}"


def curve(name: str, lines: Sequence[Sequence[float | None]]) -> str:
    """One diagram, drawn by the browser."""
    known = [value for line in lines for value in line if value is not None]
    if not known:
        return ""
    low, high = min(known), max(known)
    room = high - low or 1.0
    longest = max(map(len, lines))

    def point(at: int, value: float) -> str:
        x = MARGIN + (WIDTH - 2 * MARGIN) * at / max(longest - 1, 1)
        y = HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * (value - low) / room
        return f"{x:.1f},{y:.1f}"

    paths = "".join(
        f'<polyline fill="none" stroke="{COLOURS[i % len(COLOURS)]}" stroke-width="1.5" '
        f'stroke-dasharray="{DASHES[i // len(COLOURS) % len(DASHES)]}" '
        f'points="{" ".join(point(at, y) for at, y in enumerate(line) if y is not None)}"/>'
        for i, line in enumerate(lines)
    )
    labels = "".join(
        f'<text x="2" y="{y}" font-size="10">{value:.3g}</text>'
        for y, value in ((HEIGHT - MARGIN, low), (MARGIN, high))
    )
    title = f'<text x="{MARGIN}" y="16" font-size="12">{html.escape(name)}</text>'
    axis = f'<text x="{WIDTH - MARGIN}" y="{HEIGHT - 8}" font-size="10" text-anchor="end">window</text>'
    return f'<svg width="{WIDTH}" height="{HEIGHT}">{title}{axis}{labels}{paths}</svg>'


# Contact sheets


def sheet(comparison: Comparison, job: Job, out: Path) -> Path:
    """Frames at equal times of one prompt and seed, a row per arm in the order of the table."""
    strips = []
    for arm in comparison.arms:
        frames = video.read(comparing.video_path(out, job._replace(arm=arm)))
        at = np.linspace(0, len(frames) - 1, COLUMNS).round().astype(int)
        strips.append(np.concatenate([_small(frames[i]) for i in at], axis=1))
    widest = max(strip.shape[1] for strip in strips)
    padded = [
        np.concatenate(
            [
                _label(arm.name, widest),
                np.pad(strip, ((0, 4), (0, widest - strip.shape[1]), (0, 0)), constant_values=255),
            ]
        )
        for arm, strip in zip(comparison.arms, strips, strict=True)
    ]
    path = out / f"sheet-{job.name}.png"
    with atomic.file(path) as fresh:
        Image.fromarray(np.concatenate(padded)).save(fresh, format="PNG", optimize=True)
    return path


def _label(name: str, width: int) -> np.ndarray:
    band = Image.new("RGB", (width, LABEL), "white")
    ImageDraw.Draw(band).text((0, 1), name, fill="black")
    return np.asarray(band)


def _small(frame: np.ndarray) -> np.ndarray:
    step = -(-frame.shape[0] // TALLEST)
    return frame[::step, ::step]
