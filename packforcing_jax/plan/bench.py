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
from packforcing_jax.config import Experiment
from packforcing_jax.errors import nearest, require
from packforcing_jax.memory import cache, view
from packforcing_jax.networks import codec, compressor
from packforcing_jax.plan import jaxpr_cost, programs, timing
from packforcing_jax.policies import attention
from packforcing_jax.sampling import block_step, pipeline
from packforcing_jax.sampling.pipeline import Pipeline, State
from packforcing_jax.types import KV, Latent

Given = dict[str, Any]  # what a block is given besides the state, by name


# The parts. Each runs what sampling runs, takes a state to the next, and says what came out.


@functools.partial(jax.jit, static_argnames="exp", donate_argnames="views")
def guess(
    nets: block_step.Nets,
    exp: Experiment,
    num_blocks: Array,
    views: list[KV],
    noisy: Latent,
    words: Any,
):
    """The first denoising step, its views in place."""
    times, sigmas = (jnp.asarray(x) for x in block_step.step_table(exp.sample))
    nets, seen = pytrees.cast(nets, exp.dtypes.compute), cache.plan(exp.cache, num_blocks)
    return block_step.guess(nets, exp, seen, noisy, times[0], sigmas[0], words, views)


@functools.partial(jax.jit, static_argnames="exp")
def choose(exp: Experiment, memory: cache.Memory, queries: list[Array], lots: list[Array]) -> Any:
    """What every layer looks back at, asked by `queries`."""
    seen = cache.plan(exp.cache, memory.num_blocks)
    asked = pytrees.over(lambda q: view.ask(exp, seen, q), queries)
    return block_step.decide(
        exp,
        seen,
        pytrees.over(lambda *one: view.score(exp, seen, *one), memory.layers, asked, lots),
    )


@functools.partial(jax.jit, static_argnames="exp")
def pack(
    nets: block_step.Nets, pixels: codec.Codec, exp: Experiment, latent: Latent, frames: Array
) -> Array:
    """The packed tokens of a block, from its latent and its frames."""
    low = codec.low_resolution(pixels, frames, latents=exp.packed_grid[0], pool=exp.compressor.pool)
    nets = pytrees.cast(nets, exp.dtypes.compute)
    return compressor.pack(nets.compressor, nets.dit, exp, latent, low)


commit = jax.jit(cache.commit, static_argnames="exp", donate_argnames="memory")
decode = jax.jit(codec.decode_chunk, static_argnames="first")


def _forward(pipe: Pipeline, state: State, given: Given) -> tuple[State, Any]:
    clean, views = guess(
        pipe.nets,
        pipe.experiment,
        state.memory.num_blocks,
        state.views,
        given["latent"],
        given["words"],
    )
    return dataclasses.replace(state, views=views), clean


def _block(pipe: Pipeline, state: State, given: Given) -> tuple[State, Any]:
    drawn = pipe.draw(state, given["words"])
    return dataclasses.replace(state, views=drawn.views), (drawn.latent, drawn.looked)


def _commit(pipe: Pipeline, state: State, given: Given) -> tuple[State, Any]:
    memory = commit(pipe.experiment, state.memory, given["full"], given["packed"], given["looked"])
    return dataclasses.replace(state, memory=memory), ()


def _compression(pipe: Pipeline, state: State, given: Given) -> tuple[State, Any]:
    return state, pack(pipe.nets, pipe.pixels, pipe.experiment, given["latent"], given["frames"])


def _selection(pipe: Pipeline, state: State, given: Given) -> tuple[State, Any]:
    return state, choose(pipe.experiment, state.memory, given["queries"], given["lots"])


def _decode(pipe: Pipeline, state: State, given: Given) -> tuple[State, Any]:
    frames, decoder = decode(pipe.pixels, state.decoder, given["latent"], first=False)
    return dataclasses.replace(state, decoder=decoder), frames


def _remember(pipe: Pipeline, state: State, given: Given) -> tuple[State, Any]:
    memory, packed, views = pipeline.remember_block(
        pipe.nets,
        pipe.experiment,
        state.memory,
        state.views,
        given["latent"],
        given["low"],
        given["looked"],
        given["words"],
    )
    return dataclasses.replace(state, memory=memory, views=views), packed


def _second(pipe: Pipeline, state: State, given: Given) -> tuple[State, Any]:
    state, frames, _ = pipe.step(state, given["words"], first=False)
    return state, frames


@dataclass(frozen=True)
class Part:
    """A row of the table of parts; `takes` names what it is given, `packs` whether it needs packed blocks."""

    run: Callable[[Pipeline, State, Given], tuple[State, Any]]
    takes: tuple[str, ...]
    packs: bool = False


PARTS = {
    "forward": Part(_forward, ("latent", "words")),
    "block": Part(_block, ("words",)),
    "selection": Part(_selection, ("queries", "lots"), packs=True),
    "decode": Part(_decode, ("latent",)),
    "compression": Part(_compression, ("latent", "frames"), packs=True),
    "commit": Part(_commit, ("full", "packed", "looked")),
    "remember": Part(_remember, ("latent", "low", "looked", "words")),
    "second": Part(_second, ("words",)),
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

    pipe: Pipeline
    state: State
    given: Given

    def run(self, name: str) -> timing.Step:
        """A part as a step from state to state."""
        return lambda state: PARTS[name].run(self.pipe, state, self.given)


def full_at(exp: Experiment) -> int:
    """The number of a block behind which nothing is empty any more: sink, recent frames and the whole archive."""
    return -(-(exp.cache.sink + exp.cache.recent) // exp.cache.block) + exp.cache.capacity


def attended(exp: Experiment) -> int:
    """Keys that a block attends to behind a full memory, its own among them."""
    seen = cache.plan(exp.cache, jnp.int32(full_at(exp)))
    return int(cache.length(exp, seen)) + exp.cache.block * exp.tokens_per_frame


def shapes(exp: Experiment) -> Scene:
    """The shapes of a scene; its model has no text encoder. Nothing runs."""
    require(
        exp.cache.archive == "device",
        "cache.archive='host' draws a block in parts; bench measures whole ones, "
        "set cache.archive=device.",
    )
    held, layers = programs.shapes_of(exp), range(exp.dit.layers)

    def form(shape: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    def tokens(count: int) -> list[KV]:
        one = form((1, count, exp.dit.heads, exp.dit.head_dim), exp.dtypes.compute)
        return [KV(k=one, v=one) for _ in layers]

    full = tokens(exp.cache.block * exp.tokens_per_frame)
    given = {
        "words": held.words,
        "latent": held.latent,
        "frames": held.frames,
        "low": held.low,
        "full": full,
        "packed": tokens(exp.tokens_per_packed_block) if exp.cache.top else None,
        "queries": [kv.k for kv in full],
        "looked": [held.looked for _ in layers],
        "lots": [form(held.chance.lots.shape[1:], held.chance.lots.dtype) for _ in layers],
    }
    state = State(
        memory=held.memory,
        archive=[],
        views=held.views,
        decoder=held.decoder,
        seed=form((), jnp.uint32),
        videos=form((1,), jnp.uint32),
    )
    nothing: Any = None
    pipe = Pipeline(
        experiment=exp, nets=held.nets, text=nothing, pixels=held.pixels, tokenizer=nothing
    )
    return Scene(pipe, state, given)


def filled(forms: Any, scale: Callable[[tuple[int, ...]], float] = lambda shape: 1.0) -> Any:
    """Random numbers in place of shapes; those that are no floats become zero."""
    leaves, tree = jax.tree.flatten(forms)
    made = [
        timing.normal(seed, x.shape, x.dtype, scale(x.shape))
        if jnp.issubdtype(x.dtype, jnp.floating)
        else jnp.zeros(x.shape, x.dtype)
        for seed, x in enumerate(leaves)
    ]
    return jax.tree.unflatten(tree, made)


def random_model(exp: Experiment) -> Pipeline:
    """A model with random weights, made on the device in the dtypes of the config; it has no text encoder."""
    pipe = shapes(exp).pipe
    spread = lambda shape: math.prod(shape[:-1]) ** -0.5  # noqa: E731  so that activations keep their size
    return _with(pipe, filled((pipe.nets, pipe.pixels), spread))


def _with(pipe: Pipeline, own: tuple[Any, Any]) -> Pipeline:
    return dataclasses.replace(pipe, nets=own[0], pixels=own[1])


def scene(pipe: Pipeline, names: Collection[str]) -> Scene:
    """A model behind a full memory of random numbers, with what the parts `names` are given."""
    exp, held = pipe.experiment, shapes(pipe.experiment)
    state: State = filled(held.state)
    memory = dataclasses.replace(state.memory, num_blocks=jnp.int32(full_at(exp)))
    given = {name: filled(held.given[name]) for part in names for name in PARTS[part].takes}
    if "looked" in given:
        given["looked"] = [
            view.newest(exp, cache.plan(exp.cache, memory.num_blocks), 1)
        ] * exp.dit.layers
    return Scene(pipe, dataclasses.replace(state, memory=memory), given)


# Figures


def operations(exp: Experiment, names: Collection[str]) -> dict[str, int]:
    """Operations of one run of each part, counted in its program; keys that only fill up a view do not count."""
    held, keys = shapes(programs.plain(exp)), attended(exp)
    whole = held.state.views[0].k.shape

    def count(part: Part) -> int:
        traced = jaxpr_cost.trace(
            lambda own, *rest: part.run(_with(held.pipe, own), *rest),
            (held.pipe.nets, held.pipe.pixels),
            held.state,
            held.given,
        )
        attending = jaxpr_cost.operations(traced, on=whole)
        return jaxpr_cost.operations(traced) - attending + attending // whole[1] * keys

    return {name: count(PARTS[name]) for name in names}


def moved(held: Scene, name: str) -> int:
    """Bytes that a part is given, read once and written once."""
    return 2 * jaxpr_cost.nbytes([held.given[taken] for taken in PARTS[name].takes])


@dataclass(frozen=True)
class Found:
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
    pipe: Pipeline,
    names: Collection[str] = (),
    *,
    warmup: int = 3,
    repeats: int = 20,
    show: timing.Show = timing.unshown,
    clock: Callable[[], float] = time.perf_counter,
) -> Found:
    """The parts `names` of a model (by default all), in rounds with the products that show the device's ceiling."""
    exp, parts = pipe.experiment, parts_of(pipe.experiment, names)
    held, products = scene(pipe, parts), timing.products(exp.dtypes.compute)
    steps = {product.name: product.step() for product in products} | {
        name: held.run(name) for name in parts
    }
    times = timing.measure(
        steps, held.state, warmup=warmup, repeats=repeats, show=show, clock=clock
    )
    return Found(
        experiment=exp,
        times=times,
        products=products,
        operations=operations(exp, parts),
        moved={name: moved(held, name) for name in parts},
    )


def blocks_a_second(exp: Experiment) -> float:
    """Blocks that make a second of video."""
    return exp.fps / (exp.cache.block * exp.codec.time_factor)


def report(found: Found) -> dict[str, Any]:
    """All figures in seconds, operations and bytes; those of `second` are of a second of video, not of one block."""
    exp, best = found.experiment, found.ceiling
    backend, why = attention.chosen(exp.attention, jnp.dtype(exp.dtypes.cache))
    ceiling = best.operations / found.times[best.name].median
    rows = {name: _row(found, name, ceiling) for name in found.operations}
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
        "rounds": len(found.times[best.name].runs),
        "ceiling": {"product": best.name, "operations_per_second": ceiling},
        "parts": rows,
        **speed,
        "metrics": metrics(found),
    }


def _row(found: Found, name: str, ceiling: float) -> dict[str, float]:
    times, times_as_much = (
        found.times[name],
        blocks_a_second(found.experiment) if name == "second" else 1,
    )
    done, bytes_moved = found.operations[name] * times_as_much, found.moved[name] * times_as_much
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


def metrics(found: Found) -> dict[str, dict[str, Any]]:
    """What can be compared between runs on a machine that others use too: ratios of times of the same rounds."""

    def metric(value: float, direction: str) -> dict[str, Any]:
        return {"value": value, "direction": direction}

    times, best = found.times, found.ceiling
    if "forward" not in found.operations:
        return {}
    share = (
        timing.ratio(times[best.name], times["forward"])
        * found.operations["forward"]
        / best.operations
    )
    return {"forward, share of ceiling": metric(share, "higher")} | {
        f"{name}/forward": metric(timing.ratio(times[name], times["forward"]), "lower")
        for name in found.operations
        if name != "forward"
    }
