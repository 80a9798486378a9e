"""PackForcing (arXiv 2603.25730): sink, packed blocks recalled by affinity, recent frames.

Its memory is the experiment's own, all settings of which are in `CacheConfig`.
"""

from packforcing_jax.methods.method import Method

PACKFORCING = Method("packforcing", "arXiv 2603.25730")
