"""Modules as flat dictionaries `path -> array` and back, and one entry per layer in its two forms."""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from packforcing_jax.errors import InputError

Module = TypeVar("Module")
T = TypeVar("T")
PerLayer: TypeAlias = (
    list[T] | T
)  # one entry per layer, or all of them stacked along a leading axis


def _path(keys) -> str:
    """A leaf's key path: attributes, dictionary keys and list indices; a variable's own `value` is left out."""
    names = (getattr(key, "name", getattr(key, "key", getattr(key, "idx", key))) for key in keys)
    return "/".join(str(name) for name in names if name != "value")


def flatten(module: Any) -> dict[str, Array]:
    """Every leaf (array or shape) of a module or a dataclass of modules by path, as `blocks/attn/q/kernel`."""
    return {_path(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(module)}


def fill(
    module: Module,
    flat: Mapping[str, Any],
    source: str = "weights",
    put: Callable[[str, Any], Any] | None = None,
) -> Module:
    """`module` with its leaves replaced from `flat`; raises `InputError` listing every mismatch at once.

    `put(path, value)` makes a leaf of a value; by default it takes the dtype of the leaf it replaces.
    """
    wanted = flatten(module)
    wrong = [f"{name}: missing" for name in wanted if name not in flat]
    wrong += [f"{name}: not part of the model" for name in flat if name not in wanted]
    shapes = {
        name: (tuple(flat[name].shape), tuple(leaf.shape))
        for name, leaf in wanted.items()
        if name in flat
    }
    wrong += [
        f"{name}: shape {ours}, expected {theirs}"
        for name, (ours, theirs) in shapes.items()
        if ours != theirs
    ]
    if wrong:
        named = "; ".join(wrong[:8]) + (f"; and {len(wrong) - 8} more" if len(wrong) > 8 else "")
        raise InputError(
            f"{source} do not fit the model ({len(wrong)} tensors: {named}); use weights of this config."
        )
    make = put or (lambda path, value: value.astype(wanted[path].dtype))
    return jax.tree_util.tree_map_with_path(
        lambda keys, leaf: make(_path(keys), flat[_path(keys)]), module
    )


def unchanged(path: str, value: Any) -> Any:
    """For `fill`: the value as it is, whatever dtype the leaf had that it replaces."""
    return value


# One entry per layer: a list of them (layers run one by one), or arrays with a leading layer axis (layers are scanned)


def over(function: Callable, *args: Any) -> Any:
    """`function` of every layer's share of `args`, in the form that the first one has; None is every layer's None."""
    if not isinstance(args[0], list):
        return jax.vmap(function)(*args)
    return [
        function(*(None if arg is None else arg[layer] for arg in args))
        for layer in range(len(args[0]))
    ]


def unzip(pairs: Any) -> tuple[Any, Any]:
    """Pairs per layer as a pair of what there is per layer."""
    return ([a for a, _ in pairs], [b for _, b in pairs]) if isinstance(pairs, list) else pairs


def zipped(*args: Any) -> Any:
    """What there is per layer, of each of `args`, as one tuple per layer."""
    return list(zip(*args, strict=True)) if isinstance(args[0], list) else args


def stack(layers: Any) -> Any:
    """What there is per layer with a leading layer axis, whatever form it has."""
    return (
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
        if isinstance(layers, list)
        else layers
    )


def unstack(stacked: Any, count: int) -> list:
    """What there is per layer as a list of `count`."""
    return [jax.tree.map(lambda leaf, at=layer: leaf[at], stacked) for layer in range(count)]


def cast(tree: Any, dtype: str) -> Any:
    """`tree` with its floating leaves as `dtype`."""
    return jax.tree.map(
        lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, tree
    )
