"""The Stage world's whole recipe: a bidirectional teacher, a causal model with memory, and a student of four steps.

    packforcing train --config stage_student --out runs/student
"""

import dataclasses

from configs.stage import experiment as stage
from packforcing_jax.config import SampleConfig
from packforcing_jax.train_config import CoverConfig, DistilConfig, OptimiserConfig


def trained(sample=stage.sample, **settings):
    train = dataclasses.replace(stage.train, **settings)
    return dataclasses.replace(stage, name="stage_student", sample=sample, train=train)


FEW = SampleConfig(steps=(1000, 750, 500, 250), shift=6.0, prediction="clean")
GENTLE = OptimiserConfig(rate=1e-4, betas=(0.0, 0.99), decay=0.0)
NETS = ("dit", "compressor")

recipe = (
    ("teacher", trained(objective="flow_matching", steps=2500, trained=("dit", "text"), drop_text=0.1,
                        cover=CoverConfig())),
    ("causal", trained(generator_from="teacher", steps=3500)),
    ("student", trained(
        objective="dmd", generator_from="causal", teacher_from="teacher", steps=2000, sample=FEW, trained=NETS,
        drop_text=0.0, ema=0.99, cover=CoverConfig(sinks=(0, 0, 4, 8), gap=64.0, gap_share=0.5),
        distil=DistilConfig(guidance=0.0, critic_updates=5), generator=GENTLE, compressor=GENTLE, critic=GENTLE)),
)  # fmt: skip
experiment = recipe[-1][1]
