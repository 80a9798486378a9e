"""From sentences to video: a model folder, a prompt per block, and blocks that come out as they are finished."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, Unpack, overload

import jax
import numpy as np
from flax import nnx

from packforcing_jax import methods, pytrees
from packforcing_jax.config import PROFILES, Experiment, cards, loading
from packforcing_jax.config.experiment import require_whole
from packforcing_jax.config.memory import profiled
from packforcing_jax.errors import InputError, nearest, require, shown
from packforcing_jax.io import model_folder, text_encoder, video
from packforcing_jax.methods.method import Method, applied, lengthened, require_one_prompt
from packforcing_jax.networks import base_model, codec, compressor, dit, tokenizer
from packforcing_jax.sampling import block_step, player, snapshots, state_folder, whole_clip
from packforcing_jax.sampling.finished import Finished
from packforcing_jax.sampling.loaded import Origin, TextEncoder, Tokenizer
from packforcing_jax.sampling.player import State
from packforcing_jax.sampling.requests import (
    blocks_of,
    check_changes,
    require_blocks,
    require_length,
    require_not_used_up,
    require_number,
    video_id,
)
from packforcing_jax.sampling.session import Session, videos_of
from packforcing_jax.sampling.snapshots import Keep
from packforcing_jax.types import TextStates

SHIPPED = model_folder.SHIPPED


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


def _read(model: model_folder.Opened, part: str, build: Callable[[], Any], dtype: str) -> Any:
    """A part of a model folder as the module that `build` makes; one without parameters needs no file."""
    shapes = jax.eval_shape(build)
    tensors = model.part(part) if pytrees.flatten(shapes) else {}
    return model_folder.fill(
        shapes, tensors, dtype=dtype, source=f"the {part} weights of {model.folder}"
    )


class Length(TypedDict, total=False):
    """How long a video of one prompt is; one of the two."""

    seconds: float | None
    blocks: int | None


class Changed(TypedDict, total=False):
    """How the model of a session differs from the pipeline it is made of."""

    method: str | Method | None
    overrides: Sequence[str]


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

    @overload
    def session(
        self,
        *,
        seed: int = ...,
        identity: int | None = ...,
        batch: None = ...,
        keep: int | Keep | None = ...,
        **changed: Unpack[Changed],
    ) -> Session[Finished]: ...
    @overload
    def session(
        self,
        *,
        seed: int = ...,
        identity: Sequence[int] | None = ...,
        batch: int,
        keep: int | Keep | None = ...,
        **changed: Unpack[Changed],
    ) -> Session[tuple[Finished, ...]]: ...
    def session(
        self,
        *,
        seed: int = 0,
        identity: int | Sequence[int] | None = None,
        batch: int | None = None,
        keep: int | Keep | None = snapshots.AUTO,
        **changed: Unpack[Changed],
    ) -> Session[Any]:
        """A video that is told block by block, may branch and go back, and can be saved; `batch`: several together.

        `identity` decides the noise beside the seed; without it the first prompt does. Video `i` of a batch has the
        seed `seed + i`. `keep` says how many states behind the newest blocks are kept to go back to: a number, None
        for all, or a `snapshots.Keep`; by default two, and more as long as they take little.

        `method` and `overrides` change the method and single settings first, as `with_method` and `with_settings` do.
        """
        model = self
        if changed.get("method") is not None:
            model = model.with_method(changed["method"])  # type: ignore[arg-type]
        if changed.get("overrides"):
            model = model.with_settings(changed["overrides"])  # type: ignore[typeddict-item]
        keep = keep if isinstance(keep, Keep) else Keep(keep)
        return Session(model, videos_of(seed, identity, batch), keep)

    def restore(
        self,
        folder: str | Path,
        *,
        at: int | None = None,
        keep: int | Keep | None = snapshots.AUTO,
    ) -> Session[Any]:
        """The session that `Session.save` or `sample --state` left in a folder, behind its newest block, or block `at`.

        It has the settings and the method it was saved with; the weights must be these.
        """
        held = state_folder.numbers(folder)
        position = held[-1] if at is None else at
        require(
            position in held,
            f"State folder {folder} holds states behind {shown(held)} blocks and none behind {shown(at)}; choose one "
            "of them.",
        )
        model = self.with_saved(state_folder.settings_in(folder, position))
        saved, notes = state_folder.read(model, folder, position)
        return Session.of_saved(model, saved, notes, keep if isinstance(keep, Keep) else Keep(keep))

    def with_saved(self, settings: Mapping[str, object]) -> "Pipeline":
        """The same weights with all settings of another time, as `model_folder.experiment_to_json` writes them."""
        if settings == json.loads(model_folder.experiment_to_json(self.experiment)):
            return self
        exp = model_folder.experiment_from_json(json.dumps(settings), "the saved settings")
        return dataclasses.replace(self._with(exp), method=methods.named(exp.method))

    def stream(
        self,
        prompts: str | Iterable[str],
        *,
        seed: int | None = None,
        identity: int | None = None,
        state: State | None = None,
        changes: Mapping[int, str] | None = None,
        **length: Unpack[Length],
    ) -> Iterator[Finished]:
        """Finished blocks of one video, one prompt per block; all are checked before the first is drawn.

        One string is the prompt of the whole video, of `seconds` or `blocks`. `changes` says, by block, what the new
        prompt there does to the memory (`methods.method.AT_PROMPT_CHANGE`); elsewhere a new prompt does what the
        method says.

        A longer run begins with the shorter one, bit for bit; a changed later prompt leaves earlier blocks alone.
        A `state` that an earlier run left goes on from its block, as if that run had never stopped; it holds the
        seed and the identity of that run, so neither is given beside it.

        Where the method denoises whole clips, the blocks are parts of one, under one prompt; it has no state, and its
        length decides about all of it.
        """
        story = self._story(prompts, length)
        self.check(story)
        changes = dict(changes or {})
        check_changes(self.experiment, changes)
        require_length(self.method, self.experiment, len(story))
        videos = [video_id(story[0]) if identity is None else identity]
        if self.method.whole_clip:
            require(
                state is None and not changes,
                f"method {self.method.name} denoises all frames of a clip together, without a state to go on from or "
                "a memory to change; leave state and changes out.",
            )
            return self._clip(story, 0 if seed is None else seed, videos)
        model = self.for_length(len(story))
        if state is None:
            session = model.session(seed=0 if seed is None else seed, identity=videos[0], keep=0)
        else:
            require(
                seed is None and identity is None,
                f"seed={seed} and identity={identity} stand beside a state, which holds both already; leave them out.",
            )
            model.require_own(state)
            session = Session.behind(model, state, story[: state.position])
        rest = story[session.position :]
        changes = {at: how for at, how in changes.items() if at and at >= session.position}
        return session.run(rest, changes=changes, ends=True) if rest else iter(())

    def _story(self, prompts: str | Iterable[str], length: Length) -> list[str]:
        """One prompt for each block."""
        if isinstance(prompts, str) and length:
            seconds, blocks = length.get("seconds"), length.get("blocks")
            require(
                seconds is None or blocks is None,
                "seconds and blocks exclude each other; give one.",
            )
            count = blocks if seconds is None else blocks_of(self.experiment, seconds)
            require_blocks(count or 0, f"blocks={shown(count)}")
            return [prompts] * (count or 0)
        require(
            isinstance(prompts, Iterable) and not isinstance(prompts, str | bytes),
            f"prompts={shown(prompts, 60)} is no list of prompts, one for each block; for one prompt throughout say "
            "seconds= or blocks= beside it, or give [prompt] * blocks.",
        )
        require(
            not length,
            f"{' and '.join(length)} stand beside one prompt for each block; leave them out.",
        )
        return list(prompts)

    def require_own(self, state: State) -> None:
        """Raises `InputError` unless `state` is one that a block of one video of this model left, not used up since."""
        require(
            isinstance(state, State),
            f"a {type(state).__name__} is no state to go on from; give the `state` of a finished block.",
        )
        leaves = jax.tree.leaves(state)
        require_not_used_up(state)
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

    def generate(
        self,
        prompts: str | Iterable[str],
        *,
        seed: int | None = None,
        identity: int | None = None,
        **length: Unpack[Length],
    ) -> np.ndarray:
        """The whole video [frames, height, width, 3] in [-1, 1]; `stream` keeps less in memory."""
        blocks = self.stream(prompts, seed=seed, identity=identity, **length)
        return np.concatenate([block.frames for block in blocks])
