"""Strict settings for every test: no silent rank promotion, exact matrix products, two fake CPU devices."""

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_num_cpu_devices", 2)
