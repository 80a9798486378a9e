"""What an experiment costs by closed formula, from its config alone: the arithmetic that counted figures must meet.

Letters: B frames a block, s keys a frame, p keys a packed block, L layers, d width, f width of the MLP, W words,
q keys that are denoised at once (B s, or those of a window of blocks), S passes to denoise a block, b videos, V room of
the view that they are denoised in; `bytes` are those of one number.
Networks that a config builds itself have no formula here: what depends on their insides is counted alone.
"""

import math
from typing import Literal, TypeAlias, TypeGuard

from packforcing_jax.config import (
    CompressorConfig,
    DiTConfig,
    Experiment,
    SpaceToDepthConfig,
    TextConfig,
    VAEConfig,
)
from packforcing_jax.policies import eviction

Figures: TypeAlias = dict[str, float]
PARTS = ("denoising", "selection", "clean pass", "packing pass")  # operations of one whole block
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
TERMS = {
    "keys/sink": "N_sink s",
    "keys/packed": "N_top p",
    "keys/recent": "N_recent s",
    "keys/cached": "sink + packed + recent",
    "keys/current": "q",
    "keys/attended": "cached + current",
    "keys/packed twin": "p",
    "keys/room": "attended + p, rounded up",
    "last block/packed blocks it chooses from": "blocks - 1 - (N_sink + N_recent) / B, up to capacity",
    "last block/packed blocks it attends": "at most N_top",
    "last block/keys it attends": "sink + packed + recent + current, as far as there are",
    "bytes/cached": "attended of the memory: cached 2 L d bytes b",
    "bytes/attended": "attended 2 L d bytes b",
    "bytes/one packed block": "p 2 L d bytes b",
    "bytes/archive of the last block": "one packed block for each it chooses from",
    "bytes/every block at full size": "blocks B s 2 L d bytes b",
    "held/keys and values": "views + archive + un-rotated keys",
    "held/views": "V (of a block committed alone) 2 L d bytes b",
    "held/archive": "(capacity + N_recent / B) p 2 L d bytes b",
    "held/un-rotated keys": "N_recent s L d bytes b; N_sink if that moves",
    "held/recent latents": "frames at full size, cells channels 4 b",
    "held/recent queries": "L N_recent / B sums d 4 b",
    "held/what is known of tokens": "(12 sink + recent + B frames s + 4 d kept queries) L b",
    "held/blocks in the window": "N_window cells channels 4 b, two counters",
    "held/text_kv": "W 2 L d bytes b",
    "held/weights": "transformer + compressor + codec",
    "held/decoder": "what the codec remembers of frames before",
    "held/on the device": "all of it that does not lie on the host",
    "held/on the host": "the archive, where cache.archive=host",
    "snapshots/one state": "held between blocks, without scratch",
    "snapshots/most of a session, by default": "two, or as many as 256 MiB hold",
    "weights/transformer": "parameters bytes",
    "weights/compressor": "parameters bytes",
    "weights/codec": "parameters bytes",
    "weights/text encoder, on disk alone": "parameters bytes",
    "weights/of it while prompts are read": "parameters of two layers, bytes",
    "weights/text states of one prompt": "words d bytes",
    "workspace/decoding": "a part of showing",
    "workspace/low-resolution encode": "a part of showing",
    "peak/loading": "weights",
    "peak/reading prompts": "held + frames + two layers of the encoder + its own",
    "peak/denoising": "held + frames + its own",
    "peak/showing": "held + frames + its own + new frames and decoder",
    "peak/committing": "held + frames of two blocks + new decoder + its own",
    "peak/on the device": "the highest of these",
    "peak/on the host": "archive there + frames of two blocks",
    "peak/both, in one memory": "as on a CPU",
    "parameters/transformer": "L (8 d d + 2 d f + f + 21 d) + ends",
    "parameters/compressor": "kernel in out + out, each layer",
    "parameters/text encoder": "vocab d + L (4 d a + 3 d f + buckets heads + 2 d) + d",
    "operations/one step": "2 b (L q (6 d d + 2 W d + 2 d f + 2 V d) + ends)",
    "operations/of it self-attention": "4 b L q V d",
    "operations/one step, keys attended": "with attended for V",
    "operations/denoising": "S steps, one in a window of blocks",
    "operations/selection": "2 b L windows (keys) d, of the heads it scores",
    "operations/clean pass": "a step of one block without the last layer's end",
    "operations/packing pass": "a clean pass of p, and the compressor",
    "operations/whole block": "denoising + selection + clean + packing",
    "share/selection": "selection / whole block",
}


def closed(exp: Experiment, *, blocks: int, batch: int) -> Figures:
    """Every figure that has a closed formula, by name."""
    keys = keys_of(exp)
    return (
        keys
        | last_block(exp, blocks)
        | bytes_of(exp, blocks, batch)
        | resident(exp, batch)
        | parameters(exp)
        | weights(exp)
        | operations(exp, keys, batch)
    )


def keys_of(exp: Experiment) -> Figures:
    """Keys that one layer of one video attends to, by partition (paper sec. 3.2)."""
    cfg = exp.cache
    s = exp.tokens_per_frame
    p = exp.tokens_per_packed_block
    sink = cfg.sink * s
    packed = cfg.attended * p
    recent = (max(_compressed_lengths(exp)) - cfg.sink if cfg.budget else cfg.recent) * s
    current = cfg.together * s
    cached = sink + packed + recent
    own_packed = p if cfg.top else 0
    unused = cfg.recent * s - recent  # of a window that no number of blocks fills
    ahead = (cfg.window - cfg.block) * s if cfg.joint else 0  # a window that shrinks sees more
    room = _rounded(exp, cached + unused + ahead + current + own_packed)
    return {
        "keys/sink": sink,
        "keys/packed": packed,
        "keys/recent": recent,
        "keys/cached": cached,
        "keys/current": current,
        "keys/attended": cached + current,
        "keys/packed twin": own_packed,
        "keys/room": room,
    }


def _compressed_lengths(exp: Experiment, blocks: int | None = None) -> list[int]:
    """Frames that each of so many blocks sees before it, where a full window is compressed; by default, of enough."""
    cfg = exp.cache
    lengths = [0]
    for _ in range((2 * cfg.full_frames // cfg.block + 1 if blocks is None else blocks) - 1):
        held = lengths[-1] + cfg.block
        lengths.append(held if held + cfg.block <= cfg.full_frames else cfg.budget - cfg.block)
    return lengths


def _rounded(exp: Experiment, keys: float) -> int:
    return math.ceil(keys / exp.cache.key_multiple) * exp.cache.key_multiple


def _stored(exp: Experiment) -> int:
    """Keys of the view that is kept from block to block."""
    cfg, s = exp.cache, exp.tokens_per_frame
    if cfg.joint:
        return cfg.sink * s + _alone(exp)
    return int(keys_of(exp)["keys/room"])


def _alone(exp: Experiment) -> int:
    """Keys of the view that a block is committed in."""
    cfg, s = exp.cache, exp.tokens_per_frame
    if cfg.joint:
        return _rounded(exp, (cfg.sink + cfg.recent + cfg.window) * s)
    return int(keys_of(exp)["keys/room"])


def last_block(exp: Experiment, blocks: int) -> Figures:
    """What block number `blocks` sees of those before it, if the archive forgets the oldest first."""
    cfg = exp.cache
    frames = (blocks - 1) * exp.cache.block
    if cfg.evicts is not eviction.FIFO:
        return {}
    sink = min(frames, cfg.sink)
    longer = (
        cfg.window - cfg.block if cfg.joint else 0
    )  # the last window of a video is its shortest
    if cfg.budget:
        frames = _compressed_lengths(exp, blocks)[-1]
    recent = min(frames - sink, cfg.recent + longer)
    archived = min((frames - sink - recent) // cfg.block, cfg.capacity)
    attended = min(archived, cfg.attended)
    keys = (
        sink + recent + cfg.block
    ) * exp.tokens_per_frame + attended * exp.tokens_per_packed_block
    return {
        "last block/packed blocks it chooses from": archived,
        "last block/packed blocks it attends": attended,
        "last block/keys it attends": keys,
    }


def token_bytes(exp: Experiment, batch: int, dtype: str) -> int:
    """Bytes of the keys and values of one token in all layers, for `batch` videos."""
    return batch * 2 * exp.dit.layers * exp.dit.heads * exp.dit.head_dim * BYTES[dtype]


def bytes_of(exp: Experiment, blocks: int, batch: int) -> Figures:
    """Bytes of stored keys and values."""
    keys = keys_of(exp)
    last = last_block(exp, blocks)
    each = token_bytes(exp, batch, exp.dtypes.cache)
    counts = {
        "bytes/cached": keys["keys/cached"],
        "bytes/attended": keys["keys/attended"],
        "bytes/one packed block": keys["keys/packed twin"],
        "bytes/every block at full size": blocks * exp.cache.block * exp.tokens_per_frame,
    }
    if last:
        packed = last["last block/packed blocks it chooses from"]
        counts["bytes/archive of the last block"] = packed * exp.tokens_per_packed_block
    return {name: count * each for name, count in counts.items()}


def resident(exp: Experiment, batch: int) -> Figures:
    """Bytes that lie there from the first block to the last beside weights and the codec's state."""
    cfg = exp.cache
    spec = exp.memory
    s = exp.tokens_per_frame
    unrotated = cfg.recent * spec.recent_moves + cfg.sink * spec.sink_moves
    counts = {
        "held/views": _stored(exp),
        "held/archive": cfg.slots * exp.tokens_per_packed_block,
        "held/un-rotated keys": unrotated * s / 2,  # they have no values
    }
    each = token_bytes(exp, batch, exp.dtypes.cache)
    figures: Figures = {name: int(count * each) for name, count in counts.items()}
    figures["held/keys and values"] = sum(figures.values())
    figures["held/recent latents"] = 4 * batch * cfg.full_frames * math.prod(spec.latent)
    if cfg.asking_blocks:
        figures["held/recent queries"] = 4 * batch * spec.layers * cfg.asking_blocks * exp.dit.dim
    if cfg.budget:
        known = spec.full_res * 3 * 4 + 4 * spec.kept_queries * spec.heads * spec.head_dim
        figures["held/what is known of tokens"] = batch * spec.layers * known
    if cfg.joint:
        figures["held/blocks in the window"] = 4 * batch * cfg.window * math.prod(spec.latent) + 8
    figures["held/on the host"] = figures["held/archive"] if cfg.archive == "host" else 0
    if _is_ours(exp.dit):
        figures["held/text_kv"] = exp.dit.text_len * token_bytes(exp, batch, exp.dtypes.compute)
    return figures


def _is_ours(model: object) -> TypeGuard[DiTConfig]:
    """Whether a base model is the one whose insides the formulas know."""
    return type(model) is DiTConfig


def all_known(exp: Experiment) -> bool:
    """Whether every network is one of the project's own."""
    codecs = (VAEConfig, SpaceToDepthConfig)
    compressor = type(exp.compressor) is CompressorConfig
    return _is_ours(exp.dit) and type(exp.codec) in codecs and compressor


def logits(exp: Experiment, batch: int) -> int:
    """Bytes of all queries by all keys of one layer, held in float32."""
    keys = keys_of(exp)
    return int(4 * batch * exp.dit.heads * keys["keys/current"] * keys["keys/room"])


def largest(exp: Experiment, batch: int) -> int:
    """Bytes of the largest array of intermediate values of any program of a block, held in float32.

    Only where `all_known`.
    """
    cfg = exp.cache
    model = exp.dit
    text_len = exp.text.max_words
    keys = keys_of(exp)
    q = keys["keys/current"]
    packed = cfg.slots * exp.tokens_per_packed_block
    full_size = (cfg.sink + cfg.recent) * exp.tokens_per_frame
    width = exp.codec.dim * max(exp.codec.dim_mult[:2]) if isinstance(exp.codec, VAEConfig) else 3
    cells = (
        (cfg.block + 1) * math.prod(exp.latent) * exp.codec.time_factor * exp.codec.space_factor**2
    )
    each = {
        "mlp": q * max(model.ffn_dim if _is_ours(model) else 0, 6 * model.dim),
        "scores": model.heads * _windows(exp) * (packed + full_size),
        "archive": packed * model.dim,
        "view": keys["keys/room"] * model.dim,
        "frames": cells * width,
    }
    text = text_len * max(exp.text.dim_ffn, exp.text.heads * text_len, exp.text.dim)
    return max(logits(exp, batch), 4 * int(max(batch * max(each.values()), text)))


# Parameters


def parameters(exp: Experiment) -> Figures:
    """Numbers in the weights; the video autoencoder's have no short formula."""
    counts: Figures = {"parameters/text encoder": _text_encoder(exp.text)}
    if _is_ours(exp.dit):
        counts["parameters/transformer"] = _transformer(exp.dit)
    if type(exp.compressor) is CompressorConfig:
        counts["parameters/compressor"] = _compressor(exp)[0]
    if type(exp.codec) is SpaceToDepthConfig:
        counts["parameters/codec"] = 0
    return counts


def weights(exp: Experiment) -> Figures:
    """Bytes of the weights of every network that has a formula for them."""
    dtypes = exp.dtypes
    numbers = parameters(exp)
    stored = {"transformer": dtypes.params, "compressor": dtypes.params, "codec": dtypes.vae}
    sizes = {
        f"weights/{name}": numbers[f"parameters/{name}"] * BYTES[dtype]
        for name, dtype in stored.items()
        if f"parameters/{name}" in numbers
    }
    return sizes | {
        "weights/text encoder, on disk alone": numbers["parameters/text encoder"]
        * BYTES[dtypes.text],
        "weights/of it while prompts are read": 2 * _text_layer(exp.text) * BYTES[dtypes.text],
        "weights/text states of one prompt": exp.text.max_words * exp.text.dim * BYTES[dtypes.text],
    }


def _transformer(cfg: DiTConfig) -> int:
    d = cfg.dim
    cells = math.prod(cfg.patch)
    layer = (
        8 * (d * d + d) + 2 * d * cfg.ffn_dim + cfg.ffn_dim + d + 12 * d
    )  # norms 6 d, modulation 6 d
    ends = [
        (cfg.in_channels * cells, d),
        (cfg.text_dim, d),
        (d, d),
        (cfg.freq_dim, d),
        (d, d),
        (d, 6 * d),
        (d, cfg.out_channels * cells),
    ]
    return cfg.layers * layer + sum((inner + 1) * outer for inner, outer in ends) + 2 * d


def transformer_share(cfg: DiTConfig, fsdp: int, tensor: int) -> int:
    """Numbers of a transformer on each device of a mesh: matrices in `fsdp` times `tensor` parts, vectors by `tensor`.

    What an axis does not divide lies whole along it.
    """
    d, f = cfg.dim, cfg.ffn_dim
    cells = math.prod(cfg.patch)

    def cut(size: int, parts: int) -> int:
        return size // parts if size % parts == 0 else size

    square = cut(d, fsdp) * cut(d, tensor)
    wide = cut(d, fsdp) * cut(f, tensor)
    # eight projections; biases and norms of queries, keys and values; the MLP; what every device reads whole
    layer = 8 * square + 10 * cut(d, tensor) + 2 * wide + cut(f, tensor) + 11 * d
    both = fsdp * tensor
    columns = [(cfg.in_channels * cells, d), (d, d), (cfg.freq_dim, d), (d, d), (d, 6 * d)]
    rows = [(cfg.text_dim, d), (d, cfg.out_channels * cells)]
    ends = sum(inner * cut(outer, both) + outer for inner, outer in columns)
    ends += sum(cut(inner, both) * outer + outer for inner, outer in rows)
    return cfg.layers * layer + ends + 2 * d


def _text_layer(cfg: TextConfig) -> int:
    return (
        4 * cfg.dim * cfg.dim_attn
        + 3 * cfg.dim * cfg.dim_ffn
        + cfg.buckets * cfg.heads
        + 2 * cfg.dim
    )


def _text_encoder(cfg: TextConfig) -> int:
    return cfg.vocab * cfg.dim + cfg.layers * _text_layer(cfg) + cfg.dim


def _compressor(exp: Experiment) -> tuple[int, int]:
    """(parameters, operations on one block) of the HR branch, which LR alone does without."""
    if exp.compressor.branches not in ("both", "hr"):
        return 0, 0
    size = (exp.compressor.frames, *exp.latent)
    parameters = 0
    operations = 0
    channels = (exp.dit.in_channels, *exp.compressor.channels)
    for inner, outer, stride in zip(channels, channels[1:], exp.compressor.strides, strict=False):
        across = (exp.compressor.strided_kernel if step > 1 else 3 for step in stride[1:])
        kernel = (3 if stride[0] > 1 else 1, *across)
        size = tuple(
            (n + 2 * (k > 1) - k) // step + 1
            for n, k, step in zip(size, kernel, stride, strict=True)
        )
        parameters += (math.prod(kernel) * inner + 1) * outer
        operations += 2 * math.prod(size) * math.prod(kernel) * inner * outer
    last = channels[-1] * exp.dit.dim
    operations += 2 * math.prod(size) * last
    return parameters + last + exp.dit.dim, operations + _pooling(exp, size)


def _pooling(exp: Experiment, size: tuple[int, ...]) -> int:
    """Operations of the averages that make (frames, rows, columns) out of `size`, one axis after the other."""
    if not exp.compressor.adaptive_pool:
        return 0
    (frames, rows, columns), (_, down, across) = size, exp.packed_grid
    first = 2 * down * rows * columns if down != rows else 0
    second = 2 * across * columns * down if across != columns else 0
    return frames * exp.dit.dim * (first + second)


# Operations: a multiplication with its addition is two


def operations(exp: Experiment, keys: Figures, batch: int) -> Figures:
    """Operations of one block of `batch` videos, as far as the networks are the project's own."""
    cfg = exp.cache
    model = exp.dit
    q = keys["keys/current"]
    room = keys["keys/room"]
    own = cfg.block * exp.tokens_per_frame
    once: Figures = {}
    if _is_ours(model):
        step = _pass(model, q, cfg.together, room)
        once |= {
            "operations/one step": step,
            "operations/of it self-attention": 4 * model.layers * q * room * model.dim,
            "operations/one step, keys attended": _pass(
                model, q, cfg.together, keys["keys/attended"]
            ),
            "operations/denoising": (1 if cfg.joint else len(exp.sample.steps)) * step,
            "operations/clean pass": _pass(
                model,
                own,
                cfg.block,
                _alone(exp),
                until="queries" if cfg.asking_blocks else "keys",
            ),
        }
        if type(exp.compressor) is CompressorConfig:
            once["operations/packing pass"] = _packing(exp, model, room) if cfg.top else 0
    if _is_ours(model) or not _asks_before(exp):
        once["operations/selection"] = _selection(exp, q, room)
    parts = [f"operations/{part}" for part in PARTS]
    if not once.keys() >= set(parts):
        return {name: batch * count for name, count in once.items()}
    once["operations/whole block"] = whole = sum(once[part] for part in parts)
    share = {"share/selection": once["operations/selection"] / whole}
    return {name: batch * count for name, count in once.items()} | share


def _pass(
    cfg: DiTConfig,
    q: float,
    frames: int,
    keys: float,
    *,
    until: Literal["keys", "queries", "output"] = "output",
    embeds: bool = True,
) -> float:
    """One pass of `q` tokens, `until` the last layer has its keys, its queries too, or the output is there."""
    d = cfg.dim
    cells = math.prod(cfg.patch)
    own = 4 * q * d * d  # projections to keys and values
    queries = 2 * q * d * d
    # output projection, attention, query and output of cross-attention, cross-attention, feed-forward
    rest = 2 * q * (d * d + 2 * keys * d + 2 * d * d + 2 * cfg.text_len * d + 2 * d * cfg.ffn_dim)
    count = cfg.layers * own + (cfg.layers - 1) * (queries + rest) + (until != "keys") * queries
    # embedding of each frame's time and its modulation; embedding of the patches
    count += 2 * frames * d * (cfg.freq_dim + 7 * d) + embeds * 2 * q * cfg.in_channels * cells * d
    return count + (until == "output") * (rest + 2 * q * d * cfg.out_channels * cells)


def score(cfg: DiTConfig, q: int, frames: int, prompts: int) -> float:
    """One bidirectional pass over a clip of `q` tokens, and the reading of its prompts."""
    d = cfg.dim
    text = cfg.text_dim * d + d * d + cfg.layers * 2 * d * d
    return _pass(cfg, q, frames, q) + 2 * prompts * cfg.text_len * text


def _packing(exp: Experiment, cfg: DiTConfig, room: float) -> float:
    """One more pass for the block's own packed tokens, or their projections alone, behind the compressor."""
    p = exp.tokens_per_packed_block
    d = cfg.dim
    if exp.compressor.branches == "own":
        own = exp.cache.block * exp.tokens_per_frame
        return cfg.layers * 4 * p * own * d if p != own else 0
    embedding = 2 * p * cfg.in_channels * math.prod(cfg.patch) * d
    count = _compressor(exp)[1] + exp.packs_pixels * embedding
    if exp.compressor.keys != "blocks":
        modulation = 2 * d * (cfg.freq_dim + 7 * d) if exp.compressor.keys == "projected" else 0
        return count + cfg.layers * 4 * p * d * d + modulation
    return count + _pass(cfg, p, 1, room, until="keys", embeds=False)


def _windows(exp: Experiment) -> int:
    """Windows that the queries of a block are averaged over."""
    sizes = zip((exp.cache.block, *exp.grid), exp.cache.score_pool, strict=True)
    return math.prod(size // step for size, step in sizes)


def _asks_before(exp: Experiment) -> bool:
    """Whether a choice that all layers share from the first step on takes one more pass to ask in."""
    cfg = exp.cache
    return cfg.top > 0 and (cfg.scope, cfg.timing) == ("shared", "first")


def _selection(exp: Experiment, q: float, room: float) -> float:
    """Products of queries averaged over windows with the keys that the score reads, and the pass to ask in."""
    cfg = exp.cache
    pairs = 0.0
    packed = cfg.slots * exp.tokens_per_packed_block
    full_res = (cfg.sink + cfg.recent) * exp.tokens_per_frame
    if cfg.attended:
        pairs = cfg.score.reads(_windows(exp), packed, full_res, cfg.slots)
    elif cfg.chosen:
        pairs = cfg.fuses.reads(exp.memory.kept_queries) * exp.memory.candidates
    asking = 0.0
    if _is_ours(exp.dit) and _asks_before(exp):
        until = "queries" if pairs > 0 else "keys"
        asking = _pass(exp.dit, q, cfg.block, room, until=until)
    passes = 1
    if cfg.chooses_anew:
        passes = len(exp.sample.steps) + 1  # and the commit
        own = (
            _is_ours(exp.dit) and not cfg.asking_blocks
        )  # the last layer's queries: for that alone
        if own:
            asking += 2 * cfg.block * exp.tokens_per_frame * exp.dit.dim**2
    heads = exp.memory.scored_heads
    return 2 * exp.dit.layers * pairs * heads * exp.dit.head_dim * passes + asking
