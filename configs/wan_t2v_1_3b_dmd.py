r"""The student of four steps, its packed memory in the rollout: Self-Forcing's DMD (paper section 8), on prompts.

    packforcing train --config wan_t2v_1_3b_dmd --set train.generator_from=runs/consistency/model \
        --set train.teacher_from=models/wan --set train.source.path=data/prompts

Defaults are Self-Forcing's but for the compressor, which has a rate of its own, and for what docs/training.md argues.
The published settings stand in wan_t2v_1_3b_dmd_paper and wan_t2v_1_3b_dmd_self_forcing.
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
    objective="dmd",
    steps=3000,
    batch=8,
    ema=0.99,
    ema_from=40,
    negative_prompt=WAN_NEGATIVE_PROMPT,
    compressor=OptimiserConfig(rate=1e-4, warmup=20),
    cover=CoverConfig(sinks=(0, 4, 8), gap=60.0, gap_share=0.5),
    source=DataConfig(kind="records"),
)

experiment = dataclasses.replace(base, name="wan_t2v_1_3b_dmd")
