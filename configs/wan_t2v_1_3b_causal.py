r"""Makes Wan2.1-1.3B causal on prepared clips: teacher forcing behind the packed memory (Causal-Forcing's first stage).

    packforcing train --config wan_t2v_1_3b_causal --set train.generator_from=models/wan \
        --set train.source.path=data/videos

`--set train.history=clean` is the original's, with every earlier block clean; `noisy` is diffusion forcing.
"""

import dataclasses

from packforcing_jax.configs.wan_t2v_1_3b_paper import experiment as base

from packforcing_jax.config import CoverConfig, DataConfig, TrainConfig

train = TrainConfig(
    objective="forcing",
    history="memory",
    steps=5000,
    batch=64,
    drop_text=0.1,
    ema=0.999,
    remat="blocks",
    cover=CoverConfig(sinks=(0, 4, 8), gap=60.0, gap_share=0.5),
    source=DataConfig(kind="records"),
)

experiment = dataclasses.replace(base, name="wan_t2v_1_3b_causal")
