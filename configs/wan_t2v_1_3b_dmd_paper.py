r"""The student with the rates that the paper states (PackForcing, arXiv 2603.25730).

    packforcing train --config wan_t2v_1_3b_dmd_paper --set train.generator_from=runs/consistency/model \
        --set train.teacher_from=models/wan --set train.source.path=data/prompts

Stated: AdamW with betas 0 and 0.999, 2e-6 for the generator, 1e-6 for the critic, one update of the generator to five
of the critic, 3,000 iterations of 8 clips of 20 latent frames, guidance 3, shift 5. Not stated, and Self-Forcing's
here: weight decay, gradient clipping, average, how guidance is written. The compressor has no rate of its own there.
"""

import dataclasses

from packforcing_jax.configs.wan_t2v_1_3b_paper import experiment as base

from packforcing_jax.config import (
    WAN_NEGATIVE_PROMPT,
    DataConfig,
    DistilConfig,
    OptimiserConfig,
    TrainConfig,
)

BOTH = OptimiserConfig(rate=2e-6, betas=(0.0, 0.999), decay=0.01, clip=10.0)

train = TrainConfig(
    objective="dmd",
    steps=3000,
    batch=8,
    shift=5.0,
    ema=0.99,
    ema_from=40,
    ema_grows=False,
    negative_prompt=WAN_NEGATIVE_PROMPT,
    generator=BOTH,
    compressor=BOTH,
    critic=dataclasses.replace(BOTH, rate=1e-6),
    distil=DistilConfig(critic_updates=5, guidance=3.0),
    source=DataConfig(kind="records"),
)

experiment = dataclasses.replace(base, name="wan_t2v_1_3b_dmd_paper")
