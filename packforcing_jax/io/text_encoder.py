"""Prompts to text states without ever holding a text encoder: layer by layer from disk, once per prompt."""

import functools
import hashlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from packforcing_jax.config import DtypeConfig, TextConfig
from packforcing_jax.errors import InputError, require
from packforcing_jax.io import atomic, model_folder, safetensors_io, user_cache
from packforcing_jax.io import identity as weights
from packforcing_jax.io.safetensors_io import Tensor
from packforcing_jax.networks import layers, text
from packforcing_jax.types import TextStates

EMBEDDING = "embedding/embedding"
LAYERS = "blocks/"
NORM = "norm/"
WORTH = (
    10**9
)  # bytes of an encoder below which encoding a prompt again is quicker than asking the disk


@dataclass(frozen=True, eq=False)
class Encoder:
    """A text encoder that stays where its weights lie; `store` keeps the states of prompts it has read."""

    cfg: TextConfig
    tensors: Mapping[str, Tensor]
    dtype: str
    store: Path | None = None

    def __call__(self, ids: np.ndarray, mask: np.ndarray) -> TextStates:
        """States [b, words, d] of prompts, zero behind their ends."""
        stored = {i: self._stored(*one) for i, one in enumerate(zip(ids, mask, strict=True))}
        missing = [i for i, states in stored.items() if states is None]
        read = dict(zip(missing, encode(self, ids[missing], mask[missing]), strict=True))
        for i, states in read.items():
            self._keep(ids[i], mask[i], states)
        return jnp.stack([jnp.asarray(states) for states in (stored | read).values()])

    def prepare(self, ids: np.ndarray, mask: np.ndarray) -> None:
        """Reads all prompts now, in one walk through the weights, if they are worth keeping."""
        if self.store is not None:
            self(ids, mask)

    def _path(self, ids: np.ndarray, mask: np.ndarray) -> Path | None:
        tokens = ids[mask.astype(bool)].astype("<i4").tobytes()
        name = hashlib.sha256(
            b"\0".join([tokens, str(len(ids)).encode(), self.dtype.encode()])
        ).hexdigest()
        return self.store and self.store / identity(self) / f"{name[:32]}.safetensors"

    def _stored(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray | None:
        path = self._path(ids, mask)
        if path is None:
            return None
        try:
            if not path.is_file():
                return None
            states = safetensors_io.opened(path)["states"].read()
        except (InputError, KeyError, OSError):  # damaged, or not ours: read the prompt again
            return None
        return np.array(states) if states.shape == (len(ids), self.cfg.dim) else None

    def _keep(self, ids: np.ndarray, mask: np.ndarray, states: Array) -> None:
        path = self._path(ids, mask)
        value = np.asarray(states)
        if path is None:
            return
        try:
            form = {"states": (value.shape, value.dtype)}
            with atomic.file(path) as fresh, safetensors_io.Writer(fresh, form, {}) as file:
                file.put("states", value)
        except OSError as error:  # it only saves time
            _say_once(
                f"text states are not kept in {path.parent.parent} ({error.strerror}); "
                "XDG_CACHE_HOME names another folder"
            )


def of_folder(model: model_folder.Opened, cfg: TextConfig, dtypes: DtypeConfig) -> Encoder:
    """The encoder of a model folder, of the sizes `cfg`."""
    tensors = model.part("text")
    large = sum(tensor.nbytes for tensor in tensors.values()) >= WORTH
    return Encoder(cfg, tensors, dtypes.text, default_store() if large else None)


def of_module(model: text.UMT5, dtypes: DtypeConfig) -> Encoder:
    """An encoder in memory behind the same interface."""
    return Encoder(model.cfg, model_folder.in_memory(model), dtypes.text)


def default_store() -> Path | None:
    """Where text states are kept, None for nowhere, unless XDG_CACHE_HOME says otherwise."""
    try:
        return user_cache.folder("text")
    except RuntimeError:
        _say_once("text states are not kept, as there is no home folder; XDG_CACHE_HOME names one")
        return None


@functools.cache
def _say_once(sentence: str) -> None:
    print(f"packforcing: {sentence}.", file=sys.stderr)


@functools.cache
def identity(encoder: Encoder) -> str:
    """What tells one encoder from another: a hash of every tensor, that of their file where one holds them all."""
    files = {tensor.origin for tensor in encoder.tensors.values()}
    file = Path(next(iter(files), ""))
    if len(files) == 1 and file.is_file():
        return weights.of_file(file)[: weights.LETTERS]
    return weights.of_arrays(
        {
            name: (tensor.dtype.name, tensor.shape, tensor.read().tobytes())
            for name, tensor in encoder.tensors.items()
        }
    )


def encode(encoder: Encoder, ids: np.ndarray, mask: np.ndarray) -> list[Array]:
    """States [words, d] of each prompt. One layer's weights are in memory at a time; all prompts pass it in turn."""
    real = [jnp.asarray(one, bool)[None] for one in mask]
    states = [_rows(encoder, one)[None] for one in ids]
    for number in range(encoder.cfg.layers if len(ids) else 0):
        block = _module(encoder, text.Block, f"{LAYERS}{number}/")
        states = [
            _layer(block, x, valid, cfg=encoder.cfg) for x, valid in zip(states, real, strict=True)
        ]
    norm = _module(encoder, _last_norm, NORM)
    return [_finish(norm, x, valid)[0] for x, valid in zip(states, real, strict=True)]


def _rows(encoder: Encoder, ids: np.ndarray) -> Array:
    """The embedding of each token, read from disk row by row."""
    rows = _table(encoder).read()[_known(encoder, ids)].astype(jnp.dtype(encoder.dtype))
    require(
        bool(np.isfinite(rows.astype(np.float32)).all()),
        f"text encoder weights hold values that are not finite in {EMBEDDING}; fetch or convert the model again.",
    )
    return jnp.asarray(rows)


def _table(encoder: Encoder) -> Tensor:
    """The embeddings of all tokens; raises `InputError` unless they are there, as many and as wide as they must be."""
    found = encoder.tensors.get(EMBEDDING)
    form = (encoder.cfg.vocab, encoder.cfg.dim)
    require(
        found is not None and found.shape == form,
        f"text encoder weights have {EMBEDDING} {'missing' if found is None else list(found.shape)}, which must be "
        f"{list(form)}; fetch or convert the model again.",
    )
    return encoder.tensors[EMBEDDING]


def _known(encoder: Encoder, ids: np.ndarray) -> np.ndarray:
    """`ids`, all of which the encoder has; raises `InputError` otherwise."""
    most = int(ids.max(initial=0))
    require(
        most < encoder.cfg.vocab,
        f"the tokenizer gives token {most}, and the text encoder has {encoder.cfg.vocab:,}; give the tokenizer.json of "
        "that encoder.",
    )
    return ids


def _module(encoder: Encoder, build, inside: str):
    shapes = _shapes(build, encoder.cfg)
    return model_folder.fill(
        shapes, encoder.tensors, dtype=encoder.dtype, source="text encoder weights", inside=inside
    )


def _last_norm(cfg: TextConfig, _: nnx.Rngs) -> layers.RMSNorm:
    return layers.RMSNorm(cfg.dim, text.EPS)


@functools.cache  # every layer of every prompt asks
def _shapes(build, cfg: TextConfig):
    return jax.eval_shape(lambda: build(cfg, nnx.Rngs(0)))


@functools.partial(jax.jit, static_argnames="cfg")
def _layer(block: text.Block, x: Array, mask: Array, *, cfg: TextConfig) -> Array:
    return text.layer(block, x, mask, cfg)


_finish = jax.jit(text.finish)
