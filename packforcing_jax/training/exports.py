"""What goes into a run from model folders and comes out of it: networks, the average as a model, videos to look at."""

import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from packforcing_jax import pytrees
from packforcing_jax.config import Experiment, TrainConfig
from packforcing_jax.errors import InputError, require, shortened
from packforcing_jax.io import atomic, model_folder, text_encoder, video
from packforcing_jax.networks import codec, mesh, tokenizer
from packforcing_jax.sampling import pipeline, player
from packforcing_jax.stage import captions
from packforcing_jax.training import batches
from packforcing_jax.training.batches import Flat

BEGINNINGS = ("generator_from", "teacher_from", "critic_from", "blend_from")
PREVIEW_ROWS = 256  # of pixels at least, so that a small model's video can be looked at

log = logging.getLogger(__name__)


# In


def beginnings(train: TrainConfig) -> dict[str, str]:
    """The model folders that a training needs, by their setting."""
    folders = {name: getattr(train, name) for name in BEGINNINGS}
    return {name: folder for name, folder in folders.items() if folder}


def holding(train: TrainConfig, file: str) -> Path | None:
    """The first of those folders that holds a file of this name."""
    return next(
        (Path(folder) for folder in beginnings(train).values() if (Path(folder) / file).is_file()),
        None,
    )


def tokenizer_of(exp: Experiment, train: TrainConfig) -> tokenizer.Tokenizer:
    """The tokenizer of the model that training begins from; without one, the closed vocabulary of the Stage world."""
    folder = holding(train, model_folder.TOKENIZER)
    if folder is not None:
        return tokenizer.Tokenizer.from_file(folder / model_folder.TOKENIZER, exp.text.max_words)
    return captions.reader()


def network(folder: str, shapes: Flat, grid: Mesh, dtype: str = "float32") -> Flat:
    """The parameters at the paths of `shapes` as `dtype`, read from a model folder straight to where they lie.

    Parts that the folder lacks are left out, but for the transformer.
    """
    model = model_folder.opened(folder)
    model.part("dit")
    wanted = {
        path: shape for path, shape in shapes.items() if path.partition("/")[0] in model.parts
    }
    parts = {path.partition("/")[0] for path in wanted}
    tensors = {
        f"{part}/{path}": tensor for part in parts for path, tensor in model.parts[part].items()
    }
    return model_folder.fill(
        wanted,
        tensors,
        dtype=dtype,
        source=f"the weights of {folder}",
        shardings=cast(Mapping[str, Sharding], mesh.shardings(wanted, grid)),
    )


def codec_weights(exp: Experiment, train: TrainConfig, grid: Mesh) -> Flat | None:
    """The parameters of the codec, whole on every device; None where it has some and no model folder brings them."""
    shapes = pytrees.flatten(codec.shapes(exp.codec))
    folder = holding(train, model_folder.weights_file("codec"))
    if not shapes or folder is None:
        return None if shapes else {}
    everywhere = dict.fromkeys(shapes, NamedSharding(grid, PartitionSpec()))
    return model_folder.fill(
        shapes,
        model_folder.opened(folder).part("codec"),
        dtype=exp.dtypes.vae,
        source=f"the codec weights of {folder}",
        shardings=everywhere,
    )


def null_text(exp: Experiment, train: TrainConfig) -> np.ndarray | None:
    """Encoder states [words, d] of the negative prompt, if there is one."""
    prompt = train.negative_prompt
    if not prompt:
        return None
    folder = holding(train, model_folder.weights_file("text"))
    require(
        folder is not None,
        f"train.negative_prompt={shortened(repr(prompt))} needs a text encoder to read it; begin from a "
        "model folder with one, or leave it empty.",
    )
    ids, mask = tokenizer_of(exp, train).encode([prompt])
    encoder = text_encoder.of_folder(model_folder.opened(Path(folder or "")), exp.text, exp.dtypes)
    states = encoder(ids, mask)
    return np.asarray(states[0, : int(mask.sum())])


# Out


def blended(train: TrainConfig, flat: Flat, grid: Mesh) -> Flat:
    """`flat`, a generator's parameters, moved by `train.blend` towards those of `train.blend_from`."""
    share = train.blend
    if not share:
        return flat
    other = network(train.blend_from, flat, grid)
    return flat | {path: (1 - share) * flat[path] + share * leaf for path, leaf in other.items()}


def whole(flat: Mapping[str, Array]) -> dict[str, np.ndarray]:
    """Arrays that lie all over the mesh as NumPy ones on the first process; others get none. All have to call it."""
    host = {}
    for path, leaf in flat.items():
        local = leaf.is_fully_addressable
        value = np.asarray(leaf) if local else multihost_utils.process_allgather(leaf, tiled=True)
        if jax.process_index() == 0:
            host[path] = value
    return host


def save(
    folder: Path,
    exp: Experiment,
    train: TrainConfig,
    flat: Mapping[str, Array],
    *,
    texts: Mapping[str, str | None],
) -> None:
    """A model folder of a generator's parameters, complete or absent, that `sample --weights` takes.

    `texts` are files of text by name. Parts that were not trained come from the model that training began from. All
    processes have to call it.
    """
    host = whole(flat)
    if jax.process_index() == 0:
        parts = {name: batches.part(host, name) for name in model_folder.PARTS}
        with model_folder.replacing(folder) as fresh:
            model_folder.save(
                fresh,
                exp,
                {name: leaves for name, leaves in parts.items() if leaves},
                texts={
                    model_folder.TOKENIZER: tokenizer_of(exp, train).inner.to_str(pretty=True),
                    **texts,
                },
            )
            for name in model_folder.PARTS:
                _borrow(train, model_folder.weights_file(name), fresh)
            model_folder.write_record(fresh)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"{folder} is written")


def _borrow(train: TrainConfig, file: str, fresh: Path) -> None:
    """Puts a file that is missing in `fresh` there, as a link where the disk can."""
    source = holding(train, file)
    if source is None or (fresh / file).exists():
        return
    try:
        os.link(source / file, fresh / file)
    except OSError:
        shutil.copyfile(source / file, fresh / file)


def preview(
    path: Path,
    exp: Experiment,
    train: TrainConfig,
    flat: Mapping[str, Array],
    *,
    raw: Mapping[str, np.ndarray],
    seed: int,
) -> None:
    """A video at `path` of a generator's parameters, drawn block by block for the text of the first clip in `raw`.

    Whatever goes wrong is one line of warning. All processes have to call it; the first one draws.
    """
    host = whole(flat)
    if jax.process_index() == 0:
        try:
            _draw(path, exp, train, host, raw, seed)
        except Exception as error:
            log.warning(
                "no preview %s: %s: %s",
                path.name,
                type(error).__name__,
                " ".join(str(error).split())[:300],
            )


def _draw(
    path: Path,
    exp: Experiment,
    train: TrainConfig,
    flat: Mapping[str, np.ndarray],
    raw: Mapping[str, np.ndarray],
    seed: int,
) -> None:
    here = jax.make_mesh(
        (1,), ("data",), devices=jax.local_devices()[:1], axis_types=(jax.sharding.AxisType.Auto,)
    )
    model = batches.as_model(exp, jax.tree.map(jnp.asarray, flat))
    vae = batches.as_codec(exp, codec_weights(exp, train, here))
    nothing = cast(Any, None)  # the text is encoded above; the pipeline never reads its own encoder
    if vae is None:
        raise InputError(
            "the codec's weights are in none of the model folders that training began from."
        )
    text = {name: jnp.asarray(raw[name][:1]) for name in ("ids", "mask", "states") if name in raw}
    states = batches.text_states(model, batches.encode(exp, vae, text).text)
    apart = pytrees.cast(model.dit.unrolled(), exp.dtypes.params)
    nets = pytrees.cast(model.nets, exp.dtypes.params)
    pipe = pipeline.Pipeline(
        experiment=exp, nets=nets.replace(dit=apart), vae=vae, text=nothing, tokenizer=nothing
    )
    rows = exp.latent[0] * exp.codec.space_factor
    size = (exp.latent[1] * exp.codec.space_factor, rows)
    scale = max(1, PREVIEW_ROWS // rows)
    with (
        atomic.file(path) as fresh,
        video.Writer(fresh, fps=exp.fps, size=size, scale=scale, settings={"seed": seed}) as file,
    ):
        state = pipe.start(seed=seed, videos=[0])
        for block in range(exp.blocks):
            of_block = states[min(block, len(states) - 1)]
            read = player.text_program(apart, exp.dtypes.compute, of_block)
            state, made = player.next_block(pipe, state, read)
            file.write(np.asarray(made.frames[0]))
