"""What the text says about a block of a stage story, as one sentence of a small closed vocabulary, and back."""

import functools
import re
from typing import NamedTuple

from packforcing_jax.config import Experiment, SpaceToDepthConfig
from packforcing_jax.errors import require
from packforcing_jax.networks import tokenizer
from packforcing_jax.stage import world

WORDS = {
    "colour": world.COLOURS,
    "shape": world.SHAPES,
    "speed": world.SPEEDS,
    "backdrop": world.BACKDROPS,
    "scene": world.SCENES,
    "guest": world.GUESTS,
}
GLUE = ("a", "walks", "before", "the", "curtain", "in", "scene", "with", "guest")
VOCABULARY: tuple[str, ...] = GLUE + sum(WORDS.values(), ())
MAX_WORDS = 16  # the longest sentence has 15 words; one more ends it


@functools.cache
def reader() -> tokenizer.Tokenizer:
    """The tokenizer of this vocabulary."""
    return tokenizer.Tokenizer(tokenizer.word_tokenizer(VOCABULARY), MAX_WORDS)


def tells(exp: Experiment) -> bool:
    """Whether a model of `exp` draws this world: its frames and blocks, told in this vocabulary."""
    pixels = tuple(size * exp.codec.space_factor for size in exp.latent)
    exact = (
        isinstance(exp.codec, SpaceToDepthConfig)
        and exp.text.vocab == reader().inner.get_vocab_size()
    )
    return exact and pixels == (world.SIZE,) * 2 and exp.cache.block == world.BLOCK


class Prompt(NamedTuple):
    """What a text asks for, as numbers into the stage's tables; None where it does not say."""

    colour: int | None = None
    shape: int | None = None
    speed: int | None = None
    backdrop: int | None = None
    scene: int | None = None
    guest: int | None = None


def caption(story: world.Story, block: int) -> str:
    """The sentence of one block; without a guest it is shorter."""
    guest = story.guests[block]
    return write(
        Prompt(
            story.colour,
            story.shape,
            story.speed,
            story.backdrop,
            story.scenes[block],
            None if guest < 0 else guest,
        )
    )


def write(prompt: Prompt) -> str:
    """The sentence for a prompt in which only the guest may be missing."""
    phrases = {
        name: words[prompt._asdict()[name]] for name, words in WORDS.items() if name != "guest"
    }
    sentence = (
        "in scene {scene} a {colour} {shape} walks {speed} before the {backdrop} curtain".format(
            **phrases
        )
    )
    return (
        sentence if prompt.guest is None else f"{sentence} with guest {world.GUESTS[prompt.guest]}"
    )


def parse(text: str) -> Prompt:
    """What `text` says, whatever the order of its words; other words are ignored."""
    heard = set(re.findall(r"[a-z]+", text.lower()))
    return Prompt(
        **{
            name: _only(name, [word for word in words if word in heard], words)
            for name, words in WORDS.items()
        }
    )


def _only(name: str, named: list[str], words: tuple[str, ...]) -> int | None:
    """The number of the one word found, if any."""
    require(
        len(named) < 2,
        f"The text names more than one {name} ({', '.join(named)}); keep one of them.",
    )
    return words.index(named[0]) if named else None
