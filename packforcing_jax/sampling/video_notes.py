"""What stands inside a video file beside its frames: enough to make the video again and to compare it.

In its header the settings, the model's hash and whose noise was drawn; before the frames of each block what was asked
for there and the hash of its latent. So a video says what it is at every moment, however it was told.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

import packforcing_jax
from packforcing_jax.errors import InputError, require, shown
from packforcing_jax.io import model_folder, video
from packforcing_jax.sampling import state_folder
from packforcing_jax.sampling.finished import Finished
from packforcing_jax.sampling.opening import Opening
from packforcing_jax.sampling.session import Told

if TYPE_CHECKING:
    from packforcing_jax.sampling.pipeline import Pipeline

FORMAT = 1


def header(
    model: "Pipeline", *, seed: int, identity: int | None = None, start: str | None = None
) -> dict[str, Any]:
    """What decides a video beside its prompts; `identity` None: the first prompt, `start`: the hash of its opening."""
    return {
        "format": FORMAT,
        "settings": json.loads(model_folder.experiment_to_json(model.experiment)),
        "weights_hash": state_folder.digest(model),
        "weights_folder": state_folder.weights_of(model),
        "seed": seed,
        "identity": identity,
        "start": start,
        "made_with": made_with(),
    }


def made_with() -> dict[str, str]:
    """The versions and the device here: latents of other ones may differ in their last bits."""
    return {
        "packforcing": packforcing_jax.__version__,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
    }


def note(block: Finished, told: Told) -> dict[str, Any]:
    """What is noted of a block of one video."""
    row: dict[str, Any] = {
        "block": block.index,
        "prompt": block.prompt,
        "latent": block.latent_hash,
    }
    said = {"change": told.change, "left": told.left, "given": told.given or None}
    return row | {name: value for name, value in said.items() if value is not None}


@dataclass(frozen=True)
class Record:
    """What a video file says of itself."""

    path: Path
    header: dict[str, Any]
    told: tuple[Told, ...]
    latents: tuple[str, ...]  # hashes, by block

    @property
    def given(self) -> int:
        """Blocks of the picture or clip that it begins with."""
        return sum(told.given for told in self.told)


def read(path: str | Path) -> Record:
    """What a video says of itself; raises `InputError` for one that does not say enough, or lacks blocks."""
    settings = video.settings(path)
    made = settings.get("made")
    require(
        isinstance(made, dict) and made.get("format") == FORMAT,
        f"Video {path} does not say what it was made of, or as another version does; give a file written by "
        "packforcing sample or extend of this version.",
    )
    rows = [each.note for each in video.notes(path)]
    try:
        told = tuple(
            Told((row["prompt"],), row.get("change"), row.get("left"), row.get("given", False))
            for row in rows
        )
        latents = tuple(str(row["latent"]) for row in rows)
        numbers = [row["block"] for row in rows]
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"Video {path} has notes of blocks that are not as they were written; give the file as it was made."
        ) from error
    require(
        numbers == [*range(len(rows))],
        f"Video {path} holds blocks {shown(numbers, 40)}, so not those from the first on; give a whole video.",
    )
    return Record(Path(path), made, told, latents)  # type: ignore[arg-type]


def require_weights(record: Record, model: "Pipeline") -> None:
    """Raises `InputError` unless `model` has the weights that the video was made with."""
    was, mine = record.header["weights_hash"], state_folder.digest(model)
    require(
        was == mine,
        f"Video {record.path} was made with other weights ({was}) than these ({mine}); give the model folder that "
        "it was made with: --weights DIR.",
    )


def require_start(record: Record, given: bool) -> None:
    """Raises `InputError` unless a picture or clip is given for a video that began with one, and for no other."""
    was = record.header["start"] is not None
    why = (
        "began with a picture or a clip; give it as --start FILE."
        if was
        else "began with no picture or clip; leave --start out."
    )
    require(was == given, f"Video {record.path} {why}")


def again(record: Record, model: "Pipeline", given: Opening | None) -> Iterator[Finished]:
    """The blocks of the video made once more by `model`, which has its settings; `given` is what it began with."""
    require_weights(record, model)
    require_start(record, given is not None)
    require(
        given is None or given.hash == record.header["start"],
        f"--start is not what {record.path} began with; give that picture or clip.",
    )
    seed, identity = record.header["seed"], record.header["identity"]
    if model.method.whole_clip:
        whole = [record.told[0].prompts[0]] * (record.told[0].left or len(record.told))
        yield from model.stream(whole, seed=seed, identity=identity)
        return
    session = model.session(seed=seed, identity=identity, keep=0)
    if given is not None:
        yield from session.begun(given, [told.prompts[0] for told in record.told[: record.given]])
    yield from session.retell(record.told[record.given :])


def first_difference(record: Record, made: Sequence[str]) -> int | None:
    """The first block whose latent has another hash than the video's, None where all agree."""
    return next(
        (at for at, (one, other) in enumerate(zip(record.latents, made)) if one != other), None
    )
