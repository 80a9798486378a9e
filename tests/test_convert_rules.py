"""Tables of rules take every tensor to one place, tell all that is wrong at once, and read backwards."""

import json
import pathlib
import re

import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from packforcing_jax.convert import names, networks, rules, wan_dit
from packforcing_jax.convert.rules import Rule
from safetensors.numpy import load_file

from packforcing_jax.config import Experiment
from packforcing_jax.errors import InputError

GOLDEN = pathlib.Path(__file__).parent / "golden"
SHAPES = {  # transform -> axes of the checkpoint's tensor, and where each goes
    rules.same: ((5,), (0,)),
    rules.linear: ((5, 3), (1, 0)),
    rules.conv2d: ((5, 3, 2, 4), (2, 3, 1, 0)),
    rules.conv3d: ((5, 3, 2, 4, 6), (2, 3, 4, 1, 0)),
}
TABLE = (
    Rule(r"stem\.weight", "stem/kernel", rules.conv3d),
    Rule(r"middle\.(\d+)\.(norm[12])\.gamma", r"middle/\1/\2/scale", rules.gamma3d),
    Rule(r"blocks\.(\d+)\.([qk])\.weight", r"blocks/\2/kernel", rules.linear),
    Rule(r"blocks\.(\d+)\.modulation", "blocks/modulation", rules.drop0),
)


def counting(*shape):
    """Distinct numbers, so that a wrong order of axes shows."""
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def checkpoint(layers=3):
    blocks = {
        f"blocks.{i}.{x}.weight": counting(4, 2) + 100 * i for i in range(layers) for x in "qk"
    }
    rows = {f"blocks.{i}.modulation": counting(1, 6, 4) + 1000 * i for i in range(layers)}
    gammas = {
        f"middle.{i}.norm{j}.gamma": counting(5, 1, 1, 1) - i - 10 * j
        for i in (0, 2)
        for j in (1, 2)
    }
    return {"stem.weight": counting(5, 3, 2, 4, 6), **gammas, **blocks, **rows}


def shapes(layers=3):
    gammas = {f"middle/{i}/norm{j}/scale": (5,) for i in (0, 2) for j in (1, 2)}
    kernels = {f"blocks/{x}/kernel": (layers, 2, 4) for x in "qk"}
    return {
        "stem/kernel": (2, 4, 6, 3, 5),
        **gammas,
        **kernels,
        "blocks/modulation": (layers, 6, 4),
    }


def complaint(tensors, wanted, table=TABLE):
    with pytest.raises(InputError) as caught:
        rules.convert(tensors, table, wanted)
    return str(caught.value)


@pytest.mark.parametrize("transform", SHAPES)
def test_transforms_move_axes_as_they_say(transform):
    shape, axes = SHAPES[transform]
    made = rules.convert(
        {"w": counting(*shape)}, [Rule("w", "w", transform)], {"w": tuple(shape[a] for a in axes)}
    )
    np.testing.assert_array_equal(made["w"], counting(*shape).transpose(axes))


def test_patch_convolution_becomes_a_dense_layer_with_the_channel_slowest():
    weight = counting(5, 3, 1, 2, 4)
    cells = counting(3, 1, 2, 4)[None]
    kernel = rules.convert({"w": weight}, [Rule("w", "w", rules.patch)], {"w": (24, 5)})["w"]
    np.testing.assert_allclose(
        cells.reshape(1, -1) @ kernel, np.einsum("nctyx,octyx->no", cells, weight)
    )


@pytest.mark.parametrize(
    ("transform", "shape"),
    [(rules.gamma2d, (7, 1, 1)), (rules.gamma3d, (7, 1, 1, 1)), (rules.drop0, (1, 7))],
)
def test_axes_of_one_are_dropped_but_no_others(transform, shape):
    made = rules.convert({"w": counting(*shape)}, [Rule("w", "w", transform)], {"w": (7,)})
    np.testing.assert_array_equal(made["w"], np.arange(7))
    assert "of another rank or shape: w" in complaint(
        {"w": counting(*(2 * n for n in shape))}, {"w": (7,)}, [Rule("w", "w", transform)]
    )


def test_layers_are_stacked_in_order_of_number_not_of_name():
    tensors = {
        f"blocks.{i}.q.weight": np.full((2, 3), i, np.float32)
        for i in (10, 2, 0, 7, 1, 3, 11, 4, 5, 9, 6, 8)
    }
    table = [Rule(r"blocks\.(\d+)\.q\.weight", "blocks/q", rules.linear)]
    made = rules.convert(tensors, table, {"blocks/q": (12, 3, 2)})
    np.testing.assert_array_equal(made["blocks/q"][:, 0, 0], np.arange(12))


def test_groups_are_put_into_targets_that_do_not_stack():
    made = rules.convert(checkpoint(), TABLE, shapes())
    np.testing.assert_array_equal(
        made["middle/2/norm1/scale"], checkpoint()["middle.2.norm1.gamma"].ravel()
    )
    assert made["blocks/modulation"].flags.c_contiguous
    assert made["stem/kernel"].flags.c_contiguous


def test_there_and_back_is_the_identity():
    tensors = checkpoint()
    back = rules.invert(
        rules.convert(tensors, TABLE, shapes()),
        TABLE,
        {name: t.shape for name, t in tensors.items()},
    )
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)


TRANSFORMS = [*SHAPES, rules.patch, rules.gamma2d, rules.gamma3d, rules.drop0]


@settings(max_examples=60, deadline=None)
@given(
    transform=st.sampled_from(TRANSFORMS),
    sizes=st.lists(st.integers(1, 5), min_size=5, max_size=5),
    layers=st.integers(1, 4),
)
def test_every_transform_reads_backwards_at_any_size(transform, sizes, layers):
    axes = transform.split(" -> ")[0].split()
    shape = tuple(1 if axis == "1" else size for axis, size in zip(axes, sizes, strict=False))
    tensors = {f"blocks.{i}.w": counting(*shape) + 1000 * i for i in range(layers)}
    table = [Rule(r"blocks\.(\d+)\.w", "blocks/w", transform)]
    wanted = {
        "blocks/w": (layers, *table[0].match("blocks.0.w").forward(tensors["blocks.0.w"]).shape)
    }
    back = rules.invert(rules.convert(tensors, table, wanted), table, dict.fromkeys(tensors, shape))
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"novel": counting(2)}, "1 unknown to the table: novel"),
        ({"blocks.1.q.weight": None}, r"1 missing: blocks/q/kernel of layers \[1\]"),
        ({f"blocks.{i}.k.weight": None for i in range(3)}, "1 missing: blocks/k/kernel"),
        (
            {"blocks.7.q.weight": counting(4, 2)},
            "1 beyond the model's layers: blocks/q/kernel of layer 7",
        ),
        (
            {"middle.5.norm1.gamma": counting(5, 1, 1, 1)},
            "without a place in the model: middle.5.norm1.gamma ->",
        ),
        (
            {"blocks.1.q.weight": counting(2, 4)},
            r"another rank or shape: blocks.1.q.weight \(2, 4\), as \(4, 2\)",
        ),
        (
            {"blocks.1.q.weight": counting(8)},
            r"another rank or shape: blocks.1.q.weight \(8,\), expected axes 'o i'",
        ),
        ({"blocks.2.modulation": np.full((1, 6, 4), np.nan)}, "1 not finite: blocks.2.modulation"),
        ({"stem.weight": np.full((5, 3, 2, 4, 6), np.inf)}, "1 not finite: stem.weight"),
    ],
)
def test_a_mismatch_is_named(change, expected):
    tensors = {
        name: tensor for name, tensor in (checkpoint() | change).items() if tensor is not None
    }
    assert re.search(expected, complaint(tensors, shapes()))


def test_all_mismatches_come_in_one_sentence():
    wrong = {
        "novel": counting(1),
        "stem.weight": counting(1),
        "blocks.1.q.weight": counting(4, 2) * np.nan,
    }
    tensors = checkpoint() | wrong
    del tensors["blocks.2.k.weight"]
    message = complaint(tensors, shapes())
    for part in (
        "unknown to the table: novel",
        "of layers [2]",
        "shape: stem.weight",
        "not finite: blocks.1.q.weight",
    ):
        assert part in message


def test_a_foreign_checkpoint_gives_counts_and_a_few_examples():
    message = complaint({f"layer{i}": counting(1) for i in range(500)}, shapes())
    assert "500 unknown to the table" in message
    assert "and 492 more" in message
    assert len(message) < 1000


def test_two_rules_for_one_tensor_and_two_tensors_for_one_place_are_refused():
    twice = (*TABLE, Rule(r"stem\..*", "other", rules.same))
    assert "matched by several rules: stem.weight" in complaint(checkpoint(), shapes(), twice)
    merged = (Rule("a|b", "w", rules.same),)
    assert "filling a place twice: b -> w" in complaint(
        {"a": counting(3), "b": counting(3)}, {"w": (3,)}, merged
    )


def test_inverting_needs_every_array_and_uses_every_array():
    flat = rules.convert(checkpoint(), TABLE, shapes())
    names = {name: t.shape for name, t in checkpoint().items()}
    with pytest.raises(InputError, match="1 without a name in the checkpoint: extra"):
        rules.invert(flat | {"extra": counting(1)}, TABLE, names)
    del flat["stem/kernel"]
    with pytest.raises(InputError, match="1 missing: stem/kernel"):
        rules.invert(flat, TABLE, names)


def weights(kind):
    tensors = load_file(GOLDEN / f"{kind}.safetensors")
    return {
        name.removeprefix("weights/"): tensor
        for name, tensor in tensors.items()
        if name.startswith("weights/")
    }


def test_diffusers_names_are_those_of_the_reference_and_lead_back():
    theirs = weights("diffusers_wan_dit_tiny")
    with safetensors.safe_open(GOLDEN / "diffusers_wan_dit_tiny.safetensors", "np") as archive:
        names = json.loads(archive.metadata()["meta"])["name_map_original_to_diffusers"]
    ours = rules.rename(theirs, wan_dit.DIFFUSERS)
    assert ours.keys() == names.keys()
    assert all(ours[original] is theirs[name] for original, name in names.items())
    back = rules.rename(ours, [(name, original) for original, name in wan_dit.DIFFUSERS])
    assert all(back[name] is tensor for name, tensor in theirs.items())


def test_the_affine_norm_before_cross_attention_keeps_its_meaning():
    tensors = {"blocks.4.norm2.weight": counting(3), "blocks.4.norm2.bias": counting(3)}
    assert set(rules.rename(tensors, wan_dit.DIFFUSERS)) == {
        "blocks.4.norm3.weight",
        "blocks.4.norm3.bias",
    }


def test_renaming_refuses_unknown_and_colliding_names():
    with pytest.raises(InputError, match="1 unknown to the name map: blocks.0.norm3.weight"):
        rules.rename({"blocks.0.norm3.weight": counting(3)}, wan_dit.DIFFUSERS)
    with pytest.raises(InputError, match="1 given the same name: a.weight"):
        rules.rename({"b.weight": counting(1), "c.weight": counting(1)}, [("a", "b"), ("a", "c")])


def test_the_table_is_about_every_tensor_of_the_original_once():
    for name in weights("wan_dit_tiny"):
        assert sum(rule.match(name) is not None for rule in wan_dit.WAN_DIT) == 1, name


def test_names_are_made_from_the_paths_that_they_lead_to():
    forms = shapes()
    wrong = rules.no_mismatches()
    places = rules.sources(forms, TABLE, wrong)
    assert not any(wrong.values())
    assert places == {
        name: place for name in checkpoint() for rule in TABLE if (place := rule.match(name))
    }
    rules.sources({"novel": (2,)}, TABLE, wrong, "part/")
    assert wrong["without a name in the checkpoint"] == ["part/novel"]


@pytest.mark.parametrize(("part", "count"), [("dit", 825), ("codec", 194), ("text", 242)])
def test_full_size_networks_have_as_many_tensors_as_were_published(part, count):
    exp = Experiment("published")
    wrong = rules.no_mismatches()
    places = rules.sources(networks.wanted(part, exp), networks.NETWORKS[part].table, wrong)
    assert not any(wrong.values())
    assert len(places) == count
    assert all(
        sum(rule.match(name) == place for rule in networks.NETWORKS[part].table) == 1
        for name, place in places.items()
    )


def test_every_original_name_tells_its_network():
    exp = Experiment("published")
    names = {
        name: part
        for part in networks.NETWORKS
        for name in rules.sources(
            networks.wanted(part, exp), networks.NETWORKS[part].table, rules.no_mismatches()
        )
    }
    assert networks.original_names(names) == {name: (part, name) for name, part in names.items()}


def test_layers_have_one_spelling_and_an_end():
    rule = Rule(r"blocks\.(\d+)\.w", "blocks/w")
    assert rule.match("blocks.0.w") == rules.Target("blocks/w", 0)
    assert rule.match("blocks.9999.w") == rules.Target("blocks/w", 9999)
    assert not any(
        rule.match(f"blocks.{spelt}.w")
        for spelt in ("00", "01", "10000", "-1", "+1", "1_0", "\u0663", "")
    )


@pytest.mark.parametrize(
    "name",
    [
        "model.blocks.0.x",
        "_fsdp_wrapped_module.model.blocks.0.x",
        "base_model.model.model.blocks.0.x",
        "model._orig_mod.blocks.0._checkpoint_wrapped_module.x",
        "blocks._fsdp_wrapped_module.0.base_layer.x",
        "model.diffusion_model.blocks.0.x",
        "pipe.dit.blocks.0.x",
        "net.blocks.0.x",
        "_forward_module.module.dit.blocks.0.x",
    ],
)
def test_what_trainers_put_into_names_is_removed(name):
    assert names.plain(name) == "blocks.0.x"


def test_names_that_only_look_wrapped_are_kept():
    assert (
        names.plain("remodel.blocks.modulation.submodule") == "remodel.blocks.modulation.submodule"
    )


def test_lengths_are_those_of_most_tensors():
    held = {"blocks.0.a.bias": (5,), "blocks.1.a.bias": (5,), "blocks.2.a.bias": (7,), "b": ()}
    assert rules.axis(held, r"blocks\..*\.a\.bias", 0, 3) == 5
    assert rules.axis(held, "b", 0, 3) == rules.axis(held, "absent", 0, 3) == 3
    assert (rules.layers(held), rules.layers(["a"])) == (3, 0)


def test_both_configs_describe_the_same_network():
    original = {
        "dim": 60,
        "ffn_dim": 44,
        "num_heads": 3,
        "num_layers": 5,
        "text_dim": 7,
        "text_len": 9,
        "freq_dim": 10,
        "in_dim": 4,
        "out_dim": 6,
        "eps": 1e-5,
        "patch_size": [1, 3, 2],
    }
    diffusers = {
        "num_attention_heads": 3,
        "attention_head_dim": 20,
        "ffn_dim": 44,
        "num_layers": 5,
        "text_dim": 7,
        "freq_dim": 10,
        "in_channels": 4,
        "out_channels": 6,
        "eps": 1e-5,
        "patch_size": [1, 3, 2],
        "qk_norm": "rms_norm_across_heads",
        "cross_attn_norm": True,
    }
    cfg = wan_dit.config_from_original(original)
    assert cfg == wan_dit.config_from_diffusers(diffusers, text_len=9)
    assert (cfg.dim, cfg.head_dim, cfg.patch, cfg.eps) == (60, 20, (1, 3, 2), 1e-5)


@pytest.mark.parametrize("variant", [{"cross_attn_norm": False}, {"qk_norm": False}])
def test_other_architectures_are_refused(variant):
    with pytest.raises(InputError, match="is not Wan2.1's text-to-video network"):
        wan_dit.config_from_original(
            {"dim": 60, "ffn_dim": 44, "num_heads": 3, "num_layers": 5} | variant
        )
