"""Prompts read layer by layer are what the whole encoder makes of them, and are kept once for all."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from packforcing_jax import config
from packforcing_jax.errors import InputError
from packforcing_jax.io import model_folder, text_encoder
from packforcing_jax.networks import text

CFG = dataclasses.replace(tiny.EXP.text, layers=3, max_words=7)
IDS = np.array([[5, 9, 1, 0, 0, 0, 0], [7, 2, 11, 40, 3, 8, 1], [1, 0, 0, 0, 0, 0, 0]], np.int32)
MASK = (IDS > 0).astype(np.int32)


@pytest.fixture(scope="module")
def model():
    """An encoder whose every parameter counts."""
    shapes = jax.eval_shape(lambda: text.UMT5(CFG, nnx.Rngs(0)))
    return tiny.filled(shapes)


def held(model, **changes):
    return dataclasses.replace(text_encoder.of_module(model, config.DtypeConfig()), **changes)


def test_states_are_those_of_the_whole_encoder(model):
    np.testing.assert_allclose(
        held(model)(IDS, MASK), text.encode(model, IDS, MASK), rtol=0, atol=2e-6
    )


def test_a_prompt_alone_and_among_others_is_the_same_to_the_last_bit(model):
    together = held(model)(IDS, MASK)
    for i in range(len(IDS)):
        np.testing.assert_array_equal(held(model)(IDS[i : i + 1], MASK[i : i + 1])[0], together[i])


def test_states_have_the_dtype_asked_for(model):
    half = held(model, dtype="bfloat16")(IDS, MASK)
    assert half.dtype == jnp.bfloat16
    error = np.abs(np.float32(half) - held(model)(IDS, MASK)).max()
    assert 0 < error < 0.1


def test_no_more_than_a_layer_is_read_at_a_time(model, tmp_path):
    model_folder.save(
        tmp_path / "m", config.Experiment("x", text=CFG), {"text": model}, dtype="float32"
    )
    opened = model_folder.opened(tmp_path / "m")
    encoder = text_encoder.of_folder(opened, opened.experiment.text, config.DtypeConfig())
    assert encoder.store is None  # a small one is quicker to ask again
    np.testing.assert_array_equal(encoder(IDS, MASK), held(model)(IDS, MASK))


def counting(encoder):
    """The encoder, and a list that grows with every tensor read for a layer."""
    reads = []

    def watched(tensor):
        def read():
            reads.append(tensor.name)
            return tensor.read()

        return dataclasses.replace(tensor, read=read)

    tensors = {name: watched(tensor) for name, tensor in encoder.tensors.items()}
    return dataclasses.replace(encoder, tensors=tensors), reads


def test_kept_prompts_are_not_read_again(model, tmp_path):
    first, _ = counting(held(model, store=tmp_path / "store"))
    states = first(IDS[:2], MASK[:2])
    again, reads = counting(held(model, store=tmp_path / "store"))
    np.testing.assert_array_equal(again(IDS[[1, 0]], MASK[[1, 0]]), states[jnp.array([1, 0])])
    assert (
        not [name for name in reads if name.startswith("blocks")].count("blocks/attn/v/kernel") > 1
    )  # its hash
    again(IDS, MASK)
    assert reads.count("blocks/attn/v/kernel") == 1 + CFG.layers


def test_prompts_are_prepared_in_one_walk(model, tmp_path):
    encoder, reads = counting(held(model, store=tmp_path / "store"))
    encoder.prepare(IDS, MASK)
    walked = reads.count("blocks/attn/q/kernel")
    for i in range(len(IDS)):
        encoder(IDS[i : i + 1], MASK[i : i + 1])
    assert reads.count("blocks/attn/q/kernel") == walked == 1 + CFG.layers
    bare, reads = counting(held(model))
    bare.prepare(IDS, MASK)
    assert reads == []


def test_other_weights_and_other_dtypes_share_nothing(model, tmp_path):
    held(model, store=tmp_path)(IDS[:1], MASK[:1])
    changed = jax.tree.map(lambda leaf: leaf * 1.5, model)
    for other in (held(changed, store=tmp_path), held(model, store=tmp_path, dtype="float16")):
        bare = dataclasses.replace(other, store=None)
        np.testing.assert_array_equal(other(IDS[:1], MASK[:1]), bare(IDS[:1], MASK[:1]))
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3


@pytest.mark.parametrize("damage", [b"", b"\x00" * 40, None])
def test_damaged_states_are_read_again_and_mended(model, tmp_path, damage):
    wanted = held(model, store=tmp_path)(IDS[:1], MASK[:1])
    (kept,) = tmp_path.rglob("*.safetensors")
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-3] if damage is None else damage)
    np.testing.assert_array_equal(held(model, store=tmp_path)(IDS[:1], MASK[:1]), wanted)
    assert kept.read_bytes() == whole
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]


def test_a_store_that_cannot_be_written_is_named_once_and_done_without(model, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    text_encoder._say_once.cache_clear()
    encoder = held(model, store=tmp_path / "file")
    np.testing.assert_array_equal(encoder(IDS[:1], MASK[:1]), held(model)(IDS[:1], MASK[:1]))
    encoder(IDS[:1], MASK[:1])
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert str(tmp_path / "file") in err
    assert "XDG_CACHE_HOME" in err


def test_without_a_home_folder_nothing_is_kept(monkeypatch, capsys):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(text_encoder.Path, "home", homeless)
    text_encoder._say_once.cache_clear()
    assert text_encoder.default_store() is None
    assert "no home folder" in capsys.readouterr().err


def test_weights_of_another_encoder_are_refused(model):
    tensors = dict(held(model).tensors)
    tensors["blocks/ffn/fc1/kernel"] = tensors["blocks/ffn/fc2/kernel"]
    with pytest.raises(InputError, match="ffn/fc1/kernel: shape"):
        held(model, tensors=tensors)(IDS[:1], MASK[:1])


def test_the_store_lies_where_caches_belong(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert text_encoder.default_store() == tmp_path / "packforcing" / "text"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert text_encoder.default_store().parts[-3:] == (".cache", "packforcing", "text")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda table: None, "embedding/embedding missing, which must be"),
        (lambda table: table[:-1], "which must be"),
        (lambda table: table[:, :-1], "which must be"),
        (lambda table: table * np.nan, "not finite in embedding/embedding"),
    ],
)
def test_a_table_of_embeddings_that_does_not_fit_is_refused(model, change, said):
    encoder = held(model)
    tensor = encoder.tensors[text_encoder.EMBEDDING]
    table = change(tensor.read())
    own = (
        {}
        if table is None
        else {
            text_encoder.EMBEDDING: dataclasses.replace(
                tensor, shape=table.shape, read=lambda: table
            )
        }
    )
    others = {name: each for name, each in encoder.tensors.items() if name != tensor.name}
    with pytest.raises(InputError, match=said):
        dataclasses.replace(encoder, tensors=others | own)(IDS, MASK)


def test_a_token_beyond_the_vocabulary_is_refused(model):
    with pytest.raises(InputError, match=f"gives token {CFG.vocab}, and the text encoder has"):
        held(model)(np.full_like(IDS, CFG.vocab), MASK)
