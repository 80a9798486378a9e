"""Every objective on eight clips of the Stage world, with a model small enough for continuous integration.

packforcing train --config stage_overfit --out runs/overfit      # two CPU cores, minutes
"""

import dataclasses

from packforcing_jax.configs import stage

from packforcing_jax.config import (
    CoverConfig,
    DataConfig,
    DistilConfig,
    OptimiserConfig,
    SampleConfig,
    Stage,
)

MUON = dataclasses.replace(stage.train.generator, warmup=10, cooldown=0.0, matrix_rate=1e-2)
SETTLED = dataclasses.replace(MUON, cooldown=0.5)
EASED = dataclasses.replace(SETTLED, matrix_rate=1.5e-3, rate=7e-4)
FINE = OptimiserConfig(rate=6e-4, betas=(0.0, 0.99), decay=0.0, cooldown=0.4)
CRITIC = dataclasses.replace(FINE, rate=1e-3)
small = dataclasses.replace(
    stage.experiment,
    name="stage_overfit",
    sample=SampleConfig(
        steps=(1000, 750, 500, 250), shift=6.0, exact_timesteps=True, prediction="clean"
    ),
    dit=dataclasses.replace(
        stage.experiment.dit, dim=48, ffn_dim=128, layers=2, rope_pairs=(4, 2, 2)
    ),
    compressor=dataclasses.replace(stage.experiment.compressor, channels=(8, 16, 24, 48)),
)


def stage_of(name, **settings):
    train = dataclasses.replace(
        stage.train,
        generator=MUON,
        compressor=MUON,
        trainable=("dit", "compressor"),
        generator_from="start",
        source=DataConfig(limit=8),
        cover=CoverConfig(sinks=(0,)),
        distil=DistilConfig(guidance=1.0),
        ema=0.9,
        save_every=1000,
        log_every=5,
    )
    return Stage(name, small, dataclasses.replace(train, **settings))


def distilled(objective):
    return stage_of(
        objective,
        objective=objective,
        generator_from="consistency",
        teacher_from="teacher",
        steps=150,
        generator=FINE,
        compressor=FINE,
        critic=CRITIC,
        distil=DistilConfig(guidance=0.0, critic_updates=1, finished=False),
    )


recipe = (
    stage_of("start", generator_from="", trainable=("dit", "compressor", "text"), steps=60),
    stage_of("teacher", objective="flow_matching", steps=400, generator=SETTLED),
    stage_of("causal", steps=300, generator=SETTLED, compressor=SETTLED),
    stage_of("forced", steps=150, history="clean"),
    stage_of("diffused", steps=150, history="noisy"),
    stage_of(
        "trajectory",
        objective="trajectory",
        history="noisy",
        steps=60,
        source=DataConfig("records", "data"),
    ),
    stage_of(
        "consistency",
        objective="consistency",
        generator_from="causal",
        teacher_from="causal",
        steps=180,
        grid=16,
        generator=EASED,
        compressor=EASED,
    ),
    distilled("dmd"),
    distilled("sid"),
)
experiment, train = recipe[2].experiment, recipe[2].train
