"""Model folders for tests of everything that starts from weights on disk."""

import jax
import tiny
from flax import nnx

from packforcing_jax import checkpoints, text, tokenizer, trees
from packforcing_jax.stage import captions


def model_folder(path, exp=tiny.EXP):
    """A folder that `Pipeline.from_pretrained` takes: random weights and the Stage world's words."""
    encoder = jax.jit(lambda: text.UMT5(exp.text, nnx.Rngs(2)))()
    nets = tiny.nets(exp)
    flat = checkpoints.joined(dit=trees.flatten(nets.dit), compressor=trees.flatten(nets.compressor),
                              text=trees.flatten(encoder))  # fmt: skip
    words = tokenizer.word_tokenizer(captions.VOCABULARY).to_str()
    checkpoints.save_model(path, exp, flat, tokenizer_json=words, dtype="float32")
    return path
