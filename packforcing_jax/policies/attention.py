"""Attention behind one signature: the first `length` keys are valid, and a backend is a row in a table."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from packforcing_jax import sharding
from packforcing_jax.errors import require
from packforcing_jax.types import Heads, Length


def reference(
    q: Heads, k: Heads, v: Heads, length: Length | None = None, mask: Array | None = None
) -> Heads:
    """softmax(q k^T / sqrt(h)) v over the first `length` keys, or where `mask` [q, k] is true; float32 softmax."""
    q, k, v = sharding.by_heads(q, k, v)
    logits = jnp.einsum("bqnh,bknh->bnqk", q, k, preferred_element_type=jnp.float32) / math.sqrt(
        q.shape[-1]
    )
    if length is not None:
        mask = (jnp.arange(k.shape[1]) < length)[None]
    if mask is not None:
        logits = jnp.where(mask[None, None], logits, jnp.finfo(jnp.float32).min)
    return jnp.einsum("bnqk,bknh->bqnh", jax.nn.softmax(logits, axis=-1).astype(v.dtype), v)


def _fused(
    q: Heads,
    k: Heads,
    v: Heads,
    length: Length | None = None,
    mask: Array | None = None,
    *,
    implementation: Literal["xla", "cudnn"],
) -> Heads:
    q, k, v = sharding.by_heads(q, k, v)
    lengths = None if length is None else jnp.full(q.shape[0], length, jnp.int32)
    visible = None if mask is None else mask[None, None]
    return jax.nn.dot_product_attention(  # type: ignore[no-matching-overload]
        q, k, v, mask=visible, key_value_seq_lengths=lengths, implementation=implementation
    )


AttentionFn = Callable[..., Heads]


@dataclass(frozen=True)
class Backend:
    """A way to compute attention: `attend(q, k, v, length=None, mask=None)`, as `reference` does."""

    name: str
    attention_fn: AttentionFn


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("reference", reference),
        Backend("xla", partial(_fused, implementation="xla")),
        Backend("cudnn", partial(_fused, implementation="cudnn")),
    )
}


def default_backend(dtype=jnp.float32) -> tuple[str, str]:
    """(name, reason) of the backend used unless one is asked for."""
    half = jnp.dtype(dtype) in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
    if jax.default_backend() == "gpu" and half:
        return "cudnn", "fused attention for half precision on this GPU"
    platform = jax.default_backend()
    return "reference", f"float32 softmax on {platform}; cudnn needs a GPU and half precision"


def resolve(choice: str | Backend, dtype=jnp.float32) -> tuple[str, str]:
    """(backend, reason) for a config's `attention`: the one it names, or for `auto` the default of this machine."""
    if choice == "auto":
        return default_backend(dtype)
    return (choice if isinstance(choice, str) else choice.name), "as the config says"


def backend(choice: str | Backend, dtype=jnp.float32) -> AttentionFn:
    """The attention function of a config's `attention`; an unknown name is an `InputError`, never replaced."""
    if isinstance(choice, Backend):
        return choice.attention_fn
    name = resolve(choice, dtype)[0]
    known = f"choose one of auto, {', '.join(BACKENDS)}"
    require(name in BACKENDS, f"attention backend {name!r} is unknown; {known}.")
    return BACKENDS[name].attention_fn


def working_backends() -> dict[str, str]:
    """Backends by name -> "ok" or why they cannot run on this machine, found by running each once."""
    available = {}
    q = jnp.ones((1, 128, 1, 64), jnp.bfloat16)
    for name, one in BACKENDS.items():
        try:
            jax.block_until_ready(one.attention_fn(q, q, q, jnp.int32(100)))
            available[name] = "ok"
        except Exception as error:  # noqa: BLE001  a backend may refuse in many ways; each is the answer
            available[name] = (str(error).splitlines() or [type(error).__name__])[0][:120]
    return available
