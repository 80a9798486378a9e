"""A slow memory in plain numpy: every block in a list, every position from the paper's rules, all in 64 bit."""

import types

import numpy as np


def turn(x, angles):
    """`x` [..., k, n, 2 pairs] with pair j of token i turned by angles[..., i, j], as complex numbers."""
    numbers = (x[..., 0::2] + 1j * x[..., 1::2].astype(float)) * np.exp(1j * angles)[..., None, :]
    return np.stack([numbers.real, numbers.imag], axis=-1).reshape(
        numbers.shape[:-1] + x.shape[-1:]
    )


def angles_of(exp, times, rows=0.0, columns=0.0):
    """Angles [..., pairs] of positions in time, rows and columns."""
    places = np.broadcast_arrays(times, rows, columns)
    return np.concatenate(
        [
            np.asarray(place, float)[..., None] * theta ** (-np.arange(pairs) / max(pairs, 1))
            for place, pairs, theta in zip(places, exp.dit.pairs, exp.dit.rope_theta)
        ],
        axis=-1,
    )


def frame_grid(exp):
    """Rows and columns [s] of the tokens of one frame."""
    return np.mgrid[: exp.grid[0], : exp.grid[1]].reshape(2, -1).astype(float)


def packed_grid(exp):
    """Frames after the block's first, rows and columns, [p] each, of the tokens of a packed block."""
    size = [int(np.prod([step[axis] for step in exp.compressor.strides])) for axis in range(3)]
    covered = [
        [f for f in range(i * size[0], (i + 1) * size[0]) if f < exp.cache.block]
        for i in range(exp.compressor.frames // size[0])
    ]
    frames = [np.mean(some) if some else exp.cache.block - 1 for some in covered]

    def along(axis):
        cells = np.arange(
            exp.latent[axis - 1] // size[axis] * size[axis]
        )  # latent cells, counted in tokens
        middles = ((cells + 0.5) / exp.dit.patch[axis] - 0.5).reshape(-1, size[axis]).mean(axis=1)
        return middles if exp.compressor.positions == "stretched" else np.arange(len(middles))

    return [place.ravel() for place in np.meshgrid(frames, along(1), along(2), indexing="ij")]


def visible(cfg, blocks, gap=0.0, scene=0, first=0):
    """What the next block may see after `blocks` blocks, and where in time each part begins.

    The sink begins with block `scene`; of what is behind it nothing from before block `first` is seen.
    """
    start = blocks * cfg.block
    begin = scene * cfg.block
    sink = range(begin, start)[: cfg.sink]
    behind = range(max(begin + cfg.sink, first * cfg.block), start)
    recent = behind[max(len(behind) - cfg.recent, 0) :]
    packed = [b for b in range(blocks) if b * cfg.block >= behind.start] if cfg.top else []
    middle = [b for b in packed if (b + 1) * cfg.block <= start - cfg.recent]
    held = {}  # slot -> block that was written to it last
    for item, b in enumerate(packed):
        held[int(cfg.evicts.slot_of(item, cfg.slots))] = b
    slot_of = {b: slot for slot, b in held.items() if slot >= 0 and b in middle}
    archive = sorted(slot_of)
    count = min(len(archive), cfg.capacity if cfg.selection == "all" else cfg.top)
    fitted = max(cfg.max_position - cfg.sink - cfg.recent - cfg.block, 1) / max(count, 1)
    step = min(cfg.block, fitted) if cfg.span == "fit" else cfg.block
    behind_sink = [
        0,
        len(sink),
        len(sink) + count * step + gap,
        len(sink) + count * step + gap + len(recent),
    ]
    moved = 0 if cfg.rope_adjustment == "sink" else start - behind_sink[-1]
    sink_position, mid_position, recent_position, current_position = (
        position + moved for position in behind_sink
    )
    sink_position = begin if cfg.rope_adjustment == "none" else sink_position
    return types.SimpleNamespace(
        blocks=blocks,
        start=start,
        behind=behind.start,
        sink=sink,
        recent=recent,
        middle=middle,
        archive=archive,
        slots=[slot_of[b] for b in archive],
        count=count,
        step=step,
        gap=gap,
        sink_position=sink_position,
        mid_position=mid_position,
        recent_position=recent_position,
        current_position=current_position,
    )


def begins(cfg, seen, ids):
    """Position in time of the first frame of each attended packed block, in the shape of `ids` [..., count]."""
    if cfg.rope_adjustment in ("sink_only", "none"):
        return ids * cfg.block
    if cfg.rope_adjustment == "sink":
        return np.broadcast_to(len(seen.sink) + np.arange(seen.count) * seen.step, ids.shape)
    middle = np.asarray(
        seen.middle, int
    )  # the paper's figure 2c: moved on by what was dropped behind it
    dropped = ~(middle[:, None] == ids[..., None, :]).any(-1)
    later = middle > ids[..., None]
    return (ids + (later & dropped[..., None, :]).sum(-1)) * cfg.block - seen.gap


def packed_span(cfg, seen):
    """How much a packed block's own frames are squeezed."""
    return 1 if cfg.rope_adjustment in ("sink_only", "none") else seen.step / cfg.block


def full_res(exp, story, frames, first):
    """Keys turned to the positions first, first+1, ... and values of whole frames, [layer, b, k, n, h]."""
    size = exp.grid[0] * exp.grid[1]
    block = exp.cache.block
    tokens = (np.asarray(frames, int)[:, None] * size + np.arange(size)).ravel()
    k, v = (
        np.moveaxis(x[tokens // (block * size), :, :, tokens % (block * size)], 0, 2)
        for x in story.full
    )
    rows, columns = np.tile(frame_grid(exp), len(frames))
    return turn(
        k, angles_of(exp, np.repeat(first + np.arange(len(frames)), size), rows, columns)
    ), v


def both_ends(exp, story, seen):
    """Keys and values of the sink and of the recent frames, each at its position."""
    return [
        full_res(exp, story, *part)
        for part in ((seen.sink, seen.sink_position), (seen.recent, seen.recent_position))
    ]


def twins(exp, story, ids, times):
    """Keys of the packed blocks `ids` [layer, b, m] turned to `times` [..., p], and values, [layer, b, m, p, n, h]."""
    layer, video = (x[..., None] for x in np.indices(ids.shape[:2]))
    k, v = (x[ids, layer, video] for x in story.packed)
    return turn(k, angles_of(exp, times, *packed_grid(exp)[1:])), v


def pooled_queries(exp, seen, q):
    """Queries averaged over windows and turned to the windows' centres, [layer, b, window, n, h]."""
    cfg = exp.cache
    rows, columns = exp.grid
    pt, py, px = cfg.score_pool
    corners = [
        (t, y, x)
        for t in range(0, cfg.block - pt + 1, pt)
        for y in range(0, rows - py + 1, py)
        for x in range(0, columns - px + 1, px)
    ]
    grid = q.reshape(*q.shape[:2], cfg.block, rows, columns, *q.shape[3:]).astype(float)
    pooled = [grid[:, :, t : t + pt, y : y + py, x : x + px].mean((2, 3, 4)) for t, y, x in corners]
    t, y, x = (np.asarray(corners) + (np.asarray(cfg.score_pool) - 1) / 2).T
    return turn(np.stack(pooled, axis=2), angles_of(exp, seen.current_position + t, y, x))


def affinity(exp, story, seen, q, archive):
    """Softmax over archive, sink and recent; each block's mass to the fourth, summed over queries and heads."""
    frames = packed_grid(exp)[0] * seen.step / exp.cache.block
    packed, _ = twins(exp, story, archive, seen.mid_position + seen.count * seen.step / 2 + frames)
    asked = pooled_queries(exp, seen, q)
    size = np.sqrt(asked.shape[-1])
    keys = [
        packed.reshape(*packed.shape[:2], -1, *packed.shape[-2:]),
        *(k for k, _ in both_ends(exp, story, seen)),
    ]
    logits = (
        np.einsum("lbqnh,lbknh->lbqnk", asked, np.concatenate(keys, axis=2), optimize=True) / size
    )
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    mass = weights[..., : archive.shape[2] * len(frames)].reshape(
        *weights.shape[:-1], archive.shape[2], len(frames)
    )
    return (mass.sum(-1) ** 4).sum((2, 3))


def clean_queries(q):
    """What a block's clean pass asks [..., k, n, h] in a story: what the block asks, the last token first."""
    return q[..., ::-1, :, :]


def paper_sum(exp, story, seen, q, archive):
    """The paper's double sum of raw products of all queries with all of a block's keys, at true frames."""
    return products(exp, story, archive, {seen.blocks: q})


def paper(exp, story, seen, q, archive):
    """The same over some heads and some tokens, of the recent blocks' clean passes too."""
    cfg = exp.cache
    asking = {seen.blocks: q}
    if cfg.recent_queries:
        recent = {frame // cfg.block for frame in seen.recent}
        asking |= {block: clean_queries(story.q[block]) for block in recent}
    heads = max(int(cfg.score_heads * exp.dit.heads), 1)
    return products(exp, story, archive, asking, heads, cfg.query_stride)


def products(exp, story, archive, asking, heads=None, stride=1):
    """Sums [layer, b, m] of products of the queries [layer, b, q, n, h] of some blocks with the keys of packed ones."""
    keys, _ = twins(exp, story, archive, archive[..., None] * exp.cache.block + packed_grid(exp)[0])
    rows, columns = np.tile(frame_grid(exp), exp.cache.block)
    frames = np.repeat(np.arange(exp.cache.block), len(rows) // exp.cache.block)
    total = 0
    for block, q in asking.items():
        angles = angles_of(exp, block * exp.cache.block + frames, rows, columns)
        asked = turn(q, angles)[:, :, ::stride, :heads]
        total = total + np.einsum("lbqnh,lbmpnh->lbm", asked, keys[..., :heads, :], optimize=True)
    return total / np.sqrt(keys.shape[-1])


def scores(exp, story, seen, q, random):
    """Score [layer, b, archived block] of every packed block that may be attended."""
    archive = np.broadcast_to(np.asarray(seen.archive, int), (*q.shape[:2], len(seen.archive)))
    if exp.cache.selection == "affinity" and seen.archive:
        return affinity(exp, story, seen, q, archive)
    if exp.cache.selection == "paper_sum":
        return paper_sum(exp, story, seen, q, archive)
    if exp.cache.selection == "paper":
        return paper(exp, story, seen, q, archive)
    if exp.cache.selection == "random":
        return random[..., np.asarray(seen.slots, int)].astype(float)
    return archive.astype(float)


def choose(seen, points):
    """Ids [layer, b, count] of the best blocks, in time order."""
    best = np.argsort(-points, axis=-1)[..., : seen.count]
    return np.sort(np.asarray(seen.archive, int)[best], axis=-1)


def view(exp, story, seen, ids):
    """(keys, values) [layer, b, k, n, h] that the next block must find: sink, packed blocks, recent, and itself."""
    times = begins(exp.cache, seen, ids)[..., None] + packed_grid(exp)[0] * packed_span(
        exp.cache, seen
    )
    packed = [x.reshape(*x.shape[:2], -1, *x.shape[-2:]) for x in twins(exp, story, ids, times)]
    sink, recent = both_ends(exp, story, seen)
    _, *current = own(exp, story, seen)
    return [np.concatenate([sink[i], packed[i], recent[i], current[i]], axis=2) for i in range(2)]


def own(exp, story, seen):
    """(queries, keys, values) [layer, b, k, n, h] of the block that looks back, turned to their positions."""
    frames = range(seen.start, seen.start + exp.cache.block)
    rows, columns = np.tile(frame_grid(exp), exp.cache.block)
    times = np.repeat(
        seen.current_position + np.arange(exp.cache.block), len(rows) // exp.cache.block
    )
    return (
        turn(story.q[seen.blocks], angles_of(exp, times, rows, columns)),
        *full_res(exp, story, frames, seen.current_position),
    )


def attention_fn(q, k, v):
    """Softmax attention [layer, b, q, n, h] in 64 bit."""
    logits = np.einsum(
        "...qnh,...knh->...nqk", q.astype(float), k.astype(float), optimize=True
    ) / np.sqrt(q.shape[-1])
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("...nqk,...knh->...qnh", weights, v.astype(float), optimize=True)


def latents(exp, blocks, videos):
    """Latents [block, b, t, y, x, c] that hold the number of their frame, and of their video behind the point."""
    number = 1.0 + np.arange(blocks * exp.cache.block).reshape(blocks, 1, -1)
    number = number + np.arange(videos)[None, :, None] / 64
    shape = (*number.shape, *exp.latent, exp.dit.in_channels)
    return np.broadcast_to(number[..., None, None, None], shape).astype(np.float32)


def tell(exp, rng, *, blocks, layers, videos):
    """What happens in `blocks` blocks: keys and queries not yet turned, all with the leading axes [block, layer, b].

    Every block shows one of three themes. Queries ask for one of them and change their mind once, as a prompt does.
    No two tokens of all blocks share a value, so that a value tells where it was taken from.
    """
    heads = (exp.dit.heads, exp.dit.head_dim)
    video = np.arange(videos)
    themes = 0.7 * rng.normal(size=(3, videos, layers, 1, *heads))
    shown, before, after = rng.integers(3, size=(3, blocks, videos))
    asked = np.where(
        np.arange(blocks)[:, None] < rng.integers(2, blocks, size=videos), before[0], after[0]
    )

    def keys(tokens, theme):
        noise = rng.normal(size=(blocks, layers, videos, tokens, *heads))
        return (np.swapaxes(themes[theme, video], 1, 2) + noise).astype(np.float32)

    def values(tokens, first):
        number = first + 1000 * np.arange(blocks).reshape(-1, 1, 1, 1) + np.arange(tokens)
        number = number + np.arange(layers).reshape(-1, 1, 1) / 4 + video[:, None] / 64
        return np.broadcast_to(number[..., None, None], (*number.shape, *heads)).astype(np.float32)

    full = exp.cache.block * exp.tokens_per_frame
    packed = exp.tokens_per_packed_block
    return types.SimpleNamespace(
        full=(keys(full, shown), values(full, 1)),
        packed=(keys(packed, shown), values(packed, 501)),
        latent=latents(exp, blocks, videos),
        q=2 * keys(full, asked),
        random=rng.uniform(size=(blocks, layers, videos, exp.cache.slots)).astype(np.float32),
    )
