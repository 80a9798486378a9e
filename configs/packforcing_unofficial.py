"""PackForcing as reproduced by AshadowZ: sink 9, 16 packed blocks of 273 tokens, recent 6 latent frames."""

from packforcing_jax.config import HALF, CacheConfig, Experiment, SampleConfig
from packforcing_jax.config.cards import Card
from packforcing_jax.config.networks import UNOFFICIAL_COMPRESSOR
from packforcing_jax.methods import PACKFORCING_UNOFFICIAL
from packforcing_jax.methods.method import memory_of

OWN = CacheConfig(block=3, sink=9, recent=6, max_position=21, score_pool=(3, 4, 4))
SAMPLE = SampleConfig(steps=(1000, 750, 500, 250), shift=5.0)
experiment = Experiment(
    name="packforcing_unofficial",
    cache=memory_of(PACKFORCING_UNOFFICIAL, OWN, len(SAMPLE.steps)),
    compressor=UNOFFICIAL_COMPRESSOR,
    sample=SAMPLE,
    dtypes=HALF,
    latent=(60, 104),
    fps=16,
    clip=21,
    method="packforcing-unofficial",
    card="packforcing-unofficial",
)

# What its trainer saves has `pack_compressor.net.*` beside the transformer's tensors, in the same table.
card = Card(
    experiment,
    what="PackForcing as reproduced by AshadowZ: causal 1.3B with packed memory; no published file",
    repository="AshadowZ/PackForcing-Unofficial",
    files=(),
    network="generator",
    licence=None,
    unsettled="its code is apache-2.0, no weights are published",
    unconfirmed=("its network generator", "the names in the files that its training saves"),
)
