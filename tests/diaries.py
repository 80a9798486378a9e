"""Runs without a network: a list of frames walked through block by block, of which a trace is kept."""

import types
import zlib

import numpy as np

from packforcing_jax.config import CacheConfig
from packforcing_jax.sampling import trace

SMALL = CacheConfig(
    block=3, sink=6, recent=3, top=4, capacity=7, max_position=20, score_pool=(1, 1, 1)
)
HEAD = {"seed": 5, "prompts": [[0, "a fox"], [9, "ein Mädchen 狐"]]}
LAYERS = 3


def experiment(cfg=SMALL, layers=LAYERS):
    """What `trace.header` reads of an experiment."""
    return types.SimpleNamespace(name="stage", cache=cfg, dit=types.SimpleNamespace(layers=layers))


def head(cfg=SMALL, layers=LAYERS):
    return trace.header(experiment(cfg, layers), **HEAD)


def _past(cfg, block):
    """(sink frames, packed blocks that can be recalled, recent frames) that stand before `block`, oldest first."""
    frames = list(range(block * cfg.block))
    sink = frames[: cfg.sink]
    rest = frames[cfg.sink :]
    recent = rest[max(len(rest) - cfg.recent, 0) :]
    sharp = {frame // cfg.block for frame in sink + recent}
    packed = [id for id in range(block) if id not in sharp][-cfg.capacity :] if cfg.top else []
    return sink, packed, recent


def _row(cfg, block, count):
    """First places of (sink, each of `count` packed blocks, recent, current), and what a packed block takes."""
    sink, _, recent = _past(cfg, block)
    step = float(cfg.block)
    left = cfg.max_position - cfg.sink - cfg.recent - cfg.block
    if cfg.span == "fit" and left < max(count, 1) * step:
        step = left / max(count, 1)
    at = np.cumsum([0, len(sink), *[step] * count, len(recent)])
    moved = at if cfg.rope_adjustment == "sink" else at + block * cfg.block - at[-1]
    sink_position = 0 if cfg.rope_adjustment == "none" else moved[0]
    return sink_position, moved[1:-2], moved[-2], moved[-1], step


def finished(cfg=SMALL, blocks=40, layers=LAYERS, seed=0, first=0):
    """What a pipeline would hand over for each block from `first` on; every layer recalls at random."""
    rng = np.random.default_rng(seed)
    for block in range(first, blocks):
        sink, packed, recent = _past(cfg, block)
        count = min(len(packed), cfg.attended)
        sink_position, row, recent_position, current_position, step = _row(cfg, block, count)
        chosen = np.full((layers, cfg.attended), -1)
        places = np.full((layers, cfg.attended), np.nan)
        scores = np.full((layers, cfg.attended), -np.inf)
        for layer in range(layers):
            ids = sorted(rng.choice(packed, count, replace=False)) if count else []
            chosen[layer, :count] = chosen[0, :count] if cfg.scope == "shared" and layer else ids
            in_row = cfg.rope_adjustment in ("sink", "incremental")
            places[layer, :count] = row if in_row else chosen[layer, :count] * cfg.block
            scores[layer, :count] = rng.exponential(size=count)
        held = np.array(list(range((block + 1) * cfg.block))[: cfg.sink])
        yield types.SimpleNamespace(
            index=block,
            prompt="a fox" if block < 9 else "ein Mädchen 狐",
            block_ids=chosen,
            scores=scores.astype("f4"),
            positions=places.astype("f4"),
            latent=rng.normal(size=(cfg.block, 2, 3, 5)).astype("f4"),
            sink_sum=zlib.crc32(held.tobytes()),
            layout={
                "sink_position": sink_position,
                "sink": len(sink),
                "recent_position": recent_position,
                "recent": len(recent),
                "current_position": current_position,
                "block": cfg.block,
                "step": step,
                "num_selected": count,
            },
        )


def write(path, cfg=SMALL, **run):
    """The path of the trace of a run."""
    with trace.Writer(path, head(cfg, run.get("layers", LAYERS))) as writer:
        for block in finished(cfg, **run):
            writer.write(block)
    return path
