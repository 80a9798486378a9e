"""A fresh process compiles each of its programs once: what starts a video and what a block leaves behind are alike."""

import collections
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
OURS = {
    "denoise_program",
    "commit_program",
    "show_program",
    "text_program",
    "denoising",
    "sink_sums",
}
HOST = {"first_pass", "_score", "_decide", "remaining_passes", "newest", "draw_noise"}
AUTOENCODER = f"""
import dataclasses, sys
sys.path.insert(0, {str(HERE)!r})
import jax, numpy as np, tiny
from flax import nnx
from packforcing_jax import config
from packforcing_jax.networks import text
from packforcing_jax.sampling.pipeline import Pipeline
from packforcing_jax.stage import captions
vae = config.VAEConfig(dim=2, z_dim=12, dim_mult=(1, 2), num_res_blocks=1, temporal_downsample=(True,),
                       mean=(0.0,) * 12, std=(1.0,) * 12)
exp = dataclasses.replace(tiny.EXP, codec=vae)
pipe = Pipeline.of(exp, tiny.nets(), text.UMT5(exp.text, nnx.Rngs(2)), captions.reader())
for block in pipe.stream(["a red disc"] * 2 + ["lime square"] * 4):
    assert np.isfinite(block.latent).all()
"""


def compiled(*command):
    """How often each of our programs was compiled by a command in a fresh process, by name."""
    env = os.environ | {"JAX_LOG_COMPILES": "1"}
    done = subprocess.run(
        [sys.executable, *command], env=env, cwd=HERE.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    names = re.findall(r"Finished XLA compilation of jit\((\w+)\)", done.stderr)
    return {
        name: count for name, count in collections.Counter(names).items() if name in OURS | HOST
    }


@pytest.mark.parametrize(
    ("overrides", "programs"),
    [
        ([], OURS),
        (
            ["cache.archive=host", "cache.scope=shared", "cache.timing=late"],
            OURS - {"denoise_program"} | HOST,
        ),
        (["dtypes.cache=bfloat16", "cache.rope_adjustment=incremental"], OURS),
    ],
    ids=["default", "host archive", "incremental in bfloat16"],
)
def test_sampling_compiles_every_program_once(tmp_path, overrides, programs):
    flags = [word for each in overrides for word in ("--set", each)]
    out = ["--out", str(tmp_path / "a.mp4")]
    found = compiled("-m", "packforcing_jax", "sample", "--blocks", "4", *out, *flags)
    assert found == dict.fromkeys(programs, 1)


def test_an_autoencoder_shows_the_first_block_by_a_program_of_its_own():
    assert compiled("-c", AUTOENCODER) == dict.fromkeys(OURS, 1) | {
        "show_program": 2,
        "text_program": 1,
    }
