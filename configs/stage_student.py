"""The Stage world's whole recipe: a causal model with memory, then a student of four steps.

    packforcing train --config stage_student --out runs/student

The student begins from the causal model after consistency training, which needs few steps, and is pulled to the
predictions of a bidirectional teacher (DMD). To begin with another causal model, run the later stages one by one
(`--stage consistency`, `--stage teacher`, then `--stage student`), with `--set STAGE:train.generator_from=FOLDER` for
the first two and `--set consistency:train.teacher_from=FOLDER`.
"""

import dataclasses

from packforcing_jax.configs import stage

from packforcing_jax.config import CoverConfig, DistilConfig, OptimiserConfig, SampleConfig, Stage

FEW = SampleConfig(steps=(1000, 500, 250, 100), shift=6.0, exact_timesteps=True, prediction="clean")
COVER = CoverConfig(sinks=(0, 0, 4, 8), gap=64.0, gap_share=0.5)
GENTLE = dataclasses.replace(stage.train.generator, matrix_rate=1e-3, rate=7e-4)
STEADY = dataclasses.replace(stage.train.generator, matrix_rate=2e-3, rate=1.5e-3)
FINE = OptimiserConfig(rate=1e-4, betas=(0.0, 0.99), decay=0.0)
FADING = dataclasses.replace(FINE, cooldown=0.5)
ALERT = dataclasses.replace(FINE, rate=4e-4)


def stage_of(name, sample=stage.experiment.sample, **settings):
    experiment = dataclasses.replace(stage.experiment, name="stage_student", sample=sample)
    return Stage(name, experiment, dataclasses.replace(stage.train, **settings))


recipe = (
    stage_of("causal", steps=3000),
    stage_of(
        "consistency",
        sample=FEW,
        objective="consistency",
        generator_from="causal",
        teacher_from="causal",
        steps=2000,
        grid=24,
        trainable=("dit", "compressor"),
        ema=0.95,
        cover=COVER,
        distil=DistilConfig(guidance=1.0),
        generator=GENTLE,
        compressor=GENTLE,
    ),
    stage_of(
        "teacher",
        objective="flow_matching",
        generator_from="causal",
        steps=4000,
        trainable=("dit",),
        drop_text=0.1,
        cover=CoverConfig(),
        generator=STEADY,
    ),
    stage_of(
        "student",
        sample=FEW,
        objective="dmd",
        generator_from="consistency",
        teacher_from="teacher",
        steps=1200,
        trainable=("dit", "compressor"),
        ema=0.99,
        blend_from="causal",
        blend=0.25,
        cover=COVER,
        distil=DistilConfig(guidance=0.25),
        generator=FADING,
        compressor=FADING,
        critic=ALERT,
    ),
)
experiment, train = recipe[-1].experiment, recipe[-1].train
