"""A run stopped anywhere goes on from the disk as if it had never stopped: bit for bit, whatever its memory is like."""

import dataclasses
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tiny
from flax import nnx

from packforcing_jax import config
from packforcing_jax.cli import main
from packforcing_jax.io import checkpoints, video
from packforcing_jax.networks import codec
from packforcing_jax.sampling import host_archive, player, resume, state_folder, trace
from packforcing_jax.sampling.pipeline import Pipeline

RED = "a red disc"
BLUE = "the blue figure walks"
LIME = "lime square"
STORY = [RED] * 4 + [BLUE] * 5 + [LIME] * 2
WAN = config.VAEConfig(
    dim=2,
    z_dim=12,
    dim_mult=(1, 2),
    num_res_blocks=1,
    temporal_downsample=(True,),
    mean=tuple(np.linspace(-0.4, 0.5, 12)),
    std=tuple(np.linspace(0.6, 1.9, 12)),
)
SETTINGS = {
    "incremental": ["cache.sink=6", "cache.rope_adjustment=incremental", "cache.selection=random"],
    "host": ["cache.scope=shared", "cache.timing=late", "cache.archive=host"],
    "asking": ["cache.selection=paper", "cache.query_stride=3"],
}
PROGRAMS = {
    (player, "denoise_program"): {"donate_argnames": "memory"},
    (player, "show_program"): {"static_argnames": ("first", "shrink")},
    (player, "commit_program"): {"donate_argnames": "memory"},
    (host_archive, "first_pass"): {"donate_argnames": "memory"},
    (host_archive, "_score"): {"static_argnames": "spec"},
    (host_archive, "remaining_passes"): {"donate_argnames": "memory"},
}
AWKWARD = (
    1,
    5,
    10,
)  # blocks: before a sink of two is full, after a new prompt, when the oldest of four are gone


def loaded(folder, name):
    """A model of its own, as a new process would load it."""
    model = Pipeline.from_pretrained(folder)
    if name != "autoencoder":
        return model.with_settings(SETTINGS[name])
    vae = tiny.filled(jax.eval_shape(lambda: codec.make(WAN, nnx.Rngs(0))), seed=3)
    return dataclasses.replace(
        model, experiment=dataclasses.replace(model.experiment, codec=WAN), vae=vae
    )


class Files:
    """Stands for the files of a run, whose positions matter elsewhere."""

    def sync(self):
        return video.Position()


def keeper(model, folder, every=1):
    return resume.Keeper(folder, model, state_folder.Notes(STORY), every=every)


@pytest.fixture(scope="module")
def quick():
    """The sampler's programs, compiled in a third of the time."""
    with pytest.MonkeyPatch.context() as patch:
        for (module, name), how in PROGRAMS.items():
            patch.setattr(module, name, tiny.jit(getattr(module, name).__wrapped__, **how))
        yield


@pytest.fixture(scope="module", params=[*SETTINGS, "autoencoder"])
def run(request, folder, quick, tmp_path_factory):
    """One unbroken run: (name, its blocks, the folder in which it was kept behind each of the awkward blocks)."""
    place = tmp_path_factory.mktemp("runs")
    model = loaded(folder, request.param)
    blocks = []
    for block in model.stream(STORY, seed=3):
        if block.index + 1 in AWKWARD:
            one = keeper(model, place / f"{block.index + 1}")
            one.keep(block, Files(), None)
            one.close()
        blocks.append(dataclasses.replace(block, state=None))
    return request.param, blocks, place


@pytest.mark.parametrize("after", AWKWARD)
def test_a_run_goes_on_from_the_disk_bit_for_bit(run, folder, after):
    name, whole, place = run
    model = loaded(folder, name)
    state = keeper(model, place / f"{after}").resume().state
    rest = list(model.stream(STORY, state=state))  # which knows its seed
    assert [block.index for block in rest] == list(range(after, len(STORY)))
    for block, expected in zip(rest, whole[after:], strict=True):
        assert (block.prompt, block.layout, block.sink_sum) == (
            expected.prompt,
            expected.layout,
            expected.sink_sum,
        )
        for field in ("latent", "frames", "block_ids", "scores", "positions"):
            np.testing.assert_array_equal(
                getattr(block, field), getattr(expected, field), err_msg=field
            )


def test_the_awkward_blocks_are_awkward(run):
    """What is recalled changes behind every one of them, and the oldest packed blocks are gone behind the last."""
    name, whole, _ = run
    for after in AWKWARD[1:]:
        assert len({block.block_ids.tobytes() for block in whole[after:]}) == len(STORY) - after
    assert min(whole[-1].block_ids.ravel()) > 1
    assert all(np.isfinite(block.latent).all() and abs(block.latent).max() < 100 for block in whole)
    if name == "autoencoder":
        assert [len(block.frames) for block in whole] == [5] + [6] * (len(STORY) - 1)


@pytest.mark.parametrize("first", [0, 2])
def test_a_run_stopped_twice_is_still_the_same(folder, quick, tmp_path, first):
    """The state that comes back can be drawn from, kept and taken up again."""
    model = loaded(folder, "incremental")
    latents = []
    for until in (first + 2, first + 5, len(STORY)):
        one = keeper(model, tmp_path, every=until)
        state = one.resume().state
        for block in model.stream(STORY, seed=None if state else 3, state=state):
            one.keep(block, Files(), None)
            latents.append(block.latent)
            if block.index + 1 == until:
                break
        one.close()
    expected = [block.latent for block in model.stream(STORY, seed=3)]
    np.testing.assert_array_equal(latents, expected)


# The command


@pytest.mark.slow
def test_a_killed_command_goes_on_as_if_it_had_not_been(folder, tmp_path, capsys):
    """`kill -9` behind a save: the same command ends with the files of the unbroken run."""

    def words(name):
        files = {"--out": "v.mp4", "--trace": "t.jsonl", "--state": "saves"}
        given = [
            word for flag, file in files.items() for word in (flag, str(tmp_path / name / file))
        ]
        return [
            "sample",
            "--weights",
            str(folder),
            "--prompt",
            RED,
            "--blocks",
            "23",
            "--every",
            "2",
            *given,
        ]

    whole = tmp_path / "whole"
    broken = tmp_path / "broken"
    alike = {"JAX_DEFAULT_MATMUL_PRECISION": "highest", "JAX_NUM_CPU_DEVICES": "2"}
    command = [sys.executable, "-m", "packforcing_jax", *words("broken")]
    with subprocess.Popen(
        command, stderr=subprocess.DEVNULL, env=os.environ | alike, start_new_session=True
    ) as process:
        deadline = time.monotonic() + 120
        while (
            not (broken / "saves" / "4").exists()
            and process.poll() is None
            and time.monotonic() < deadline
        ):
            time.sleep(0.002)
        os.killpg(process.pid, signal.SIGKILL)
    kept = checkpoints.Checkpoints(broken / "saves").latest()
    assert 4 <= kept < 23
    assert len(video.read(broken / "v.mp4")) >= 3 * kept
    assert main.main(words("broken")) == main.main(words("whole")) == 0
    assert f"goes on behind block {kept}" in capsys.readouterr().err
    for file in ("v.mp4", "t.jsonl"):
        assert (broken / file).read_bytes() == (whole / file).read_bytes(), file
    assert [block.index for block in trace.read(broken / "t.jsonl").blocks] == list(range(23))
