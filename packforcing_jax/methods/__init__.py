"""The methods that are compared, each a page of its source; `METHODS` looks their names up."""

from packforcing_jax.errors import nearest, require
from packforcing_jax.methods.bidirectional import BIDIRECTIONAL
from packforcing_jax.methods.causvid import CAUSVID
from packforcing_jax.methods.deep_forcing import DEEP_FORCING, DEEP_SINK
from packforcing_jax.methods.full import FULL
from packforcing_jax.methods.infinite_forcing import INFINITE_FORCING
from packforcing_jax.methods.longlive import LONGLIVE, LONGLIVE_INFINITY
from packforcing_jax.methods.method import Method
from packforcing_jax.methods.packforcing import PACKFORCING
from packforcing_jax.methods.packforcing_unofficial import PACKFORCING_UNOFFICIAL
from packforcing_jax.methods.reward_forcing import REWARD_FORCING
from packforcing_jax.methods.rolling_forcing import ROLLING_FORCING
from packforcing_jax.methods.self_forcing import CAUSAL_FORCING, SELF_FORCING, SELF_FORCING_SHORT

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        PACKFORCING,
        PACKFORCING_UNOFFICIAL,
        SELF_FORCING,
        SELF_FORCING_SHORT,
        CAUSAL_FORCING,
        CAUSVID,
        LONGLIVE,
        LONGLIVE_INFINITY,
        INFINITE_FORCING,
        REWARD_FORCING,
        ROLLING_FORCING,
        DEEP_FORCING,
        DEEP_SINK,
        FULL,
        BIDIRECTIONAL,
    )
}


def named(method: str | Method) -> Method:
    """A method by its name, or the value itself; raises `InputError` naming the nearest one."""
    if isinstance(method, Method):
        return method
    require(method in METHODS, f"method {method!r} is unknown; {nearest(method, METHODS)}")
    return METHODS[method]
