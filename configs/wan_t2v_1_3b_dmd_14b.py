r"""The same student with Wan2.1-14B as its teacher, as in Self-Forcing; the critic starts as Wan2.1-1.3B.

    packforcing train --config wan_t2v_1_3b_dmd_14b --set train.generator_from=runs/consistency/model \
        --set train.teacher_from=models/wan14 --set train.critic_from=models/wan \
        --set train.source.path=data/prompts --set train.mesh.fsdp=8
"""

import dataclasses

from packforcing_jax.configs.wan_t2v_1_3b_dmd import experiment as base
from packforcing_jax.configs.wan_t2v_1_3b_dmd import train as same
from packforcing_jax.configs.wan_t2v_14b import experiment as teacher

train = dataclasses.replace(same, teacher=teacher.dit)

experiment = dataclasses.replace(base, name="wan_t2v_1_3b_dmd_14b")
