r"""Tunes the bidirectional Wan2.1-1.3B on prepared clips: flow matching, one noise level per clip.

    packforcing train --config wan_t2v_1_3b_teacher --set train.generator_from=models/wan \
        --set train.source.path=data/videos
"""

import dataclasses

from packforcing_jax.configs.wan_t2v_1_3b_paper import experiment as base

from packforcing_jax.config import DataConfig, TrainConfig

train = TrainConfig(
    objective="flow_matching",
    trainable=("dit",),
    shift=5.0,
    drop_text=0.1,
    steps=3000,
    batch=64,
    ema=0.999,
    source=DataConfig(kind="records"),
)

experiment = dataclasses.replace(base, name="wan_t2v_1_3b_teacher")
