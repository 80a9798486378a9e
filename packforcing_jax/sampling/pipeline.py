"""From sentences to video: a model folder, a prompt per block, and blocks that come out as they are finished."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import jax
import numpy as np
from flax import nnx

from packforcing_jax import methods, pytrees
from packforcing_jax.config import PROFILES, Experiment, cards, loading
from packforcing_jax.config.choices import AT_PROMPT_CHANGE, KEEPS_TOKENS
from packforcing_jax.errors import nearest, require
from packforcing_jax.io import model_folder, text_encoder, video
from packforcing_jax.memory.layout import Progress
from packforcing_jax.methods.method import Method, applied, lengthened
from packforcing_jax.networks import base_model, codec, compressor, text, tokenizer
from packforcing_jax.sampling import block_step, player
from packforcing_jax.sampling.player import State

TextEncoder: TypeAlias = text.UMT5
Tokenizer: TypeAlias = tokenizer.Tokenizer
SHIPPED = Path(__file__).parents[1] / "weights" / "stage"


@dataclass(frozen=True)
class Finished:
    """One finished block of one video: its place, what was asked for, what came out, and what it looked back at."""

    index: int
    prompt: str
    frames: np.ndarray  # [t, height, width, 3] in [-1, 1]
    latent: np.ndarray  # [t, y, x, c]
    block_ids: (
        np.ndarray
    )  # [layer, top] packed blocks each layer attended to, in time order, -1 where fewer exist
    scores: np.ndarray  # [layer, top] by which it chose them
    positions: np.ndarray  # [layer, top] position in time of the first frame of each
    layout: Mapping[
        str, float
    ]  # counts and positions of the other partitions: fields of `Layout`, and `block`
    sink_sum: int  # checksum of the sink; its keys do not count when they move
    state: State  # after this block; used up when the next one is made


def video_id(prompt: str) -> int:
    """The id that decides a video's noise unless one is given: a hash of its first prompt."""
    return int.from_bytes(hashlib.sha256(tokenizer.clean(prompt).encode()).digest()[:4], "big")


def blocks_of(exp: Experiment, seconds: float) -> int:
    """Blocks that make a video of `seconds`; frames that do not fill a last latent are not asked for."""
    require(
        np.isfinite(seconds) and seconds > 0,
        f"seconds={seconds} is not a length; give a number above 0.",
    )
    latents = codec.latents_of(exp.codec, int(np.ceil(seconds * exp.fps)))
    return max(1, -(-latents // exp.cache.block))


def with_overrides(
    exp: Experiment,
    memory: str | None,
    overrides: Sequence[str],
    method: str | Method | None = None,
) -> Experiment:
    """`exp` with another method or a memory profile by name, and then single settings changed.

    Without `method`, that of `exp`, which its card may have named.
    """
    require(
        memory in (None, *PROFILES),
        f"memory profile {memory!r} is unknown; {nearest(str(memory), PROFILES)}",
    )
    value = methods.named(exp.method if method is None else method)
    require(
        memory is None or value.window is None,
        f"--memory {memory} belongs to method packforcing, and the method is {value.name}; leave --memory out, or "
        "give --method packforcing.",
    )
    exp = applied(value, exp)
    return loading.override(
        dataclasses.replace(exp, cache=PROFILES[memory]) if memory else exp, list(overrides)
    )


def require_length(method: Method, exp: Experiment, blocks: int) -> None:
    """Raises `InputError` for more blocks than a method of one clip makes, or fewer than its window has."""
    window = exp.cache.full_frames
    together = exp.cache.window // exp.cache.block
    require(
        not exp.cache.joint or blocks >= together,
        f"method {method.name} denoises {together} blocks together, one for each step, and {blocks} were asked for; "
        f"ask for at least {together}.",
    )
    require(
        not method.one_clip or blocks * exp.cache.block <= window,
        f"method {method.name} makes one clip of {window} frames, and {blocks} blocks of {exp.cache.block} were asked "
        "for; ask for fewer, or take self-forcing, whose window rolls.",
    )


def check_changes(exp: Experiment, changes: Mapping[int, str]) -> None:
    """Raises `InputError` for something that a new prompt cannot do to the memory."""
    for block, how in changes.items():
        require(
            how in AT_PROMPT_CHANGE,
            f"block {block}: {how!r} is nothing a new prompt can do to the memory; choose one of "
            f"{', '.join(AT_PROMPT_CHANGE)}.",
        )
        require(
            exp.cache.budget == 0 or how in KEEPS_TOKENS,
            f"block {block}: {how!r} takes whole frames out of the memory, and method {exp.method} has kept single "
            f"tokens of them; choose one of {', '.join(KEEPS_TOKENS)}.",
        )


def _read(model: model_folder.Opened, part: str, build: Callable[[], Any], dtype: str) -> Any:
    """A part of a model folder as the module that `build` makes; one without parameters needs no file."""
    shapes = jax.eval_shape(build)
    tensors = model.part(part) if pytrees.flatten(shapes) else {}
    return model_folder.fill(
        shapes, tensors, dtype=dtype, source=f"the {part} weights of {model.folder}"
    )


@dataclass(frozen=True)
class Origin:
    """The folder that networks were read from: true of a pipeline as long as it holds these very networks."""

    model: model_folder.Opened
    nets: block_step.Nets
    vae: codec.Codec

    def of(self, nets: block_step.Nets, vae: codec.Codec) -> bool:
        """Whether these networks are those of the folder."""
        return self.nets is nets and self.vae is vae


@dataclass(frozen=True, eq=False)
class Pipeline:
    """A loaded model. `stream` yields finished blocks, `generate` a whole video."""

    experiment: Experiment
    nets: block_step.Nets
    text: text_encoder.Encoder
    vae: codec.Codec
    tokenizer: Tokenizer
    method: Method = methods.PACKFORCING
    origin: Origin | None = None  # None: networks that were made in memory

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path | None = None,
        *,
        experiment: Experiment | None = None,
        memory: str | None = None,
        overrides: Sequence[str] = (),
        method: str | Method | None = None,
    ) -> "Pipeline":
        """The model of a folder, by default the one that ships, with another memory profile or settings if asked for.

        `method` is a name in `methods.METHODS` or a value; without it, the method that the folder remembers.

        `experiment` takes the place of the folder's own settings, such as one with a score of one's own.

        Weights are read tensor by tensor into their places; the text encoder stays on disk.
        """
        model = model_folder.opened(folder or SHIPPED)
        own = experiment or model.experiment
        cards.require_samples(own.card)
        exp = with_overrides(own, memory, overrides, method)
        nets = block_step.Nets(
            dit=_read(
                model,
                "dit",
                lambda: base_model.build(exp.dit, nnx.Rngs(0)).unrolled(),
                exp.dtypes.params,
            ),
            compressor=_read(
                model,
                "compressor",
                lambda: compressor.build(exp.step, nnx.Rngs(0)),
                exp.dtypes.params,
            ),
        )
        vae = _read(model, "codec", lambda: codec.make(exp.codec, nnx.Rngs(0)), exp.dtypes.vae)
        return cls(
            experiment=exp,
            method=methods.named(own.method if method is None else method),
            nets=nets,
            origin=Origin(model, nets, vae),
            text=text_encoder.of_folder(model, exp.text, exp.dtypes),
            tokenizer=tokenizer.Tokenizer.from_file(
                model.folder / model_folder.TOKENIZER, exp.text.max_words
            ),
            vae=vae,
        )

    @classmethod
    def of(
        cls,
        exp: Experiment,
        nets: block_step.Nets,
        encoder: TextEncoder,
        reader: Tokenizer,
    ) -> "Pipeline":
        """Networks in memory, layers stacked as in training, ready to sample."""
        apart = dataclasses.replace(nets, dit=nets.dit.unrolled())
        return cls(
            experiment=exp,
            nets=pytrees.cast(apart, exp.dtypes.params),
            tokenizer=reader,
            text=text_encoder.of_module(encoder, exp.dtypes),
            vae=codec.make(exp.codec, nnx.Rngs(0)),
        )

    def with_memory(self, profile: str) -> "Pipeline":
        """The same model with another memory: a name in `config.PROFILES`."""
        return self._with(with_overrides(self.experiment, profile, (), self.method))

    def with_settings(self, overrides: Sequence[str]) -> "Pipeline":
        """The same weights with settings changed, such as `cache.top=8`."""
        return self._with(loading.override(self.experiment, list(overrides)))

    def with_method(self, method: str | Method) -> "Pipeline":
        """The same model under another method: a name in `methods.METHODS`, or a value."""
        value = methods.named(method)
        return dataclasses.replace(
            self._with(with_overrides(self.experiment, None, (), value)), method=value
        )

    def for_length(self, blocks: int) -> "Pipeline":
        """The same model with room for a video of so many blocks, where its method needs more for a longer one."""
        exp = lengthened(self.method, self.experiment, blocks)
        return self if exp == self.experiment else self._with(exp)

    def _with(self, exp: Experiment) -> "Pipeline":
        nets = pytrees.cast(self.nets, exp.dtypes.params)
        vae = pytrees.cast(self.vae, exp.dtypes.vae)
        origin = self.origin
        if origin is not None:
            read = origin.of(self.nets, self.vae)
            origin = dataclasses.replace(origin, nets=nets, vae=vae) if read else None
        return dataclasses.replace(
            self,
            experiment=exp,
            nets=nets,
            vae=vae,
            origin=origin,
            text=dataclasses.replace(self.text, dtype=exp.dtypes.text),
        )

    def start(self, *, seed: int, videos: Sequence[int]) -> State:
        """The state before the first block of `videos`."""
        return player.start(self, seeds=seed, videos=videos)

    def text_kv(self, prompts: Sequence[str]) -> Any:
        """Text keys and values per layer of one prompt per video."""
        states = self.text(*self.tokenizer.encode(prompts))
        return player.text_program(self.nets.dit, self.experiment.dtypes.compute, states)

    def check(self, prompts: Sequence[str]) -> None:
        """Raises `InputError` unless there are prompts and every word of them is known."""
        require(len(prompts) > 0, "a video needs at least one block; give one prompt per block.")
        self.tokenizer.encode(list(dict.fromkeys(prompts)))

    def stream(
        self,
        prompts: Sequence[str],
        *,
        seed: int = 0,
        identity: int | None = None,
        state: State | None = None,
        changes: Mapping[int, str] | None = None,
    ) -> Iterator[Finished]:
        """Finished blocks of one video, one prompt per block; all are checked before the first is drawn.

        `changes` says, by block, what the new prompt there does to the memory (`methods.method.AT_PROMPT_CHANGE`);
        elsewhere a new prompt does what the method says.

        A longer run begins with the shorter one, bit for bit; a changed later prompt leaves earlier blocks alone.
        A `state` that an earlier run left goes on from its block, as if that run had never stopped.
        """
        self.check(prompts)
        changes = dict(changes or {})
        check_changes(self.experiment, changes)
        require_length(self.method, self.experiment, len(prompts))
        model = self.for_length(len(prompts))
        if state is None:
            state = model.start(
                seed=seed, videos=[video_id(prompts[0]) if identity is None else identity]
            )
        return model._stream(prompts, state, changes)

    def _stream(
        self, prompts: Sequence[str], state: State, changes: Mapping[int, str]
    ) -> Iterator[Finished]:
        text_kv = None
        first = state.position
        if prompts[first:]:
            self.text.prepare(*self.tokenizer.encode(list(dict.fromkeys(prompts[first:]))))
        for index in range(first, len(prompts)):
            if text_kv is None or prompts[index] != prompts[index - 1]:
                text_kv = self.text_kv([prompts[index]])
            if index and (index in changes or prompts[index] != prompts[index - 1]):
                how = changes.get(index, self.method.at_prompt_change)
                state = player.change_prompt(
                    self, state, text_kv, how=how, keep_sink=self.method.keeps_sink
                )
            before = jax.tree.map(np.asarray, state.memory.progress)
            state, block = player.next_block(self, state, text_kv, left=len(prompts) - index)
            frames = np.asarray(block.frames[0])
            video.guard(frames, first=index * len(frames))  # about, where a clip ends
            yield self._finished(index, prompts[index], frames, block, before, state)

    def _finished(
        self,
        index: int,
        prompt: str,
        frames: np.ndarray,
        block: player.Block,
        before: Progress,
        state: State,
    ) -> Finished:
        exp = self.experiment
        layout = player.layout_program(exp.cache, before)  # as it was denoised
        names = (
            "sink",
            "recent",
            "num_selected",
            "step",
            "sink_position",
            "mid_position",
            "recent_position",
            "current_position",
        )
        selections: Any = block.selection  # layers one by one
        per_layer = {
            name: np.stack([np.asarray(getattr(one, name)[0]) for one in selections])
            for name in ("ids", "scores", "positions")
        }
        if exp.cache.budget:
            names = (*names, "chosen")
        counts = {name: np.asarray(getattr(layout, name)).item() for name in names}
        return Finished(
            index=index,
            prompt=prompt,
            frames=frames,
            latent=np.asarray(block.latent[0]),
            block_ids=per_layer["ids"],
            scores=per_layer["scores"],
            positions=per_layer["positions"],
            state=state,
            layout={"block": exp.cache.block} | counts,
            sink_sum=int(player.sink_sum(exp.memory, state.memory)),
        )

    def generate(
        self, prompts: Sequence[str], *, seed: int = 0, identity: int | None = None
    ) -> np.ndarray:
        """The whole video [frames, height, width, 3] in [-1, 1]; `stream` keeps less in memory."""
        return np.concatenate(
            [block.frames for block in self.stream(prompts, seed=seed, identity=identity)]
        )
