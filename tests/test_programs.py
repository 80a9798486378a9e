"""The programs of sampling on shapes: what they are handed is what is held, and what they set aside is estimated."""

import dataclasses
from typing import Any

import jax
import pytest
import tiny

from packforcing_jax import config
from packforcing_jax.plan import jaxpr_cost, programs
from packforcing_jax.plan.programs import COMMITTING, DENOISING, FUSED, SHOWING, WRITTEN

HOST = tiny.with_cache(scope="shared", timing="late", archive="host")
LONG = dataclasses.replace(tiny.EXP, dit=dataclasses.replace(tiny.EXP.dit, layers=5))


def test_a_program_is_handed_what_is_held_and_nothing_else():
    """To the byte: all but what is of no use in denoising, which jit leaves out, or was donated to be handed back."""
    exp = dataclasses.replace(
        tiny.EXP, dtypes=config.DtypeConfig(cache="bfloat16", text="bfloat16")
    )
    batch = 2
    found = programs.compiled(exp, batch)
    held = programs.shapes_of(exp, batch)
    model: Any = held.nets.dit
    prompt = jaxpr_cost.nbytes(
        [
            model.text_in,
            model.text_out,
            [(block.cross.k, block.cross.v, block.cross.norm_k) for block in model.blocks],
        ]
    )
    numbers = 2 * 4 * batch  # ids of the videos and their seeds
    whole = jaxpr_cost.nbytes((model, held.memory, held.text_kv))
    assert found[DENOISING].arguments == whole - prompt + numbers
    assert found[DENOISING].reused == jaxpr_cost.nbytes(held.memory)
    assert found[programs.PROMPT].arguments == prompt + jaxpr_cost.nbytes(held.context)
    assert found[SHOWING].arguments == jaxpr_cost.nbytes(
        held.latent
    )  # this codec has no weights and remembers nothing
    assert found[SHOWING].results == pytest.approx(
        jaxpr_cost.nbytes((held.frames, held.low_res)), abs=64
    )
    assert set(found) == {
        programs.ENCODING,
        programs.PROMPT,
        DENOISING,
        f"{SHOWING} the first block",
        SHOWING,
        COMMITTING,
    }


def test_the_memory_is_handed_back_not_made_anew():
    held = programs.shapes_of(tiny.EXP, 2)
    lowered = dict(programs.lowered_programs(tiny.EXP, 2))
    given = {
        name: jaxpr_cost.nbytes(
            [leaf for leaf in jax.tree.leaves(program.args_info) if leaf.donated]
        )
        for name, program in lowered.items()
    }
    assert given == dict.fromkeys(given, 0) | {
        DENOISING: jaxpr_cost.nbytes(held.memory),
        COMMITTING: jaxpr_cost.nbytes(held.memory),
    }


def test_denoising_from_the_host_is_several_programs():
    names = [name for name, _ in programs.lowered_programs(HOST, 2) if name.startswith(DENOISING)]
    assert names == [
        f"{DENOISING}, its noise",
        f"{DENOISING}, the first step",
        f"{DENOISING}, scoring a layer",
        f"{DENOISING}, the other steps",
    ]


def test_two_layers_say_what_a_deep_model_sets_aside():
    """What a layer leaves behind for the next is gone after that."""
    cfg = programs.plain(LONG.step)
    held = programs.shapes_of(LONG, 2)
    deep = programs._traced_denoising(cfg, held, held.computed)
    logits = [(2, cfg.dit.heads, 3 * 8, keys) for keys in (held.view[1], cfg.dit.text_len)]
    found = programs.workspace(LONG, 2)
    assert found[f"{DENOISING}, {FUSED}"] == pytest.approx(
        jaxpr_cost.peak(deep, [held.view, *logits], results=False), rel=0.05
    )
    assert found == programs.workspace(
        dataclasses.replace(LONG, dit=dataclasses.replace(LONG.dit, layers=2)), 2
    )


def test_attention_written_out_sets_logits_aside():
    found = programs.workspace(tiny.EXP, 2)
    held = programs.shapes_of(tiny.EXP, 2)
    batch, room, heads, _ = held.view
    logits = batch * heads * held.latent.shape[1] * tiny.EXP.tokens_per_frame * room * 4
    for name in (DENOISING, COMMITTING):
        assert found[f"{name}, {WRITTEN}"] - found[f"{name}, {FUSED}"] > logits


def test_weights_that_are_cast_are_there_twice():
    halves = config.DtypeConfig(params="float32", compute="bfloat16", cache="bfloat16")
    mixed = dataclasses.replace(tiny.EXP, dtypes=halves)
    alike = dataclasses.replace(tiny.EXP, dtypes=dataclasses.replace(halves, params="bfloat16"))
    cast = jaxpr_cost.nbytes(programs.shapes_of(mixed).computed)
    for name, size in programs.workspace(mixed).items():
        more = cast if name.startswith((DENOISING, COMMITTING)) else 0
        assert size == programs.workspace(alike)[name] + more, name


def test_showing_is_as_large_as_its_larger_part():
    found = programs.workspace(tiny.EXP, 2)
    assert max(found["decoding"], found["low-resolution encode"]) <= found[SHOWING]
