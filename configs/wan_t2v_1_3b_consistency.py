r"""Fewer steps by causal consistency on prepared clips (Causal-Forcing's second stage); no trajectories are needed.

    packforcing train --config wan_t2v_1_3b_consistency --set train.generator_from=runs/causal/model \
        --set train.teacher_from=runs/causal/model --set train.source.path=data/videos
"""

import dataclasses

from packforcing_jax.configs.wan_t2v_1_3b_paper import experiment as base

from packforcing_jax.config import (
    WAN_NEGATIVE_PROMPT,
    CoverConfig,
    DataConfig,
    DistilConfig,
    TrainConfig,
)

train = TrainConfig(
    objective="consistency",
    history="memory",
    steps=3000,
    batch=64,
    grid=48,
    ema=0.99,
    negative_prompt=WAN_NEGATIVE_PROMPT,
    remat="blocks",
    distil=DistilConfig(form="plain", guidance=3.0),
    cover=CoverConfig(sinks=(0, 4, 8), gap=60.0, gap_share=0.5),
    source=DataConfig(kind="records"),
)

experiment = dataclasses.replace(base, name="wan_t2v_1_3b_consistency")
