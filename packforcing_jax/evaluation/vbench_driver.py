"""Runs official VBench code on videos, inside VBench's own environment: `python vbench_driver.py REQUEST ANSWER`.

Both are JSON files. This program is started by `bridge.py`, one process a metric, and imports nothing of this package.
It adds what the official code lacks beside today's torch, and changes no number: the schemas of two operators that
torchvision wants at import, one allowed name in a checkpoint, no gradients, and no network unless it was allowed.
"""

# This file is not run where the package is: its imports are found in the other environment alone.
# pyright: reportMissingImports=false

import glob
import importlib
import importlib.util
import json
import math
import os
import re
import sys
import traceback
import typing
from importlib import metadata
from pathlib import Path

PACKAGES = "vbench torch torchvision pyiqa timm openai-clip decord opencv-python numpy".split()
DOWNLOADERS = {"wget", "git", "unzip", "curl"}
READING = ("socket.getaddrinfo", "socket.gethostbyname", "urllib.Request")  # audit events
INFO = "full_info.json"
FRAMES_AT_ONCE = 32
LONGEST = 400  # characters of what is said of an error
CONTEXT = {"clip": 77, "overall_consistency": 32}  # tokens that a text encoder reads
_KEPT: list[object] = []  # what must live as long as the process


def forbid_network() -> None:
    """From now on a name that is looked up, an address that is connected to and a downloader raise `OSError`."""

    def watch(event: str, arguments: tuple) -> None:
        internet = event == "socket.connect" and isinstance(arguments[1], tuple)
        program = event == "subprocess.Popen" and os.path.basename(str(arguments[0]))
        if event in READING or internet or program in DOWNLOADERS:
            raise OSError(
                f"the network is not allowed ({event} {program or ''})".replace(" )", ")")
            )

    sys.addaudithook(watch)


def complete_torchvision() -> None:
    """Declares two operators where torchvision was built for another torch, which makes its transforms importable."""
    import torch

    found = importlib.util.find_spec("torchvision")
    folder = os.path.dirname(found.origin) if found and found.origin else ""
    try:
        for library in glob.glob(os.path.join(glob.escape(folder), "_C*.so")):
            torch.ops.load_library(library)
    except OSError:
        declared = torch.library.Library("torchvision", "DEF")
        declared.define("nms(Tensor boxes, Tensor scores, float threshold) -> Tensor")
        declared.define("qnms(Tensor boxes, Tensor scores, float threshold) -> Tensor")
        _KEPT.append(declared)


def inspect(request: dict) -> dict:
    """Versions, the place of CLIP's vocabulary, and of each video frames, width, height, fps, or why it is none."""
    return {
        "python": ".".join(map(str, sys.version_info[:3])),
        "versions": {name: version(name) for name in PACKAGES},
        "vocabulary": vocabulary(),
        "videos": {path: film(path) for path in request["videos"]},
    }


def version(name: str) -> str | None:
    """The installed version of a package, None if it is not there."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def vocabulary() -> str | None:
    """The file of byte pairs that the CLIP package ships, which VBench wants under its own cache too."""
    found = importlib.util.find_spec("clip")
    if found is None or found.origin is None:
        return None
    path = os.path.join(os.path.dirname(found.origin), "bpe_simple_vocab_16e6.txt.gz")
    return path if os.path.isfile(path) else None


def film(path: str) -> dict:
    """What the two readers that VBench uses say of a video: decord for frames and size, OpenCV for frames a second."""
    import cv2
    import decord

    try:
        reader = decord.VideoReader(path, num_threads=1)
        height, width = reader[0].shape[:2]
        capture = cv2.VideoCapture(path)
        fps = capture.get(cv2.CAP_PROP_FPS)
        capture.release()
    except Exception as error:  # decord raises errors of its own for files that are no videos
        return {"error": brief(error)}
    return {"frames": len(reader), "width": width, "height": height, "fps": fps}


def brief(error: BaseException) -> str:
    """Type and words of an error in one line, without the colours of a terminal, its middle left out if it is long."""
    said = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split())
    said = said if len(said) <= LONGEST else f"{said[: LONGEST // 2]} [...] {said[-LONGEST // 2 :]}"
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def measure(request: dict) -> dict:
    """The values of one metric: `{"dataset": number, "videos": {path: number}}`, and more for CLIP's windows."""
    if not request["allow_network"]:
        forbid_network()
    complete_torchvision()
    import torch

    torch.serialization.add_safe_globals([typing.OrderedDict])  # a name in amt-s.pth
    with torch.inference_mode():  # two metrics would keep the graph of all frames
        measured = clip_windows(request) if request["metric"] == "clip" else official(request)
    return measured | {"tokens": tokens(request)}


def official(request: dict) -> dict:
    """What `compute_METRIC` of VBench returns, called as its own command line does, with local files."""
    metric = request["metric"]
    entries = [
        {"prompt_en": prompt, "dimension": [metric], "video_list": [path]}
        for path, prompt in request["videos"].items()
    ]
    Path(INFO).write_text(json.dumps(entries), encoding="utf-8")
    compute = getattr(importlib.import_module(f"vbench.{metric}"), f"compute_{metric}")
    from vbench.utils import init_submodules

    modules = init_submodules([metric], local=True)[metric]
    dataset, listed = compute(INFO, request["device"], modules)
    found = {each["video_path"]: float(each["video_results"]) for each in listed}
    return {"dataset": float(dataset), "videos": found}


def clip_windows(request: dict) -> dict:
    """Mean cosine, times 100, of prompt and frames in consecutive windows; a video's value is the mean over them.

    `windows`: per video `{"values": [...], "frames": [[index, ...], ...]}`.
    """
    import clip
    import torch
    from vbench.utils import CACHE_DIR, clip_transform

    model, _ = clip.load(
        os.path.join(CACHE_DIR, "clip_model", "ViT-B-32.pt"), device=request["device"]
    )
    transform = clip_transform(224)
    windows = {}
    for path, prompt in request["videos"].items():
        ids = clip.tokenize([prompt], truncate=True).to(request["device"])
        text = torch.nn.functional.normalize(model.encode_text(ids).float(), dim=-1)
        windows[path] = windows_of(
            path, lambda frames, text=text: cosines(model, transform, frames, text), request
        )
    found = {path: mean(each["values"]) for path, each in windows.items()}
    return {"dataset": mean(list(found.values())), "videos": found, "windows": windows}


def windows_of(path: str, score: typing.Callable, request: dict) -> dict:
    """The windows of one video: frames at `request["rate"]` a second, `request["window"]` seconds each."""
    import decord

    decord.bridge.set_bridge("torch")
    reader = decord.VideoReader(path, num_threads=1)
    groups = sampled(len(reader), reader.get_avg_fps(), request["rate"], request["window"])
    values = []
    for indices in groups:
        found: list[float] = []
        for start in range(0, len(indices), FRAMES_AT_ONCE):
            frames = reader.get_batch(indices[start : start + FRAMES_AT_ONCE])
            found += score(frames.permute(0, 3, 1, 2))
        values.append(100 * mean(found))
    return {"values": values, "frames": groups}


def sampled(frames: int, fps: float, rate: float, window: float) -> list[list[int]]:
    """Indices of frames at `rate` a second, from the first on, grouped by windows of `window` seconds."""
    groups: dict[int, list[int]] = {}
    for number in range(math.ceil(frames / fps * rate)):
        index = round(number / rate * fps)
        if index < frames:
            groups.setdefault(int(number / rate // window), []).append(index)
    return [groups[each] for each in sorted(groups)]


def cosines(model, transform, frames, text) -> list[float]:
    """Cosine of each frame (frame, channel, y, x) with one text."""
    import torch

    images = transform(frames).to(text.device)
    features = torch.nn.functional.normalize(model.encode_image(images).float(), dim=-1)
    return (features @ text.T)[:, 0].tolist()


def mean(values: list[float]) -> float:
    """The mean, not a number of nothing."""
    return sum(values) / len(values) if values else math.nan


def tokens(request: dict) -> dict:
    """Of a metric that reads text: how many tokens each prompt has, with start and end, and how many are read."""
    if request["metric"] not in CONTEXT:
        return {}
    from clip.simple_tokenizer import SimpleTokenizer

    encode = SimpleTokenizer().encode
    counts = {path: len(encode(prompt)) + 2 for path, prompt in request["videos"].items()}
    return {"read": CONTEXT[request["metric"]], "counts": counts}


ACTIONS = {"inspect": inspect, "measure": measure}


def main(request: str, answer: str) -> int:
    """Writes the answer, or `{"error": ...}` with the traceback on standard error; the exit code is 1 then."""
    asked = json.loads(Path(request).read_text(encoding="utf-8"))
    try:
        said = ACTIONS[asked["action"]](asked)
    except Exception as error:
        traceback.print_exc()
        said = {"error": brief(error)}
    unfinished = f"{answer}.unfinished"
    Path(unfinished).write_text(json.dumps(said), encoding="utf-8")
    os.replace(unfinished, answer)
    return int("error" in said)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
