"""A checkpoint of every card, converted at toy size, is sampled with the card's own settings, or says why not.

Transformers are those of `test_cards` with two layers, beside a small Wan autoencoder and text encoder.
"""

import convert_layouts
import numpy as np
import pytest
import test_cards
import torchfiles
from convert_layouts import put

from packforcing_jax import methods
from packforcing_jax.cli import main
from packforcing_jax.config import cards
from packforcing_jax.io import video
from packforcing_jax.methods.method import applied
from packforcing_jax.sampling.pipeline import Pipeline

BLOCKS = 4
TEXT_DIM = 48  # of the small text encoder
TOY = ("dit.text_len=6", "text.max_words=6", "latent=(8, 8)")


def refused(card: cards.Card) -> bool:
    """Whether no method samples it, as the card says of all that go block by block."""
    return bool(card.samples) and not methods.METHODS[card.method].whole_clip


REFUSED = [name for name in test_cards.LINES if refused(cards.find(name))]
SAMPLED = [name for name in test_cards.LINES if name not in REFUSED]


def network(seed, dtype="float32"):
    """A transformer whose output is as wide as its latents, and which reads what the text encoder gives."""
    shapes = convert_layouts.shapes_of_dit(layers=2, out=4)
    shapes["text_embedding.0.weight"] = (shapes["text_embedding.0.bias"][0], TEXT_DIM)
    return convert_layouts.random(shapes, dtype, seed)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """What the checkpoints lack: autoencoder, text encoder and tokenizer, as Wan2.1 has them."""
    folder = tmp_path_factory.mktemp("parts")
    encoder = torchfiles.state_dict(convert_layouts.umt5("bfloat16"))
    return [
        put(folder / "Wan2.1_VAE.pth", convert_layouts.vae()),
        put(folder / "models_t5_umt5-xxl-enc-bf16.pth", encoder),
        "--tokenizer",
        convert_layouts.put_tokenizer(folder / "tokenizer.json"),
    ]


@pytest.fixture
def converted(parts, tmp_path, capsys, monkeypatch):
    """A function that converts the checkpoint of a card, under its real names, and gives the model folder."""
    monkeypatch.setattr(test_cards, "net", network)

    def convert(name):
        folder = tmp_path / "model"
        given = [*test_cards.written(tmp_path, name), *parts, "--out", folder]
        told = [] if name in test_cards.PUBLISHED else ["--card", name]
        toy = [word for each in TOY for word in ("--set", each)]
        code, said = test_cards.convert(capsys, *given, *told, *toy)
        assert code == 0, said
        return folder

    return convert


def blocks_of(card: cards.Card) -> int:
    """Blocks to sample: a window of blocks that are denoised together has to fill."""
    cache = card.experiment.cache
    return max(BLOCKS, cache.window // cache.block)


@pytest.mark.parametrize("name", SAMPLED)
def test_a_card_samples(name, converted):
    line, card = test_cards.LINES[name], cards.find(name)
    folder = converted(name)
    stored = "bfloat16" if line.content is test_cards.half else "float32"
    test_cards.expect_network(folder, test_cards.MEANT, stored)
    known = ["sample.negative_prompt=blue"] if card.experiment.sample.negative_prompt else []
    model = Pipeline.from_pretrained(folder, overrides=known)  # a word of the small tokenizer
    exp = model.experiment
    assert model.method.name == line.method
    assert (exp.card, exp.sample.steps, exp.sample.first_steps) == (
        name,
        line.steps,
        line.first_steps,
    )
    assert exp.sample.guidance == card.experiment.sample.guidance
    assert exp.cache == applied(methods.METHODS[card.method], card.experiment).cache
    made = list(model.stream(["red green"] * blocks_of(card)))
    assert [block.index for block in made] == list(range(blocks_of(card)))
    for block in made:
        assert block.latent.shape == (line.block, 8, 8, 4)
        assert block.frames.shape[1:] == (32, 32, 3)
        assert np.isfinite(block.latent).all()
        assert np.isfinite(block.frames).all()
    assert len(made[0].frames) == 1 + 4 * (line.block - 1)


def test_wan_as_published_is_sampled_by_its_own_method_alone(converted, tmp_path, capsys):
    target = tmp_path / "video.mp4"
    words = ["--weights", converted("wan2.1-t2v-1.3b"), "--prompt", "red", "--out", target]
    flags = ["--steps", 2, "--negative-prompt", "blue", "--seconds", 1]
    capsys.readouterr()
    assert main.main(["sample", *map(str, [*words, "--method", "longlive"])]) == 2
    assert "cannot be sampled block by block: it is bidirectional" in capsys.readouterr().err
    assert not target.exists()
    assert main.main(["sample", *map(str, [*words, *flags])]) == 0
    said = capsys.readouterr().err
    assert "2 steps, shift 5, guidance 5 against sample.negative_prompt" in said
    assert "not trained for this one" not in said
    assert len(video.read(target)) == 21  # six latents


@pytest.mark.parametrize("name", REFUSED)
def test_a_card_that_cannot_be_sampled_says_why(name, converted, tmp_path, capsys):
    card = cards.find(name)
    target = tmp_path / "video.mp4"
    words = ["--weights", converted(name), "--prompt", "red", "--blocks", BLOCKS, "--out", target]
    capsys.readouterr()
    assert main.main(["sample", *map(str, words)]) == 2
    said = capsys.readouterr().err.strip()
    assert said.count("\n") == 0
    assert f"card {name} cannot be sampled block by block: {card.samples}" in said
    assert not target.exists()
