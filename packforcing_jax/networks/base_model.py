"""What a base model has to offer, whatever it is made of; the memory and the block step know no more of it."""

from collections.abc import Callable
from typing import Any, Protocol

from flax import nnx
from jax import Array
from jaxtyping import Float

from packforcing_jax.config import DiTConfig
from packforcing_jax.networks.dit import AttentionFn, SelfAttention, WanDiT
from packforcing_jax.pytrees import PerLayer
from packforcing_jax.types import Latent, TextStates, Tokens


class BaseModel(Protocol):
    """A causal video transformer. What there is per layer is a list where layers run one by one, else stacked."""

    def embed(self, latent: Latent) -> Tokens:
        """Tokens of a latent in the order frame, row, column."""
        ...

    def embed_time(self, timesteps: Float[Array, "b t"]) -> Any:
        """Whatever `run` and `output` read of per-frame timesteps on the 0..1000 scale."""
        ...

    def text_kv(self, states: TextStates) -> PerLayer[Any]:
        """What each layer reads of the text, once per prompt; an empty tuple for a layer that reads none."""
        ...

    def run(
        self,
        x: Tokens,
        time: Any,
        text: PerLayer[Any],
        *,
        past: PerLayer[Any] | None,
        self_attention: SelfAttention,
        cross_attention: AttentionFn,
    ) -> tuple[Tokens, PerLayer[Any]]:
        """Tokens after all layers, and what `self_attention` kept in each.

        Every layer calls `self_attention(q, k, v, past of that layer)` once, with [b, q, n, h] that carry no positions.
        """
        ...

    def output(self, x: Tokens, time: Any, grid: tuple[int, int]) -> Latent:
        """The network's output of tokens after all layers; `grid` counts tokens of a frame (rows, columns)."""
        ...

    def keys_values(self, x: Tokens, time: Any) -> PerLayer[Any]:
        """Keys and values that each layer's own projections make of `x`, without its norm and modulation if time=None.

        Only `compressor.keys="projected"` or `"unmodulated"` asks.
        """
        ...

    def unrolled(self) -> "BaseModel":
        """The same model with its layers apart, run one by one."""
        ...


MODELS: dict[type, Callable[..., Any]] = {DiTConfig: WanDiT}


def build(cfg: Any, rngs: nnx.Rngs) -> Any:
    """The base model that a `ModelConfig` describes: a class of `MODELS`, or what one of your own builds itself."""
    make = MODELS.get(type(cfg))
    return cfg.build(rngs) if make is None else make(cfg, rngs)
