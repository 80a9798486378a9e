"""Model folders for tests of everything that starts from weights on disk."""

import jax
import tiny
from flax import nnx

from packforcing_jax.io import model_folder
from packforcing_jax.networks import text, tokenizer
from packforcing_jax.stage import captions


def write_model_folder(path, exp=tiny.EXP):
    """A folder that `Pipeline.from_pretrained` takes: random weights and the Stage world's words."""
    encoder = jax.jit(lambda: text.UMT5(exp.text, nnx.Rngs(2)))()
    nets = tiny.nets(exp)
    parts = {"dit": nets.dit, "compressor": nets.compressor, "text": encoder}
    words = tokenizer.word_tokenizer(captions.VOCABULARY).to_str()
    model_folder.save(path, exp, parts, dtype="float32", texts={model_folder.TOKENIZER: words})
    return path
