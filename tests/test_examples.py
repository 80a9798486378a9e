"""Policies and a base model of one's own, outside the package: sampled, planned, inspected, on every archive."""

import ast
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest

from packforcing_jax.cli.main import main
from packforcing_jax.config import loading
from packforcing_jax.errors import InputError
from packforcing_jax.io import model_folder
from packforcing_jax.sampling.pipeline import SHIPPED, Pipeline

EXAMPLES = Path(__file__).parent.parent / "examples"
POLICIES = ("own_score", "own_eviction")
QUICK = ["--set", "sample.steps=(1000, 400)", "--set", "sample.shift=6.0"]
SHARED = ["sample.steps=(1000, 400)", "cache.scope=shared", "cache.timing=late"]
SENTENCE = "a red disc walks slowly before the moss curtain in scene one"


def path_of(name):
    return str(EXAMPLES / f"{name}.py")


def logic(path):
    """Statements of a file that are no imports and no docstrings, a line each."""
    module = ast.parse(Path(path).read_text(encoding="utf-8"))

    def told(node):
        return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)

    return [
        node
        for node in ast.walk(module)
        if isinstance(node, ast.stmt) and not isinstance(node, ast.Import | ast.ImportFrom)
        if not told(node)
    ]


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_of_ones_own_takes_twenty_lines_at_most(name):
    assert 0 < len(logic(path_of(name))) <= 20


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_of_ones_own_is_sampled_planned_and_inspected(name, tmp_path, capsys):
    trace = str(tmp_path / "a.trace.jsonl")
    config = ["--config", path_of(name)]
    out = ["--out", str(tmp_path / "a.mp4"), "--trace", trace]
    assert main(["sample", *config, "--blocks", "20", *out, *QUICK]) == 0
    assert main(["inspect", trace, *config, "--no-map"]) == 0
    assert "20 blocks checked: positions contiguous" in capsys.readouterr().out
    assert main(["inspect", trace, "--no-map"]) == 2
    assert "give the --config that the run was given" in capsys.readouterr().err
    assert main(["plan", *config]) == 0
    assert "DIFFERS" not in capsys.readouterr().out


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_of_ones_own_does_the_same_on_the_device_and_on_the_host(name):
    pipe = Pipeline.from_pretrained(experiment=loading.load_experiment(path_of(name), SHARED))
    host = pipe.with_settings(["cache.archive=host"])
    pairs = zip(*(list(each.stream([SENTENCE] * 18, seed=2)) for each in (pipe, host)), strict=True)
    recalled = set()
    for one, other in pairs:
        np.testing.assert_array_equal(one.block_ids, other.block_ids)
        # Other programs round otherwise, and each block goes on from the last: 7.5e-5 was seen behind eighteen blocks.
        np.testing.assert_allclose(one.latent, other.latent, atol=5e-4)
        recalled |= set(one.block_ids[one.block_ids >= 0].tolist())
    assert len(recalled) > 5


def test_a_rule_of_ones_own_keeps_its_first_blocks():
    experiment = loading.load_experiment(path_of("own_eviction"), ["sample.steps=(1000,)"])
    first = experiment.cache.sink // experiment.cache.block
    everything = loading.override(experiment, ["cache.selection=all", "cache.top=8"])
    *_, last = Pipeline.from_pretrained(experiment=everything).stream([SENTENCE] * 20)
    seen = last.block_ids[0]
    assert seen[:4].tolist() == [first, first + 1, first + 2, first + 3]
    assert seen[4:].tolist() == [14, 15, 16, 17]  # 18 is at full size


def test_a_base_model_of_ones_own_is_sampled_and_planned(capsys):
    """Two layers without cross-attention and a head of its own."""
    model = runpy.run_path(path_of("own_model"))["pipeline"]()
    blocks = list(model.stream([SENTENCE] * 7, seed=1))
    assert all(np.isfinite(block.latent).all() for block in blocks)
    assert blocks[-1].block_ids.shape == (2, 2)
    assert (blocks[-1].block_ids >= 0).all()
    late = model.with_settings(["cache.scope=shared", "cache.timing=late"])
    host = late.with_settings(["cache.archive=host"])
    for one, other in zip(late.stream([SENTENCE] * 7), host.stream([SENTENCE] * 7), strict=True):
        np.testing.assert_array_equal(one.block_ids, other.block_ids)
        scale = np.abs(one.latent).max()  # random weights know no bound
        np.testing.assert_allclose(one.latent / scale, other.latent / scale, atol=1e-4)
    assert main(["plan", "--config", path_of("own_model")]) == 0
    printed = capsys.readouterr().out
    assert "DIFFERS" not in printed
    assert "attended" in printed


def test_a_model_exported_with_a_policy_of_ones_own_is_read_with_its_config(tmp_path):
    own = loading.load_experiment(path_of("own_score"), ["sample.steps=(1000,)"])
    folder = tmp_path / "model"
    shutil.copytree(SHIPPED, folder)
    (folder / model_folder.CONFIG).write_text(model_folder.experiment_to_json(own))
    with pytest.raises(InputError, match="best_agreement.*--config"):
        Pipeline.from_pretrained(folder)
    pipe = Pipeline.from_pretrained(folder, experiment=own)
    assert next(pipe.stream([SENTENCE])).latent.shape[0] == own.cache.block
