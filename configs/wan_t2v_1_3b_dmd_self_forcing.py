r"""Self-Forcing's distillation: no packed memory, its rates, average, rollout and teacher (`self_forcing_dmd.yaml`).

    packforcing train --config wan_t2v_1_3b_dmd_self_forcing --set train.generator_from=models/ode-init \
        --set train.teacher_from=models/wan14 --set train.critic_from=models/wan \
        --set train.source.path=data/prompts --set train.mesh.fsdp=8

AdamW with betas 0 and 0.999, decay 0.01 and clipping at 10; 2e-6 for the generator, 4e-7 for the critic, which learns
in every step, the generator in each fifth; 600 steps of 64 clips; an average of 0.99 from step 200 on, after 40 updates
of the generator; real scores by Wan2.1-14B with guidance 3 against Wan's negative prompt, the critic of 1.3B.
"""

import dataclasses

from packforcing_jax.configs.self_forcing_dmd import experiment as base
from packforcing_jax.configs.wan_t2v_14b import experiment as teacher

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
    steps=600,
    batch=64,
    trainable=("dit",),
    teacher=teacher.dit,
    shift=5.0,
    ema=0.99,
    ema_from=40,
    ema_grows=False,
    negative_prompt=WAN_NEGATIVE_PROMPT,
    generator=BOTH,
    critic=dataclasses.replace(BOTH, rate=4e-7),
    distil=DistilConfig(
        critic_updates=5,
        guidance=3.0,
        score_shift=8.0,
        noised_context=True,
        finished=False,
        gradient="leak",
    ),
    source=DataConfig(kind="records"),
)

experiment = dataclasses.replace(base, name="wan_t2v_1_3b_dmd_self_forcing", card="")
