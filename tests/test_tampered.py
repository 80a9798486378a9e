"""A folder of saves that somebody or something changed is refused in a sentence, or gives back what was saved."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from packforcing_jax.errors import InputError
from packforcing_jax.io import checkpoints

STATE = {"values": np.arange(4000.0), "block": np.int64(3)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with the steps 1 and 2."""
    folder = tmp_path_factory.mktemp("saves") / "saves"
    store = checkpoints.Checkpoints(folder, about={"seed": 3}, digests=True)
    for step in (1, 2):
        store.save(step, STATE, {"prompts": ["a"]})
    store.close()
    return folder


def notes(step, change):
    path = step / "notes" / "metadata"
    table = json.loads(path.read_text())
    path.write_text(json.dumps(change(table)))


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def renewed(step):
    """Digests of what is there now: whoever changes a file can change these too."""
    (step / checkpoints.DIGESTS).write_text(json.dumps(checkpoints._digests(step)))


def data(step):
    return max((step / "state").rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


CHANGES = {
    "no digests": lambda step: (step / checkpoints.DIGESTS).unlink(),
    "empty digests": lambda step: (step / checkpoints.DIGESTS).write_text(""),
    "digests of nothing": lambda step: (step / checkpoints.DIGESTS).write_text("{}"),
    "digests in a list": lambda step: (step / checkpoints.DIGESTS).write_text("[]"),
    "nested digests": lambda step: (step / checkpoints.DIGESTS).write_text("[" * 100_000),
    "digests in a pipe": lambda step: pipe(step / checkpoints.DIGESTS),
    "notes in a pipe": lambda step: pipe(step / "notes" / "metadata"),
    "no notes": lambda step: shutil.rmtree(step / "notes"),
    "notes of bytes": lambda step: (step / "notes" / "metadata").write_bytes(b"\xff\xfe"),
    "nested notes": lambda step: (step / "notes" / "metadata").write_text("[" * 100_000),
    "notes in a list": lambda step: notes(step, lambda table: [table]),
    "notes of null": lambda step: notes(step, lambda table: None),
    "notes without about": lambda step: notes(step, lambda table: {"format": table["format"]}),
    "leaves of text": lambda step: notes(step, lambda table: table | {"leaves": "x"}),
    "no state": lambda step: shutil.rmtree(step / "state"),
    "data cut": lambda step: cut(data(step)),
    "data cut and digests renewed": lambda step: (cut(data(step)), renewed(step)),
    "no manifest": lambda step: (step / "state" / "manifest.ocdbt").unlink(),
    "no manifest and digests renewed": lambda step: (
        (step / "state" / "manifest.ocdbt").unlink(),
        shutil.rmtree(step / "state" / "ocdbt.process_0", ignore_errors=True),
        renewed(step),
    ),
    "an empty step": lambda step: (shutil.rmtree(step), step.mkdir()),
    "a file for a step": lambda step: (shutil.rmtree(step), step.write_text("x")),
    "a step of thirty digits": lambda step: step.rename(step.with_name("9" * 30)),
    "a step of other digits": lambda step: step.rename(step.with_name("\u0667")),
    "a step with a zero before it": lambda step: step.rename(step.with_name("02")),
}


def restored(folder):
    store = checkpoints.Checkpoints(folder, about={"seed": 3}, digests=True)
    store.check()
    return store.restore(STATE)


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_save_is_refused_in_a_sentence_with_the_way_out(saved, tmp_path, change):
    folder = tmp_path / "saves"
    shutil.copytree(saved, folder)
    CHANGES[change](folder / "2")
    with pytest.raises(InputError) as raised:
        restored(folder)
    sentence = str(raised.value)
    assert "\n" not in sentence
    assert len(sentence) < 500
    assert any(
        way in sentence for way in ("delete it to continue from the one before", "choose another")
    )


def test_what_is_whole_comes_back(saved):
    state, noted = restored(saved)
    np.testing.assert_array_equal(state["values"], STATE["values"])
    assert noted == {"prompts": ["a"]}


FULL = """
import sys, numpy as np
from packforcing_jax.errors import MachineError
from packforcing_jax.io import checkpoints
def full(*args, **kwargs):
    raise OSError(28, "No space left on device")
store = checkpoints.Checkpoints(sys.argv[1], digests=True)
store._seal = full
try:
    store.save(1, {"values": np.arange(5.0)})
    store.close()
except MachineError as error:
    print(error)
"""


def test_a_full_disk_at_the_end_of_a_save_is_one_sentence(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path / "saves")],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert "Saving step 1 below" in done.stdout
    assert "No space left on device" in done.stdout
    assert "Traceback" not in done.stderr
