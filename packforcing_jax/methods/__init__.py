"""The methods that are compared, each a page of its source; `METHODS` looks their names up."""

from packforcing_jax.methods.infinite_forcing import INFINITE_FORCING
from packforcing_jax.methods.longlive import LONGLIVE, LONGLIVE_INFINITY
from packforcing_jax.methods.method import Method
from packforcing_jax.methods.packforcing import PACKFORCING
from packforcing_jax.methods.reward_forcing import REWARD_FORCING
from packforcing_jax.methods.self_forcing import CAUSAL_FORCING, SELF_FORCING, SELF_FORCING_SHORT

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        PACKFORCING,
        SELF_FORCING,
        SELF_FORCING_SHORT,
        CAUSAL_FORCING,
        LONGLIVE,
        LONGLIVE_INFINITY,
        INFINITE_FORCING,
        REWARD_FORCING,
    )
}
