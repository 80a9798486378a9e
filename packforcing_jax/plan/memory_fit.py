"""What fits into a memory: the peak of every phase of sampling, and which settings make a model fit that does not."""

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax

from packforcing_jax.config import Experiment, loading
from packforcing_jax.errors import InputError, require
from packforcing_jax.plan import formulas, jaxpr_cost, programs
from packforcing_jax.plan.programs import COMMITTING, DENOISING, ENCODING, PROMPT, SHOWING, Use

Setting = tuple[str, ...]  # what goes behind --set
Uses = Mapping[str, Use]
LOADING = "loading"
READING = "reading prompts"
SAMPLING = "sampling"
NETS = ("transformer", "compressor", "codec")

# Changes that save memory, the most harmless first: rounding, then where things lie, then what is kept, then the size.
CHANGES: tuple[Setting, ...] = (
    ("dtypes.vae=bfloat16",),
    ("dtypes.text=bfloat16",),
    ("dtypes.cache=bfloat16",),
    ("dtypes.compute=bfloat16",),
    ("dtypes.params=bfloat16",),
    ("cache.archive=host", "cache.scope=shared", "cache.timing=late"),
    ("cache.capacity=64",),
    ("cache.capacity=32",),
    ("cache.capacity=16",),
    ("cache.top=8",),
)
SMALLER = (3 / 4, 1 / 2)  # of each side of the picture, the last resort
GENEROUS = 10  # arrays as large as the largest: more than any program of a block has alive at once
UNITS = {
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}


# Peaks


@dataclass(frozen=True)
class Peaks:
    """Most bytes by phase, on the device and in host memory."""

    device: dict[str, int]
    host: dict[str, int]

    @property
    def on_device(self) -> int:
        return max(self.device.values())

    @property
    def on_host(self) -> int:
        return max(self.host.values())

    @property
    def together(self) -> int:
        """Where the device's memory is the host's."""
        return max(
            size + self.host.get(phase, self.host[SAMPLING]) for phase, size in self.device.items()
        )


def fused(exp: Experiment, platform: str) -> bool:
    """Whether attention keeps no array of all queries by all keys, as `attention.default_backend` chooses."""
    half = exp.dtypes.cache in ("bfloat16", "float16")
    name = exp.attention if isinstance(exp.attention, str) else exp.attention.name
    return name == "cudnn" or (name == "auto" and platform == "gpu" and half)


def estimated(exp: Experiment, batch: int = 1, platform: str = "gpu") -> Uses:
    """What each program of sampling takes, from its traced form. A CPU computes in float32 whatever it is told."""
    space = programs.workspace(_widened(exp) if platform == "cpu" else exp, batch)
    kind = programs.FUSED if fused(exp, platform) else programs.WRITTEN
    return {
        name: Use(space.get(name, space.get(f"{name}, {kind}", 0)), size, 0, 0)
        for name, size in _results(exp, batch).items()
    }


def bounded(exp: Experiment, batch: int = 1) -> Uses:
    """More than each program takes, without tracing any where all networks are the project's own."""
    if not formulas.all_known(exp):
        return estimated(exp, batch)
    most = GENEROUS * formulas.largest(exp, batch) + sum(resting(exp, batch)[name] for name in NETS)
    return {name: Use(most, size, 0, 0) for name, size in _results(exp, batch).items()}


def _results(exp: Experiment, batch: int) -> dict[str, int]:
    """Bytes of what each program hands back in room of its own."""
    show = programs.showing(exp)
    states = programs.states_of(exp.text, exp.dtypes.text)[0]
    decoder = programs.codec_of(exp.codec, exp.latent, batch, exp.dtypes.vae)[1]
    each = exp.tokens_per_packed_block * formulas.token_bytes(exp, batch, exp.dtypes.compute)
    return {
        ENCODING: jaxpr_cost.nbytes(states),
        PROMPT: resting(exp, batch)["text_kv"],
        DENOISING: jaxpr_cost.nbytes(_latent_of(exp, batch)),
        SHOWING: jaxpr_cost.nbytes((programs.frames_of(show, batch), decoder)),
        COMMITTING: bool(exp.cache.top) * (exp.cache.archive == "host") * each,
    }


def _latent_of(exp: Experiment, batch: int) -> jax.ShapeDtypeStruct:
    return programs.latent_of(exp.latent, exp.cache.block, exp.dit.in_channels, batch)


def _widened(exp: Experiment) -> Experiment:
    dtypes = dataclasses.replace(
        exp.dtypes, compute="float32", cache="float32", vae="float32", text="float32"
    )
    if exp.dtypes.params == exp.dtypes.compute:
        dtypes = dataclasses.replace(dtypes, params="float32")
    return dataclasses.replace(exp, dtypes=dtypes)


def resting(exp: Experiment, batch: int = 1) -> dict[str, int]:
    """Bytes on the device between two blocks, by part."""
    vae, decoder = programs.codec_of(exp.codec, exp.latent, batch, exp.dtypes.vae)
    nets = programs.nets_of(exp.step, exp.dtypes.params)
    stored = formulas.resident(exp, batch)
    parts = (
        "views",
        "archive",
        "un-rotated keys",
        "recent queries",
        "recent latents",
        "blocks in the window",
        "what is known of tokens",
    )
    sizes = {name: int(stored.get(f"held/{name}", 0)) for name in parts}
    sizes["archive"] -= int(stored["held/on the host"])
    trees = {
        "text_kv": programs.text_kv_of(exp.step, exp.dtypes.params, exp.dtypes.text, batch),
        "transformer": nets.dit,
        "compressor": nets.compressor,
        "codec": vae,
        "decoder": decoder,
    }
    return sizes | {name: jaxpr_cost.nbytes(tree) for name, tree in trees.items()}


def peaks(exp: Experiment, batch: int, uses: Uses) -> Peaks:
    """The peaks of sampling `batch` videos, each with a prompt of its own, given what its programs take.

    Beside what is held and what a program takes lie: the frames shown last, until the next ones are there; while
    committing, the codec's state before the block too; while a text encoder is read, two of its layers.
    """
    resident = resting(exp, batch)
    text = formulas.weights(exp)
    whole = sum(resident.values())
    state = int(text["weights/text states of one prompt"])
    frames, low_res, latent = map(
        jaxpr_cost.nbytes,
        (*programs.frames_of(programs.showing(exp), batch), _latent_of(exp, batch)),
    )
    layers = int(text["weights/of it while prompts are read"])
    reading = max(
        layers + (2 * batch - 1) * state + taken(uses, ENCODING),
        batch * state + taken(uses, PROMPT),
    )
    fetched = _fetched(exp, batch)
    archived = int(formulas.resident(exp, batch)["held/on the host"])
    device = {
        LOADING: sum(resident[name] for name in NETS),
        READING: whole + frames + reading,
        DENOISING: whole + frames + fetched + taken(uses, DENOISING),
        SHOWING: whole + frames + latent + taken(uses, SHOWING),
        COMMITTING: whole
        + 2 * frames
        + latent
        + low_res
        + resident["decoder"]
        + taken(uses, COMMITTING),
    }
    models, encoder = _largest_tensors(exp)
    host = archived + 2 * frames // batch
    return Peaks(device, {LOADING: models, READING: host + encoder, SAMPLING: host + fetched})


def taken(uses: Uses, name: str) -> int:
    """Most that one of the programs called `name...` takes beside its arguments."""
    return max(
        use.temporary + use.results - use.reused
        for own, use in uses.items()
        if own.startswith(name)
    )


def _fetched(exp: Experiment, batch: int) -> int:
    """Bytes of packed blocks that come from the host for one block: the chosen ones, and a layer's keys to score."""
    if exp.cache.archive == "device":
        return 0
    one = formulas.bytes_of(exp, 1, batch)["bytes/one packed block"]
    return int(exp.cache.attended * one + exp.cache.slots * one / (2 * exp.dit.layers))


def _largest_tensors(exp: Experiment) -> tuple[int, int]:
    """Bytes of the largest tensor that passes host memory: of what stays on the device, and of the text encoder."""
    nets = programs.nets_of(programs.shallow(exp.step), exp.dtypes.params)
    vae = programs.codec_of(exp.codec, exp.latent, 1, exp.dtypes.vae)[0]
    layer = programs.encoder_layer(exp.text, exp.dtypes.text)
    of_nets, of_text = (
        max(map(jaxpr_cost.nbytes, jax.tree.leaves(tree))) for tree in ((nets, vae), layer)
    )
    return of_nets, of_text


# Rooms


@dataclass(frozen=True)
class Room:
    """A memory to fit into. `host` is what there is beside it, None if nobody asks; a CPU has one memory for both."""

    name: str
    device: int
    host: int | None = None
    platform: str = "gpu"

    def lacks(self, need: Peaks) -> int:
        """Bytes that are missing for `need`; below zero they are left."""
        if self.platform == "cpu":
            return need.together - self.device
        return max(
            need.on_device - self.device,
            need.on_host - self.host if self.host is not None else -self.device,
        )


def parse(text: str) -> Room:
    """The room of `24GB` (10^9 bytes), `22.5GiB` (2^30) and the like on a GPU."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kMGT]i?B)\s*", text, re.IGNORECASE)
    size = int(float(match[1]) * UNITS[match[2].lower()]) if match else 0
    require(size > 0, f"{text!r} is no size of a memory; write it as 24GB or 22.5GiB.")
    return Room(text.strip(), size)


def this_machine() -> Room:
    """The room of the device that jax uses first."""
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit:
        return Room(f"this {device.device_kind}", int(limit), available(), device.platform)
    return Room(f"this machine's {device.platform} device", available(), platform="cpu")


def available(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that a process can still take here: what the system says, or less where its control group has a limit."""
    try:
        lines = (proc / "meminfo").read_text().splitlines()
        free = next(
            int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")
        )
    except (OSError, StopIteration):
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([free, *_left_in_groups(proc, groups)])


def _left_in_groups(proc: Path, groups: Path) -> Iterator[int]:
    """What the limits of this process's control group and of those around it leave; file pages can be given up."""
    try:
        lines = [line.split(":", 2) for line in (proc / "self" / "cgroup").read_text().splitlines()]
    except OSError:
        return
    for number, kind, path in lines:
        if number != "0" and kind != "memory":
            continue
        top = groups if number == "0" else groups / "memory"
        limit, used = (
            ("memory.max", "memory.current")
            if number == "0"
            else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        )
        inside = Path(path.lstrip("/"))
        for folder in (top / each for each in (inside, *inside.parents)):
            yield from _left(folder / limit, folder / used, folder / "memory.stat")


def _left(limit: Path, used: Path, stat: Path) -> Iterator[int]:
    try:
        most = limit.read_text().strip()
        now = int(used.read_text())
        pages = dict(line.split() for line in stat.read_text().splitlines())
    except (OSError, ValueError):
        return
    if most != "max":
        yield int(most) - now + int(pages.get("total_inactive_file", pages.get("inactive_file", 0)))


# What fits


@dataclass(frozen=True)
class Verdict:
    """Whether `need` fits into `room`, and if not, the settings with which it does; None where none are enough."""

    room: Room
    need: Peaks
    overrides: Setting | None
    then: Peaks  # with `sets`, or with all that are known

    @property
    def lacks(self) -> int:
        return self.room.lacks(self.need)


def judge(exp: Experiment, room: Room, batch: int = 1, need: Peaks | None = None) -> Verdict:
    """Whether sampling fits, and the first changes that make it fit: one by one, then together, the size at last."""
    need = need or _need(exp, room, batch)
    if room.lacks(need) <= 0:
        return Verdict(room, need, (), need)
    last: tuple[Setting, ...] = ()
    for last in attempts(exp):
        if _enough(exp, last, room, batch):
            overrides = _flat(_pruned(exp, last, room, batch))
            return Verdict(
                room, need, overrides, _need(loading.override(exp, overrides), room, batch)
            )
    return Verdict(room, need, None, _need(loading.override(exp, _flat(last)), room, batch))


def attempts(exp: Experiment) -> Iterator[tuple[Setting, ...]]:
    """Changes to try together."""
    known = [change for change in CHANGES if _possible(exp, change)]
    yield from ((change,) for change in known)
    yield from (tuple(known[:count]) for count in range(2, len(known) + 1))
    for share in SMALLER:
        sides = (
            int(size * share) // step * step
            for size, step in zip(exp.latent, exp.dit.patch[1:], strict=True)
        )
        size = (f"latent={','.join(map(str, sides))}",)
        if _possible(exp, size):
            yield from ((size,), (*known, size))


def _possible(exp: Experiment, change: Setting) -> bool:
    """Whether a change is one, to less, and leaves settings that go together."""
    try:
        changed = loading.override(exp, change)
    except InputError:
        return False
    more = changed.cache.capacity > exp.cache.capacity or changed.cache.top > exp.cache.top
    return changed != exp and not more


def _enough(exp: Experiment, changed: tuple[Setting, ...], room: Room, batch: int) -> bool:
    """Whether it fits with changes. What shows at once that it does not is looked at first."""
    try:
        exp = loading.override(exp, _flat(changed))
    except InputError:
        return False
    least = peaks(exp, batch, _floor(exp, batch, room.platform))
    return room.lacks(least) <= 0 and room.lacks(_need(exp, room, batch)) <= 0


def _floor(exp: Experiment, batch: int, platform: str) -> Uses:
    """Less than each program takes, without tracing any: two arrays of logits where attention is written out."""
    logits = 0 if fused(exp, platform) else 2 * formulas.logits(exp, batch)
    return {
        name: Use(logits * (name == DENOISING), size, 0, 0)
        for name, size in _results(exp, batch).items()
    }


def _need(exp: Experiment, room: Room, batch: int) -> Peaks:
    return peaks(exp, batch, estimated(exp, batch, room.platform))


def _pruned(
    exp: Experiment, changed: tuple[Setting, ...], room: Room, batch: int
) -> tuple[Setting, ...]:
    """As few of the changes as are enough, without the least harmless where there is a choice."""
    for one in reversed(changed):
        fewer = tuple(each for each in changed if each != one)
        if fewer and _enough(exp, fewer, room, batch):
            return _pruned(exp, fewer, room, batch)
    return changed


def _flat(changed: tuple[Setting, ...]) -> Setting:
    return tuple(one for change in changed for one in change)


def require_fits(exp: Experiment, *, batch: int = 1, room: Room | None = None) -> None:
    """Raises `InputError` if sampling `batch` videos needs more memory than there is here; allocates nothing."""
    room = room or this_machine()
    if room.lacks(peaks(exp, batch, bounded(exp, batch))) > 0:
        verdict = judge(exp, room, batch)
        require(verdict.lacks <= 0, refusal(exp.name, verdict))


def refusal(name: str, verdict: Verdict) -> str:
    """Why it does not fit, and what would."""
    room = verdict.room
    lacks = verdict.lacks
    message = f"{name} needs {spell(room.device + lacks)} of memory, {room.name} has {spell(room.device)}; "
    then = spell(room.device + room.lacks(verdict.then))
    if verdict.overrides is None:
        return f"{message}settings alone bring it down to {then} at best; use a larger device or a smaller model."
    return f"{message}{flags(verdict.overrides)} brings it down to {then}."


def flags(overrides: Setting) -> str:
    """Settings as they are typed."""
    return " ".join(f"--set {each}" for each in overrides)


def spell(size: float) -> str:
    """Bytes in GB (10^9)."""
    return f"{size / 1e9:.2f} GB"
