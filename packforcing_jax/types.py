"""The words every module speaks: one letter per axis, one name per kind of array.

b batch    t latent frames    c latent channels    y x latent rows, columns
s tokens of one latent frame    p tokens of one packed block    n heads    h head size    d model width
q query tokens    k key tokens    layer, slot  leading axes of the memory    words  text tokens
"""

from typing import TypeAlias

from flax import struct
from jax import Array
from jaxtyping import Bool, Float, Int

Latent: TypeAlias = Float[Array, "b t y x c"]
Video: TypeAlias = Float[Array, "b frames height width 3"]  # in [-1, 1]
Tokens: TypeAlias = Float[Array, "b q d"]
Heads: TypeAlias = Float[Array, "b q n h"]
TextStates: TypeAlias = Float[Array, "b words d"]
Length: TypeAlias = Int[Array, ""]  # how many leading keys are valid
TokenIds: TypeAlias = Int[Array, "b words"]
Mask: TypeAlias = Bool[Array, "b words"]


@struct.dataclass
class KV:
    """Keys and values of the same tokens, [..., k, n, h]."""

    k: Array
    v: Array
