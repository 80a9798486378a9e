r"""Fewer steps by a teacher's trajectories (CausVid, Self-Forcing), made by `prepare --kind trajectories`.

    packforcing train --config wan_t2v_1_3b_trajectory --set train.generator_from=runs/causal/model \
        --set train.source.path=data/trajectories
"""

import dataclasses

from packforcing_jax.configs.wan_t2v_1_3b_paper import experiment as base

from packforcing_jax.config import CoverConfig, DataConfig, OptimiserConfig, TrainConfig

train = TrainConfig(
    objective="trajectory",
    history="memory",
    steps=3000,
    batch=64,
    remat="blocks",
    generator=OptimiserConfig(betas=(0.9, 0.999)),
    cover=CoverConfig(sinks=(0, 4, 8), gap=60.0, gap_share=0.5),
    source=DataConfig(kind="records"),
)

experiment = dataclasses.replace(base, name="wan_t2v_1_3b_trajectory")
