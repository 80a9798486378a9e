"""What a block costs: its parts as sampling runs them, behind a full memory, beside what the device can do at most."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from packforcing_jax import pytrees
from packforcing_jax.config import Experiment, StepConfig
from packforcing_jax.errors import nearest, require
from packforcing_jax.memory import cache, view
from packforcing_jax.memory import layout as layouts
from packforcing_jax.memory.cache import Memory, Selection
from packforcing_jax.networks import codec
from packforcing_jax.plan import budget, jaxpr_cost, programs, timing
from packforcing_jax.policies import attention
from packforcing_jax.pytrees import PerLayer
from packforcing_jax.sampling import block_step, player
from packforcing_jax.sampling.block_step import Denoiser, Nets
from packforcing_jax.sampling.player import State
from packforcing_jax.types import KV, Heads, Latent, Tokens, Video

Inputs = dict[str, Any]  # what a block is given besides the state, by name


@dataclass(frozen=True)
class Model:
    """What the player needs of a model, and nothing else."""

    experiment: Experiment
    nets: Nets
    vae: codec.Codec


# The parts. Each runs what sampling runs, takes a state to the next, and says what came out.


@functools.partial(jax.jit, donate_argnames="memory")
def forward(denoiser: Denoiser, memory: Memory, noisy: Latent) -> tuple[Memory, Latent]:
    """The first denoising step, its views in place."""
    layout = layouts.layout(denoiser.cfg.cache, memory.progress)
    level = block_step.noise_levels(denoiser.cfg.sample)[0]
    views = block_step.views_of(memory)
    clean, views = block_step.predict_x0(denoiser.computed(), layout, noisy, level, views)
    return block_step.with_views(memory, views), clean


@functools.partial(jax.jit, static_argnames="cfg")
def choose(
    cfg: StepConfig, memory: Memory, queries: list[Heads], random: list[Array]
) -> PerLayer[Selection]:
    """What every layer attends to, asked by `queries`."""
    spec = cfg.memory
    layout = layouts.layout(cfg.cache, memory.progress)
    pooled = pytrees.over(lambda q: view.pool_queries(spec, layout, q), queries)
    scores = pytrees.over(
        lambda *one: view.score(spec, layout, *one), memory.layers, pooled, random
    )
    return block_step.decide(cfg, layout, scores)


@functools.partial(jax.jit, static_argnames="cfg")
def pack(nets: Nets, vae: codec.Codec, cfg: StepConfig, latent: Latent, frames: Video) -> Tokens:
    """The packed tokens of a block, from its latent and its frames."""
    low_res = codec.low_res_latents(
        vae, frames, latents=cfg.packed_grid[0], pool=cfg.compressor.pool
    )
    nets = pytrees.cast(nets, cfg.compute)
    return nets.compressor.pack(nets.dit, cfg, latent, low_res)


store = jax.jit(cache.commit, static_argnames="spec", donate_argnames="memory")
decode = jax.jit(codec.decode_chunk, static_argnames="first")


def _denoiser(model: player.Model, inputs: Inputs) -> Denoiser:
    return Denoiser(model.nets, model.experiment.step, inputs["text_kv"])


def _forward(model: player.Model, state: State, inputs: Inputs) -> tuple[State, Any]:
    memory, clean = forward(_denoiser(model, inputs), state.memory, inputs["latent"])
    return dataclasses.replace(state, memory=memory), clean


def _denoise(model: player.Model, state: State, inputs: Inputs) -> tuple[State, Any]:
    return player.denoise(model, state, inputs["text_kv"])


def _selection(model: player.Model, state: State, inputs: Inputs) -> tuple[State, Any]:
    return state, choose(model.experiment.step, state.memory, inputs["queries"], inputs["random"])


def _decode(model: player.Model, state: State, inputs: Inputs) -> tuple[State, Any]:
    frames, decoder = decode(model.vae, state.decoder, inputs["latent"], first=False)
    return dataclasses.replace(state, decoder=decoder), frames


def _compression(model: player.Model, state: State, inputs: Inputs) -> tuple[State, Any]:
    cfg = model.experiment.step
    return state, pack(model.nets, model.vae, cfg, inputs["latent"], inputs["frames"])


def _store(model: player.Model, state: State, inputs: Inputs) -> tuple[State, Any]:
    new = (inputs[name] for name in PARTS["store"].takes)
    memory = store(model.experiment.memory, state.memory, *new)
    return dataclasses.replace(state, memory=memory), ()


def _commit(model: player.Model, state: State, inputs: Inputs) -> tuple[State, Any]:
    new = (inputs[name] for name in ("latent", "low_res", "selection"))
    memory, packed = player.commit_program(_denoiser(model, inputs), state.memory, *new)
    return dataclasses.replace(state, memory=memory), packed


def _second(model: player.Model, state: State, inputs: Inputs) -> tuple[State, Any]:
    return player.next_block(model, state, inputs["text_kv"])


@dataclass(frozen=True)
class Part:
    """A row of the table of parts; `takes` names what it is given, `packs` whether it needs packed blocks."""

    run: Callable[[player.Model, State, Inputs], tuple[State, Any]]
    takes: tuple[str, ...]
    packs: bool = False


PARTS = {
    "forward": Part(_forward, ("latent", "text_kv")),
    "denoise": Part(_denoise, ("text_kv",)),
    "selection": Part(_selection, ("queries", "random"), packs=True),
    "decode": Part(_decode, ("latent",)),
    "compression": Part(_compression, ("latent", "frames"), packs=True),
    "store": Part(_store, ("latent", "full", "packed", "selection")),
    "commit": Part(_commit, ("latent", "low_res", "selection", "text_kv")),
    "second": Part(_second, ("text_kv",)),
}


def parts_of(exp: Experiment, names: Collection[str]) -> dict[str, Part]:
    """The parts called `names`, by default all that `exp` has."""
    for name in names:
        require(name in PARTS, f"--part {name} is unknown; {nearest(name, PARTS)}")
        require(
            exp.cache.top > 0 or not PARTS[name].packs,
            f"--part {name}: cache.top=0 leaves nothing packed to measure; set cache.top or leave it out.",
        )
    return {
        name: part
        for name, part in PARTS.items()
        if name in names or not (names or (part.packs and exp.cache.top == 0))
    }


# A model in the middle of a long video


@dataclass(frozen=True)
class Scene:
    """A model, the state of a video whose memory is full, and what its next block is given; arrays or shapes."""

    model: player.Model
    state: State
    inputs: Inputs

    def run(self, name: str) -> timing.Step:
        """A part as a step from state to state."""
        return lambda state: PARTS[name].run(self.model, state, self.inputs)


def full(exp: Experiment) -> layouts.Progress:
    """How far a video is whose memory is full."""
    return layouts.begin(budget.full_position(exp))


def attended(exp: Experiment) -> int:
    """Keys that a block attends to behind a full memory, its own among them."""
    return int(layouts.length(exp.memory, layouts.denoising(exp.cache, full(exp))))


def shapes(exp: Experiment) -> Scene:
    """The shapes of a scene. Nothing runs."""
    require(
        exp.cache.archive == "device",
        "cache.archive='host' denoises a block in parts; bench measures whole ones, "
        "set cache.archive=device.",
    )
    forms = programs.shapes_of(exp)
    spec = exp.memory

    def tokens(count: int) -> list[KV]:
        one: Any = jax.ShapeDtypeStruct((1, count, spec.heads, spec.head_dim), exp.dtypes.compute)
        return [KV(k=one, v=one)] * spec.layers

    own = tokens(exp.cache.block * exp.tokens_per_frame)
    inputs = {
        "text_kv": forms.text_kv,
        "latent": forms.latent,
        "frames": forms.frames,
        "low_res": forms.low_res,
        "full": own,
        "packed": tokens(exp.tokens_per_packed_block) if exp.cache.top else None,
        "queries": [kv.k for kv in own],
        "selection": [forms.selection] * spec.layers,
        "random": [jax.ShapeDtypeStruct((1, exp.cache.slots), jnp.float32)] * spec.layers,
    }
    state = State(
        memory=forms.memory,
        archive=[],
        decoder=forms.decoder,
        seeds=forms.seeds,  # type: ignore[arg-type]  a state of shapes
        videos=forms.videos,  # type: ignore[arg-type]
    )
    return Scene(Model(exp, forms.nets, forms.vae), state, inputs)


def filled(
    forms: jaxpr_cost.Tree, scale: Callable[[tuple[int, ...]], float] = lambda shape: 1.0
) -> Any:
    """Random numbers in place of shapes; those that are no floats become zero."""
    leaves, tree = jax.tree.flatten(forms)
    made = [
        timing.normal(seed, x.shape, x.dtype, scale(x.shape))
        if jnp.issubdtype(x.dtype, jnp.floating)
        else jnp.zeros(x.shape, x.dtype)
        for seed, x in enumerate(leaves)
    ]
    return jax.tree.unflatten(tree, made)


def random_model(exp: Experiment) -> Model:
    """A model with random weights, made on the device in the dtypes of the config."""
    model = shapes(exp).model
    spread = lambda shape: math.prod(shape[:-1]) ** -0.5  # noqa: E731  so that activations keep their size
    return Model(exp, *filled((model.nets, model.vae), spread))


def _behind(state: State, progress: layouts.Progress) -> State:
    memory = dataclasses.replace(state.memory, progress=progress)
    return dataclasses.replace(state, memory=memory)


def scene(model: player.Model, names: Collection[str]) -> Scene:
    """A model behind a full memory of random numbers, with what the parts `names` are given."""
    exp = model.experiment
    abstract = shapes(exp)
    progress = full(exp)
    inputs = {name: filled(abstract.inputs[name]) for part in names for name in PARTS[part].takes}
    if "selection" in inputs:
        newest = view.newest(exp.memory, layouts.layout(exp.cache, progress), 1)
        inputs["selection"] = [newest] * exp.memory.layers
    return Scene(model, _behind(filled(abstract.state), progress), inputs)


# Figures


def operations(exp: Experiment, names: Collection[str]) -> dict[str, int]:
    """Operations of one run of each part, counted in its program; keys that only fill up a view do not count."""
    exp = dataclasses.replace(exp, attention="reference")  # fused kernels hide their products
    abstract = shapes(exp)
    keys = attended(exp)
    progress = full(exp)
    spec = exp.memory
    whole = (1, spec.room, spec.heads, spec.head_dim)

    def count(part: Part) -> int:
        def run(own: tuple[Nets, codec.Codec], state: State, inputs: Inputs) -> Any:
            return part.run(Model(exp, *own), _behind(state, progress), inputs)

        own = abstract.model.nets, abstract.model.vae
        traced = jaxpr_cost.trace(run, own, abstract.state, abstract.inputs)
        attending = jaxpr_cost.operations(traced, on=whole)
        return jaxpr_cost.operations(traced) - attending + attending // whole[1] * keys

    return {name: count(PARTS[name]) for name in names}


def moved(scene: Scene, name: str) -> int:
    """Bytes that a part is given, read once and written once."""
    return 2 * jaxpr_cost.nbytes([scene.inputs[taken] for taken in PARTS[name].takes])


@dataclass(frozen=True)
class Measurements:
    """What was measured: times of parts and products by name, and what one run of each part does."""

    experiment: Experiment
    times: dict[str, timing.Times]
    operations: dict[str, int]
    moved: dict[str, int]
    products: list[timing.Product]

    @property
    def ceiling(self) -> timing.Product:
        """The product that reached most operations per second."""
        return max(
            self.products, key=lambda product: product.operations / self.times[product.name].median
        )


def measure(
    model: player.Model,
    names: Collection[str] = (),
    *,
    warmup: int = 3,
    repeats: int = 20,
    show: timing.Show = timing.unshown,
    clock: Callable[[], float] = time.perf_counter,
) -> Measurements:
    """The parts `names` of a model (by default all), in rounds with the products that show the device's ceiling."""
    exp = model.experiment
    parts = parts_of(model.experiment, names)
    populated = scene(model, parts)
    products = timing.products(exp.dtypes.compute)
    steps = {product.name: product.step() for product in products} | {
        name: populated.run(name) for name in parts
    }
    times = timing.measure(
        steps, populated.state, warmup=warmup, repeats=repeats, show=show, clock=clock
    )
    return Measurements(
        experiment=exp,
        times=times,
        products=products,
        operations=operations(exp, parts),
        moved={name: moved(populated, name) for name in parts},
    )


def blocks_a_second(exp: Experiment) -> float:
    """Blocks that make a second of video."""
    return exp.fps / (exp.cache.block * exp.codec.time_factor)


def report(measured: Measurements) -> dict[str, Any]:
    """All figures in seconds, operations and bytes; those of `second` are of a second of video, not of one block."""
    exp = measured.experiment
    best = measured.ceiling
    backend, why = attention.resolve(exp.attention, jnp.dtype(exp.dtypes.cache))
    ceiling = best.operations / measured.times[best.name].median
    rows = {name: _row(measured, name, ceiling) for name in measured.operations}
    speed = (
        {"frames_per_second": exp.fps / rows["second"]["median"], "fps": exp.fps}
        if "second" in rows
        else {}
    )
    return {
        "config": exp.name,
        "dtype": exp.dtypes.compute,
        "attention": backend,
        "why": why,
        "machine": timing.machine(),
        "rounds": len(measured.times[best.name].runs),
        "ceiling": {"product": best.name, "operations_per_second": ceiling},
        "parts": rows,
        **speed,
        "metrics": metrics(measured),
    }


def _row(measured: Measurements, name: str, ceiling: float) -> dict[str, float]:
    times = measured.times[name]
    times_as_much = blocks_a_second(measured.experiment) if name == "second" else 1
    done = measured.operations[name] * times_as_much
    bytes_moved = measured.moved[name] * times_as_much
    low, high = times.quartiles
    seconds = {"median": times.median, "low": low, "high": high, "best": times.best}
    seconds = {key: value * times_as_much for key, value in seconds.items()}
    work = (
        {
            "operations": done,
            "operations_per_second": done / seconds["median"],
            "share": done / seconds["median"] / ceiling,
        }
        if done
        else {"bytes": bytes_moved, "bytes_per_second": bytes_moved / seconds["median"]}
    )
    return {"first_call": times.first, **seconds, **work}


def metrics(measured: Measurements) -> dict[str, dict[str, Any]]:
    """What can be compared between runs on a machine that others use too: ratios of times of the same rounds."""

    def metric(value: float, direction: str) -> dict[str, Any]:
        return {"value": value, "direction": direction}

    times = measured.times
    best = measured.ceiling
    if "forward" not in measured.operations:
        return {}
    share = (
        timing.ratio(times[best.name], times["forward"])
        * measured.operations["forward"]
        / best.operations
    )
    return {"forward, share of ceiling": metric(share, "higher")} | {
        f"{name}/forward": metric(timing.ratio(times[name], times["forward"]), "lower")
        for name in measured.operations
        if name != "forward"
    }
