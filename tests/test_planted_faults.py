"""Faults planted in the memory's own source: the check that every history passes must catch each of them."""

import inspect
import types

import histories
import numpy as np
import pytest
import slow_memory

from packforcing_jax.config import CacheConfig

BASE = {"block": 2, "sink": 4, "recent": 2, "top": 2, "capacity": 4, "score_pool": (2, 1, 2)}
KINDS = {
    "affinity": CacheConfig(**BASE),
    "true frames": CacheConfig(**BASE, selection="paper_sum", rope_adjustment="none"),
    "squeezed": CacheConfig(**BASE, selection="random", span="fit", trained=11),
    "long ring": CacheConfig(**{**BASE, "recent": 4}, spare=2, selection="recency"),
    "incremental": CacheConfig(
        **{**BASE, "top": 4, "capacity": 9}, selection="random", rope_adjustment="incremental"
    ),
    "sink alone": CacheConfig(**BASE, selection="random", rope_adjustment="sink_only"),
}

FAULTS = {  # what is wrong: the kind of memory it shows in, module, text, text in its place
    "packed blocks one frame late": (
        "affinity",
        "view",
        "seen.mid_at + jnp.arange(cfg.attended)",
        "seen.mid_at + 1 + jnp.arange(cfg.attended)",
    ),
    "the current block's place ignores recent": (
        "affinity",
        "cache",
        "+ packed + gap + recent\n",
        "+ packed + gap\n",
    ),
    "a sink that stays behind": (
        "sink alone",
        "cache",
        '"sink_at": 0.0 if',
        '"sink_at": 0.0 * moved if True or',
    ),
    "packed blocks in the wrong ring slot": (
        "affinity",
        "cache",
        "past % cfg.slots",
        "(past + 1) % cfg.slots",
    ),
    "the recent ring read from the wrong frame": (
        "long ring",
        "cache",
        "(first + jnp.",
        "(first + 1 + jnp.",
    ),
    "the sink overwritten late": (
        "affinity",
        "cache",
        "when=frame < cfg.sink)",
        "when=frame < cfg.sink + cfg.block)",
    ),
    "a packed block visible one block early": (
        "affinity",
        "cache",
        "- recent_blocks  #",
        "- recent_blocks + 1  #",
    ),
    "the oldest block dropped one too soon": (
        "long ring",
        "cache",
        "- cfg.capacity,",
        "- cfg.capacity + 1,",
    ),
    "a selection that is one block old": (
        "affinity",
        "view",
        "scores, seen.ids,",
        "scores, jnp.where(seen.ids < seen.ids.max(), seen.ids, -1),",
    ),
    "a selection that never asked": (
        "affinity",
        "view",
        "looked = look(exp, seen, scores)",
        "looked = newest(exp, seen, q.shape[0])",
    ),
    "blocks chosen that are not visible": (
        "sink alone",
        "selection",
        "((ids >= 0)[None]",
        "((ids >= -1)[None]",
    ),
    "attended blocks not in time order": (
        "affinity",
        "selection",
        "argsort(when,",
        "argsort(-height,",
    ),
    "packed keys not turned": ("affinity", "view", "_turn(exp, picked.kv.k, times)", "picked.kv.k"),
    "keys and values of recent swapped": (
        "affinity",
        "view",
        "(layer.recent.k, layer.recent.v)",
        "(layer.recent.v, layer.recent.k)",
    ),
    "packed keys scored in another place": (
        "affinity",
        "view",
        "chosen * seen.step / 2",
        "chosen * seen.step / 3",
    ),
    "packed keys summed at other frames": (
        "true frames",
        "view",
        "- seen.start)[",
        "- seen.recent)[",
    ),
    "queries pooled off their windows' centres": ("affinity", "view", "(step - 1) / 2", "step / 2"),
    "scores that count the wrong keys": (
        "affinity",
        "selection",
        "jnp.where(valid[",
        "jnp.where(~valid[",
    ),
    "the first head asked for all": (
        "affinity",
        "view",
        "in_dim(x, head, 1,",
        "in_dim(x, 0 * head, 1,",
    ),
    "packed tokens on a grid of their own": (
        "affinity",
        "cache",
        'places == "stretched"',
        'places == "native"',
    ),
    "the span not fitted": ("squeezed", "cache", 'cfg.span == "fit"', 'cfg.span == "never"'),
    "a squeezed block whose frames are not": (
        "squeezed",
        "view",
        "scale = seen.step / cfg.block if",
        "scale = 1.0 if",
    ),
    "the wrong sign of rotation": (
        "affinity",
        "rope",
        "jnp.stack([-sin, sin]",
        "jnp.stack([sin, -sin]",
    ),
    "rows turned as columns": (
        "affinity",
        "rope",
        "[along_rows, along_columns]",
        "[along_columns, along_rows]",
    ),
    "a turned key remembered where it was": (
        "incremental",
        "cache",
        "at=at, sink_at",
        "at=layer.at, sink_at",
    ),
    "keys never turned back": (
        "incremental",
        "cache",
        "at - layer.at, p",
        "jnp.maximum(at - layer.at, 0), p",
    ),
}


def reborn(module=None, old="", new=""):
    """The memory's modules once more, made from their source, `old` replaced by `new` in one of them."""
    before = vars(histories.MEMORY)
    after = {name: types.ModuleType(part.__name__) for name, part in before.items()}
    for name in ("rope", "selection", "cache", "view"):
        source = inspect.getsource(before[name])
        if name == module:
            assert source.count(old) == 1, (
                f"{old!r} stands {source.count(old)} times in {name}.py; plant it elsewhere."
            )
            source = source.replace(old, new)
        exec(compile(source, f"{name}.py with a fault", "exec"), vars(after[name]))
    for part in after.values():  # let them know each other instead of the originals
        for key, value in list(vars(part).items()):
            for name, original in before.items():
                if value is original:
                    setattr(part, key, after[name])
                elif (
                    getattr(value, "__module__", None) == original.__name__
                    and vars(original).get(key) is value
                ):
                    setattr(part, key, vars(after[name])[key])
    return types.SimpleNamespace(**after)


def check(kind, parts):
    """The history check on a few videos of 15 blocks."""
    exp = histories.experiment(KINDS[kind])
    story = slow_memory.tell(exp, np.random.default_rng(5), blocks=15, layers=2, videos=6)
    histories.check_history(
        exp, story, histories.stepper(exp, parts, stacked=True), parts=parts, stacked=True
    )


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_fault_every_kind_of_memory_passes(kind):
    check(kind, reborn())


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault):
    kind, *change = FAULTS[fault]
    parts = reborn(*change)  # a text that is not there must fail here
    with pytest.raises(AssertionError):
        check(kind, parts)


def test_there_are_enough_faults_of_every_module():
    assert len(FAULTS) >= 12
    assert {module for _, module, *_ in FAULTS.values()} == set(vars(histories.MEMORY))
