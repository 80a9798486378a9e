"""The Stage world's whole recipe: a causal model with memory, its bidirectional teacher, a student of four steps.

    packforcing train --config stage_student --out runs/student

To begin with the model that ships, run the later stages one by one (`--stage teacher`, then `--stage student`), each
with `--set STAGE:train.generator_from=packforcing_jax/weights/stage`.
"""

import dataclasses

from configs.stage import experiment as stage
from packforcing_jax.config import SampleConfig
from packforcing_jax.train_config import CoverConfig, DistilConfig, OptimiserConfig

GENTLE = dataclasses.replace(stage.train.generator, matrix_rate=1e-3, rate=7e-4)
FINE = OptimiserConfig(rate=1e-4, betas=(0.0, 0.99), decay=0.0)


def trained(sample=stage.sample, **settings):
    train = dataclasses.replace(stage.train, **settings)
    return dataclasses.replace(stage, name="stage_student", sample=sample, train=train)


recipe = (
    ("causal", trained()),
    ("teacher", trained(
        objective="flow_matching", generator_from="causal", steps=1200, trained=("dit",), drop_text=0.1,
        cover=CoverConfig(), generator=GENTLE)),
    ("student", trained(
        sample=SampleConfig(steps=(1000, 750, 500, 250), shift=6.0, prediction="clean"), objective="dmd",
        generator_from="causal", teacher_from="teacher", steps=2000, trained=("dit", "compressor"), ema=0.99,
        cover=CoverConfig(sinks=(0, 0, 4, 8), gap=64.0, gap_share=0.5), distil=DistilConfig(guidance=0.0),
        generator=FINE, compressor=FINE, critic=FINE)),
)  # fmt: skip
experiment = recipe[-1][1]
