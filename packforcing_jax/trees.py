"""Modules as flat dictionaries `path -> array` and back: what checkpoints, converters and optimisers share."""

from typing import Any, TypeVar

import jax
from jax import Array

from packforcing_jax.errors import InputError

Module = TypeVar("Module")


def _path(keys) -> str:
    """A leaf's key path: attributes, dictionary keys and list indices; a variable's own `value` is left out."""
    names = (getattr(key, "name", getattr(key, "key", getattr(key, "idx", key))) for key in keys)
    return "/".join(str(name) for name in names if name != "value")


def flatten(module: Any) -> dict[str, Array]:
    """Every leaf (array or shape) of a module or a dataclass of modules by path, as `blocks/attn/q/kernel`."""
    return {_path(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(module)}


def fill(module: Module, flat: dict[str, Array], source: str = "weights") -> Module:
    """`module` with its leaves replaced from `flat`; raises `InputError` listing every mismatch at once."""
    wanted = flatten(module)
    wrong = [f"{name}: missing" for name in wanted if name not in flat]
    wrong += [f"{name}: not part of the model" for name in flat if name not in wanted]
    shapes = {name: (tuple(flat[name].shape), tuple(leaf.shape)) for name, leaf in wanted.items() if name in flat}
    wrong += [f"{name}: shape {ours}, expected {theirs}" for name, (ours, theirs) in shapes.items() if ours != theirs]
    if wrong:
        shown = "; ".join(wrong[:8]) + (f"; and {len(wrong) - 8} more" if len(wrong) > 8 else "")
        raise InputError(f"{source} do not fit the model ({len(wrong)} tensors: {shown}); use weights of this config.")
    return jax.tree_util.tree_map_with_path(lambda keys, leaf: flat[_path(keys)].astype(leaf.dtype), module)
