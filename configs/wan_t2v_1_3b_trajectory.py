r"""Fewer steps by a teacher's trajectories (CausVid, Self-Forcing), made by `prepare --kind trajectories`.

The teacher's guidance of 6 and its negative prompt are CausVid's and Self-Forcing's.

    packforcing train --config wan_t2v_1_3b_trajectory --set train.generator_from=runs/causal/model \
        --set train.source.path=data/trajectories
"""

import dataclasses

from packforcing_jax.configs.wan_t2v_1_3b_paper import experiment as base

from packforcing_jax.config import (
    WAN_NEGATIVE_PROMPT,
    CoverConfig,
    DataConfig,
    DistilConfig,
    OptimiserConfig,
    TrainConfig,
)

train = TrainConfig(
    objective="trajectory",
    history="memory",
    steps=3000,
    batch=64,
    remat="blocks",
    negative_prompt=WAN_NEGATIVE_PROMPT,
    distil=DistilConfig(form="plain", guidance=6.0),
    generator=OptimiserConfig(betas=(0.9, 0.999)),
    cover=CoverConfig(sinks=(0, 4, 8), gap=60.0, gap_share=0.5),
    source=DataConfig(kind="records"),
)

experiment = dataclasses.replace(base, name="wan_t2v_1_3b_trajectory")
