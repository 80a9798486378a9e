"""The state behind one block as one file: written in a few milliseconds, read by any process with the same model."""

from pathlib import Path

import jax
import numpy as np

from packforcing_jax import pytrees
from packforcing_jax.errors import require
from packforcing_jax.io import safetensors_io
from packforcing_jax.sampling import player
from packforcing_jax.sampling.player import Model, State


def save(path: Path, model: Model, state: State) -> None:
    """Writes a state, stripped of its scratch; it can still be used up afterwards."""
    copy = pytrees.flatten(player.snapshot(model, state))
    leaves = {name: np.asarray(leaf) for name, leaf in copy.items()}
    forms = {name: (leaf.shape, leaf.dtype) for name, leaf in leaves.items()}
    with safetensors_io.Writer(path, forms, {}) as file:
        for name, leaf in leaves.items():
            file.put(name, leaf)


def load(path: Path, model: Model) -> State:
    """A state to go on from; raises `InputError` unless it is one of this very model, memory and method."""
    form = player.abstract_state(model)
    wanted = pytrees.flatten(form)
    tensors = safetensors_io.opened(path)
    read = {name: np.array(tensor.read()) for name, tensor in tensors.items()}
    found = {name: (value.shape, value.dtype) for name, value in read.items()}
    require(
        found == {name: (leaf.shape, leaf.dtype) for name, leaf in wanted.items()},
        f"the state {path} belongs to another model, memory or method; start the server with those it was made with.",
    )
    leaves = [read[name] for name in wanted]
    copy = jax.tree.unflatten(jax.tree.structure(form), leaves)
    return player.of_snapshot(model, copy)
