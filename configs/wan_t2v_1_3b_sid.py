r"""The same student by score identity distillation (SiD): the gradient also flows through both scores.

    packforcing train --config wan_t2v_1_3b_sid --set train.generator_from=runs/consistency/model \
        --set train.teacher_from=models/wan --set train.source.path=data/prompts
"""

import dataclasses

from packforcing_jax.configs.wan_t2v_1_3b_paper import experiment as base

from packforcing_jax.config import (
    WAN_NEGATIVE_PROMPT,
    CoverConfig,
    DataConfig,
    OptimiserConfig,
    TrainConfig,
)

train = TrainConfig(
    objective="sid",
    steps=3000,
    batch=8,
    ema=0.99,
    ema_from=40,
    negative_prompt=WAN_NEGATIVE_PROMPT,
    generator=OptimiserConfig(decay=0.0),
    compressor=OptimiserConfig(rate=1e-4, warmup=20),
    critic=OptimiserConfig(rate=2e-6, decay=0.0),
    cover=CoverConfig(sinks=(0, 4, 8), gap=60.0, gap_share=0.5),
    source=DataConfig(kind="records"),
)

experiment = dataclasses.replace(base, name="wan_t2v_1_3b_sid")
