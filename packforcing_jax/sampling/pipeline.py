"""From sentences to video: a model folder, a prompt per block, and blocks that come out as they are finished."""

import dataclasses
import hashlib
import numbers
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
from packforcing_jax.config.experiment import require_whole
from packforcing_jax.config.memory import profiled
from packforcing_jax.errors import InputError, nearest, require, shown
from packforcing_jax.io import model_folder, text_encoder, video
from packforcing_jax.memory.layout import Progress
from packforcing_jax.methods.method import Method, applied, lengthened, require_one_prompt
from packforcing_jax.networks import base_model, codec, compressor, dit, text, tokenizer
from packforcing_jax.sampling import block_step, player, timelines, whole_clip
from packforcing_jax.sampling.player import State
from packforcing_jax.types import TextStates

TextEncoder: TypeAlias = text.UMT5
Tokenizer: TypeAlias = tokenizer.Tokenizer
SHIPPED = Path(__file__).parents[1] / "weights" / "stage_student"
SHOWN_HEIGHT = 384  # small videos are enlarged to about this many pixels


@dataclass(frozen=True)
class Finished:
    """One finished block of one video: its place, what was asked for, what came out, and what it looked back at.

    A block of a clip that was denoised as a whole looked back at nothing and leaves no state.
    """

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
    state: State | None  # after this block; used up when the next one is made


def video_id(prompt: str) -> int:
    """The id that decides a video's noise unless one is given: a hash of its first prompt."""
    return int.from_bytes(hashlib.sha256(tokenizer.clean(prompt).encode()).digest()[:4], "big")


def blocks_of(exp: Experiment, seconds: float) -> int:
    """Blocks that make a video of `seconds`; frames that do not fill a last latent are not asked for."""
    require(
        0 < seconds <= timelines.MOST_SECONDS,
        f"seconds={shown(seconds)} is not a length; give a number above 0, {timelines.MOST_SECONDS:,} at most.",
    )
    latents = codec.latents_of(exp.codec, int(np.ceil(seconds * exp.fps)))
    blocks = max(1, -(-latents // exp.cache.block))
    require_blocks(blocks, f"seconds={seconds} is {blocks:,} blocks")
    return blocks


def shown_size(exp: Experiment) -> tuple[tuple[int, int], int]:
    """(width, height) of a video's frames in pixels, and how many times as large they are shown."""
    factor = exp.codec.space_factor
    width, height = exp.latent[1] * factor, exp.latent[0] * factor
    return (width, height), max(1, SHOWN_HEIGHT // height)


def require_blocks(blocks: int, said: str) -> None:
    """Raises `InputError` unless `blocks` is a length; `said` is what the user gave for it."""
    require(
        0 < blocks <= timelines.MOST_BLOCKS,
        f"{said}, which is not a length; give 1 to {timelines.MOST_BLOCKS:,} blocks.",
    )


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
        memory is None or value.own_memory,
        f"--memory {memory} belongs to method packforcing, and the method is {value.name}; leave --memory out, or "
        "give --method packforcing.",
    )
    exp = applied(value, exp)
    if memory is not None:
        exp = dataclasses.replace(exp, cache=profiled(exp.cache, memory))
    exp = _set(value, exp, overrides)
    require_whole(exp)
    return exp


def _set(method: Method, exp: Experiment, overrides: Sequence[str]) -> Experiment:
    """`exp` with settings changed.

    Raises `InputError` for the method, which brings a memory of its own, and for guidance of one that knows none.
    """
    require(
        not any(each.partition("=")[0].strip() == "method" for each in overrides),
        "--set method=... would leave the memory as it is; give --method NAME, or method= from Python.",
    )
    after = loading.override(exp, list(overrides))
    own, asked = ((each.sample.guidance, each.sample.negative_prompt) for each in (exp, after))
    require(
        method.whole_clip or own == asked,
        f"sample.guidance and sample.negative_prompt lead clips that are denoised as a whole, and the method is "
        f"{method.name}; leave them out, or give --method bidirectional.",
    )
    return after


def require_number(what: str, value: object) -> None:
    """Raises `InputError` unless `value` is a whole number of 32 bits, as noise is drawn from."""
    fits = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    require(
        fits and 0 <= int(value) < 2**32,  # type: ignore[arg-type]
        f"{what}={shown(value)} must be a whole number from 0 to {2**32 - 1}; give such a one.",
    )


def built_of(exp: Experiment) -> Mapping[str, object]:
    """The settings by their keys that networks are made with, and hold from then on."""
    groups = {"dit": exp.dit, "codec": exp.codec, "text": exp.text}
    settings = {
        f"{name}.{key}": value for name, one in groups.items() for key, value in vars(one).items()
    }
    convolutions = {
        f"compressor.{key}": getattr(exp.compressor, key, None) for key in ("channels", "strides")
    }
    return settings | convolutions


def require_length(method: Method, exp: Experiment, blocks: int) -> None:
    """Raises `InputError` for more blocks than a method of one clip makes, or fewer than its window has."""
    window = exp.clip if method.whole_clip else exp.cache.full_frames
    together = exp.cache.window // exp.cache.block
    require(
        not exp.cache.joint or blocks >= together,
        f"method {method.name} denoises {together} blocks together, one for each step, and {blocks} were asked for; "
        f"ask for at least {together}.",
    )
    require(
        not (method.one_clip or method.whole_clip) or blocks * exp.cache.block <= window,
        f"method {method.name} makes one clip of {window} frames, and {blocks} blocks of {exp.cache.block} were asked "
        f"for; ask for at most {window // exp.cache.block}, or take a method and weights for longer videos, such as "
        "self-forcing.",
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
        value = methods.named(own.method if method is None else method)
        if not value.whole_clip:
            cards.require_samples(own.card)
        exp = with_overrides(own, memory, overrides, value)
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
            method=value,
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
        """The same model with another memory, a name in `config.PROFILES`, of its own block, grid and trained range."""
        return self._with(with_overrides(self.experiment, profile, (), self.method))

    def with_settings(self, overrides: Sequence[str]) -> "Pipeline":
        """The same weights with settings changed, such as `cache.top=8`."""
        return self._with(_set(self.method, self.experiment, overrides))

    def with_method(self, method: str | Method) -> "Pipeline":
        """The same model under another method: a name in `methods.METHODS`, or a value."""
        value = methods.named(method)
        if not value.whole_clip:
            cards.require_samples(self.experiment.card)
        return dataclasses.replace(
            self._with(with_overrides(self.experiment, None, (), value)), method=value
        )

    def for_length(self, blocks: int) -> "Pipeline":
        """The same model with room for a video of so many blocks, where its method needs more for a longer one."""
        exp = lengthened(self.method, self.experiment, blocks)
        return self if exp == self.experiment else self._with(exp)

    def _with(self, exp: Experiment) -> "Pipeline":
        was = built_of(self.experiment)
        changed = [key for key, value in built_of(exp).items() if was.get(key) != value]
        require(
            not changed,
            f"{', '.join(changed)} decides about a network when it is loaded; give it to Pipeline.from_pretrained or, "
            "for all videos of a command, with --set.",
        )
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
        require_number("seed", seed)
        for video_number in videos:
            require_number("a video's id", video_number)
        return player.start(self, seeds=seed, videos=videos)

    def text_kv(self, prompts: Sequence[str]) -> Any:
        """Text keys and values per layer of one prompt per video."""
        states = self.text(*self.tokenizer.encode(prompts))
        return player.text_program(self.nets.dit, self.experiment.dtypes.compute, states)

    def check(self, prompts: Sequence[str]) -> None:
        """Raises `InputError` unless there are prompts that the method can follow, and every word of them is known."""
        require(
            not isinstance(prompts, str) and all(isinstance(each, str) for each in prompts),
            f"prompts={shown(prompts, 60)} is no list of prompts, one for each block; for one prompt throughout give "
            "[prompt] * blocks.",
        )
        for prompt in dict.fromkeys(prompts):
            require(
                prompt.encode(errors="ignore").decode() == prompt,
                f"prompt {shown(prompt)} holds bytes that are no text; write it in UTF-8.",
            )
        require(len(prompts) > 0, "a video needs at least one block; give one prompt per block.")
        require_one_prompt(self.method, prompts)
        sample = self.experiment.sample
        negative = (
            [sample.negative_prompt] if sample.guidance != 1 and sample.negative_prompt else []
        )
        self.tokenizer.encode(list(dict.fromkeys([*prompts, *negative])))

    def stream(
        self,
        prompts: Sequence[str],
        *,
        seed: int | None = None,
        identity: int | None = None,
        state: State | None = None,
        changes: Mapping[int, str] | None = None,
    ) -> Iterator[Finished]:
        """Finished blocks of one video, one prompt per block; all are checked before the first is drawn.

        `changes` says, by block, what the new prompt there does to the memory (`methods.method.AT_PROMPT_CHANGE`);
        elsewhere a new prompt does what the method says.

        A longer run begins with the shorter one, bit for bit; a changed later prompt leaves earlier blocks alone.
        A `state` that an earlier run left goes on from its block, as if that run had never stopped; it holds the
        seed and the identity of that run, so neither is given beside it.

        Where the method denoises whole clips, the blocks are parts of one, under one prompt; it has no state, and its
        length decides about all of it.
        """
        self.check(prompts)
        changes = dict(changes or {})
        check_changes(self.experiment, changes)
        require_length(self.method, self.experiment, len(prompts))
        videos = [video_id(prompts[0]) if identity is None else identity]
        if self.method.whole_clip:
            require(
                state is None and not changes,
                f"method {self.method.name} denoises all frames of a clip together, without a state to go on from or "
                "a memory to change; leave state and changes out.",
            )
            return self._clip(prompts, 0 if seed is None else seed, videos)
        model = self.for_length(len(prompts))
        if state is None:
            state = model.start(seed=0 if seed is None else seed, videos=videos)
        else:
            require(
                seed is None and identity is None,
                f"seed={seed} and identity={identity} stand beside a state, which holds both already; leave them out.",
            )
            model.require_own(state)
        return model._stream(prompts, state, changes)

    def require_own(self, state: State) -> None:
        """Raises `InputError` unless `state` is one that a block of one video of this model left, not used up since."""
        require(
            isinstance(state, State),
            f"a {type(state).__name__} is no state to go on from; give the `state` of a finished block.",
        )
        leaves = jax.tree.leaves(state)
        require(
            not any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in leaves),
            "this state was used up by the block that was drawn behind it; go on from the newest block's, or keep a "
            "copy: jax.tree.map(np.array, block.state).",
        )
        mine = dict(self.experiment.cache.stored)
        other = [
            f"{key}={mine.get(key)!r}" for key, value in state.stored if mine.get(key) != value
        ]
        require(
            not other,
            f"this state was left by another memory than this one of cache.{', cache.'.join(other)}; go on with the "
            "settings it was drawn with.",
        )
        own = jax.eval_shape(lambda: player.start(self, seeds=0, videos=[0]))
        require(
            jax.tree.structure(own) == jax.tree.structure(state)
            and all(
                (one.shape, one.dtype) == (leaf.shape, leaf.dtype)
                for one, leaf in zip(jax.tree.leaves(own), leaves, strict=True)
            ),
            "this state belongs to another memory, other number formats, another model or several videos; go on with "
            "the settings it was drawn with.",
        )

    def _clip(self, prompts: Sequence[str], seed: int, videos: Sequence[int]) -> Iterator[Finished]:
        exp = self.experiment
        transformer = self.nets.dit
        if not isinstance(transformer, dit.WanDiT):
            raise InputError(
                f"method {self.method.name} runs the transformer of Wan2.1, and this model has "
                f"{type(transformer).__name__}; give another method."
            )

        def read(prompt: str) -> TextStates:
            return self.text(*self.tokenizer.encode([prompt]))

        text = whole_clip.text_of(exp.sample, read(prompts[0]), read)
        who = (np.asarray(each, np.uint32) for each in ([seed], videos))
        noise = whole_clip.noise_program(exp.step, *who, blocks=len(prompts))
        noise, text = jax.device_put((noise, text), player.beside(self.nets))
        latent = whole_clip.denoise_program(
            transformer, whole_clip.config_of(exp.step), noise, text
        )
        blocks = np.split(np.asarray(latent[0]), len(prompts))
        nothing = np.zeros((exp.dit.layers, 0))
        for index, frames in enumerate(whole_clip.shown(self, latent)):
            frames = np.asarray(frames[0])
            video.guard(frames, first=index * len(frames))
            yield Finished(
                index=index,
                prompt=prompts[index],
                frames=frames,
                latent=blocks[index],
                block_ids=nothing.astype(np.int32),
                scores=nothing,
                positions=nothing,
                layout={"block": exp.cache.block},
                sink_sum=0,
                state=None,
            )

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
        self, prompts: Sequence[str], *, seed: int | None = None, identity: int | None = None
    ) -> np.ndarray:
        """The whole video [frames, height, width, 3] in [-1, 1]; `stream` keeps less in memory."""
        return np.concatenate(
            [block.frames for block in self.stream(prompts, seed=seed, identity=identity)]
        )
