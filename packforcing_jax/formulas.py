"""What an experiment costs by closed formula, from its config alone: the arithmetic that counted figures must meet.

Letters: B frames a block, s keys a frame, p keys a packed block, L layers, d width, f width of the MLP, W words,
q keys of one block (B s), S denoising steps, b videos, V room of a view.
"""

import math
from typing import TypeAlias

from packforcing_jax.config import DiTConfig, Experiment, SpaceToDepthConfig

Figures: TypeAlias = dict[str, float]
TERMS = {
    "keys/sink": "N_sink s",
    "keys/packed": "N_top p",
    "keys/recent": "N_recent s",
    "keys/cached": "sink + packed + recent",
    "keys/current": "B s",
    "keys/attended": "cached + current",
    "keys/packed twin": "p",
    "keys/room": "attended + p, rounded up",
    "last block/packed blocks it chooses from": "blocks - 1 - (N_sink + N_recent) / B, at most capacity",
    "last block/packed blocks it attends": "at most N_top",
    "last block/keys it attends": "sink + packed + recent + current, as far as there are",
    "bytes/cached": "cached 2 L d bytes b",
    "bytes/attended": "attended 2 L d bytes b",
    "bytes/one packed block": "p 2 L d bytes b",
    "bytes/archive of the last block": "one packed block for each it chooses from",
    "bytes/every block at full size": "blocks B s 2 L d bytes b",
    "held/sink": "N_sink s 2 L d bytes b",
    "held/recent": "(N_recent + spare) s 2 L d bytes b",
    "held/packed blocks": "(capacity + N_recent / B) p 2 L d bytes b",
    "held/views": "V 2 L d bytes b",
    "held/words": "W 2 L d bytes b",
    "parameters/transformer": "L (8 d d + 2 d f + f + 21 d) + ends",
    "parameters/compressor": "kernel in out + out, each layer",
    "parameters/text encoder": "vocab d + L (4 d a + 3 d f + buckets heads + 2 d) + d",
    "operations/one step": "2 b (L (6 q d d + 2 q W d + 2 q d f + 2 q V d) + ends)",
    "operations/of it self-attention": "4 b L q V d",
    "operations/one step, keys attended": "with attended for V",
    "operations/denoising": "S steps",
    "operations/selection": "2 b L windows (keys it scores) d",
    "operations/clean pass": "a step without the last layer's end",
    "operations/packing pass": "a clean pass of p, and the compressor",
    "operations/whole block": "denoising + selection + clean + packing",
    "share/selection": "selection / whole block",
}


def closed(exp: Experiment, *, blocks: int, batch: int, itemsize: int) -> Figures:
    """Every figure that has a closed formula, by name."""
    keys = keys_of(exp)
    last = last_block(exp, blocks)
    return keys | last | bytes_of(exp, keys, last, blocks, batch * 2 * exp.dit.layers * exp.dit.dim * itemsize) \
        | parameters(exp) | operations(exp, keys, batch)  # fmt: skip


def keys_of(exp: Experiment) -> Figures:
    """Keys that one layer of one video attends to, by partition (paper sec. 3.2)."""
    cfg, s, p = exp.cache, exp.tokens_per_frame, exp.tokens_per_packed_block
    sink, packed, recent, current = cfg.sink * s, cfg.attended * p, cfg.recent * s, cfg.block * s
    cached, twin = sink + packed + recent, p if cfg.top else 0
    room = math.ceil((cached + current + twin) / cfg.key_multiple) * cfg.key_multiple
    return {"keys/sink": sink, "keys/packed": packed, "keys/recent": recent, "keys/cached": cached,
            "keys/current": current, "keys/attended": cached + current, "keys/packed twin": twin,
            "keys/room": room}  # fmt: skip


def last_block(exp: Experiment, blocks: int) -> Figures:
    """What block number `blocks` sees of those before it."""
    cfg, frames = exp.cache, (blocks - 1) * exp.cache.block
    sink = min(frames, cfg.sink)
    recent = min(frames - sink, cfg.recent)
    archived = min((frames - sink - recent) // cfg.block, cfg.capacity)
    attended = min(archived, cfg.attended)
    keys = (sink + recent + cfg.block) * exp.tokens_per_frame + attended * exp.tokens_per_packed_block
    return {"last block/packed blocks it chooses from": archived, "last block/packed blocks it attends": attended,
            "last block/keys it attends": keys}  # fmt: skip


def bytes_of(exp: Experiment, keys: Figures, last: Figures, blocks: int, each: int) -> Figures:
    """Bytes of keys and values, `each` per key of all layers and videos; then of what a sampler holds."""
    cfg, s, p = exp.cache, exp.tokens_per_frame, exp.tokens_per_packed_block
    counts = {
        "bytes/cached": keys["keys/cached"], "bytes/attended": keys["keys/attended"],
        "bytes/one packed block": keys["keys/packed twin"],
        "bytes/archive of the last block": p * last["last block/packed blocks it chooses from"],
        "bytes/every block at full size": blocks * cfg.block * s,
        "held/sink": cfg.sink * s, "held/recent": cfg.ring * s, "held/packed blocks": cfg.slots * p,
        "held/views": keys["keys/room"], "held/words": exp.dit.text_len,
    }  # fmt: skip
    return {name: count * each for name, count in counts.items()}


# Parameters


def parameters(exp: Experiment) -> Figures:
    """Numbers in the weights; the video autoencoder's have no short formula."""
    found: Figures = {"parameters/transformer": _transformer(exp.dit), "parameters/compressor": _compressor(exp)[0],
                      "parameters/text encoder": _text_encoder(exp)}  # fmt: skip
    return found | {"parameters/codec": 0} if isinstance(exp.codec, SpaceToDepthConfig) else found


def _transformer(cfg: DiTConfig) -> int:
    d, cells = cfg.dim, math.prod(cfg.patch)
    layer = 8 * (d * d + d) + 2 * d * cfg.ffn_dim + cfg.ffn_dim + d + 12 * d  # norms 6 d, modulation 6 d
    ends = [(cfg.in_channels * cells, d), (cfg.text_dim, d), (d, d), (cfg.freq_dim, d), (d, d), (d, 6 * d),
            (d, cfg.out_channels * cells)]  # fmt: skip
    return cfg.layers * layer + sum((inner + 1) * outer for inner, outer in ends) + 2 * d


def _text_encoder(exp: Experiment) -> int:
    cfg = exp.text
    layer = 4 * cfg.dim * cfg.dim_attn + 3 * cfg.dim * cfg.dim_ffn + cfg.buckets * cfg.heads + 2 * cfg.dim
    return cfg.vocab * cfg.dim + cfg.layers * layer + cfg.dim


def _compressor(exp: Experiment) -> tuple[int, int]:
    """(parameters, operations on one block) of the HR branch, which LR alone does without."""
    if exp.compressor.branches == "lr":
        return 0, 0
    size, parameters, operations = (exp.compressor.frames, *exp.latent), 0, 0
    channels = (exp.dit.in_channels, *exp.compressor.channels)
    for inner, outer, stride in zip(channels, channels[1:], exp.compressor.strides, strict=False):
        kernel = (3 if stride[0] > 1 else 1, *(4 if step > 1 else 3 for step in stride[1:]))
        size = tuple((n + 2 * (k > 1) - k) // step + 1 for n, k, step in zip(size, kernel, stride, strict=True))
        parameters += (math.prod(kernel) * inner + 1) * outer
        operations += 2 * math.prod(size) * math.prod(kernel) * inner * outer
    last = channels[-1] * exp.dit.dim
    return parameters + last + exp.dit.dim, operations + 2 * math.prod(size) * last


# Operations: a multiplication with its addition is two


def operations(exp: Experiment, keys: Figures, batch: int) -> Figures:
    """Operations of one block of `batch` videos."""
    cfg, q, room = exp.cache, keys["keys/current"], keys["keys/room"]
    step = _pass(exp, q, cfg.block, room)
    once = {
        "operations/one step": step,
        "operations/of it self-attention": 4 * exp.dit.layers * q * room * exp.dit.dim,
        "operations/one step, keys attended": _pass(exp, q, cfg.block, keys["keys/attended"]),
        "operations/denoising": len(exp.sample.steps) * step,
        "operations/selection": _selection(exp, q, room),
        "operations/clean pass": _pass(exp, q, cfg.block, room, ends=False),
        "operations/packing pass": _packing(exp, room) if cfg.top else 0,
    }
    parts = ("denoising", "selection", "clean pass", "packing pass")
    once["operations/whole block"] = sum(once[f"operations/{part}"] for part in parts)
    share = {"share/selection": once["operations/selection"] / once["operations/whole block"]}
    return {name: batch * count for name, count in once.items()} | share


def _pass(exp: Experiment, q: float, frames: int, keys: float, *, ends: bool = True, asks: bool = False,
          embeds: bool = True) -> float:  # fmt: skip
    """One pass of `q` tokens. Without its `ends` it is over once the last layer has its keys, or its queries too."""
    cfg = exp.dit
    d, cells = cfg.dim, math.prod(cfg.patch)
    own, queries = 4 * q * d * d, 2 * q * d * d
    rest = 2 * q * (d * d + 2 * keys * d + 2 * d * d + 2 * cfg.text_len * d + 2 * d * cfg.ffn_dim)
    count = cfg.layers * own + (cfg.layers - 1) * (queries + rest) + (ends or asks) * queries
    count += 2 * frames * d * (cfg.freq_dim + 7 * d) + embeds * 2 * q * cfg.in_channels * cells * d
    return count + ends * (rest + 2 * q * d * cfg.out_channels * cells)


def _packing(exp: Experiment, room: float) -> float:
    """One more pass for the packed twin, or its projections alone, behind the compressor."""
    p, d, branches = exp.tokens_per_packed_block, exp.dit.dim, exp.compressor.branches
    embedding = 2 * p * exp.dit.in_channels * math.prod(exp.dit.patch) * d
    count = _compressor(exp)[1] + (branches != "hr") * embedding
    if exp.compressor.keys == "projected":
        return count + exp.dit.layers * 4 * p * d * d + 2 * d * (exp.dit.freq_dim + 7 * d)
    return count + _pass(exp, p, 1, room, ends=False, embeds=False)


SCORED = {"affinity": "all", "mass_sum": "all", "mass_max": "all", "logit_max": "packed", "centred_logit_max": "packed",
          "log_sum_exp": "packed", "paper_sum": "sums"}  # fmt: skip


def _selection(exp: Experiment, q: float, room: float) -> float:
    """Products of queries averaged over windows with the keys that a policy scores (the paper's: of two sums).

    A choice that all layers share from the first step on takes one more pass to ask in.
    """
    cfg = exp.cache
    windows = math.prod(size // step for size, step in zip((cfg.block, *exp.grid), cfg.score_pool, strict=True))
    packed, sharp = cfg.slots * exp.tokens_per_packed_block, (cfg.sink + cfg.recent) * exp.tokens_per_frame
    pairs = {"all": windows * (packed + sharp), "packed": windows * packed, "sums": cfg.slots, None: 0}
    scored = SCORED.get(cfg.selection) if cfg.attended else None
    asked = (cfg.scope, cfg.timing) == ("shared", "first")
    glance = _pass(exp, q, cfg.block, room, ends=False, asks=scored is not None) if asked else 0
    return 2 * exp.dit.layers * pairs[scored] * exp.dit.dim + glance
