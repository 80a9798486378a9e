"""What is timed is what sampling runs, behind a memory that is really full; figures come from a clock of our own."""

import dataclasses
import functools
import itertools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from benchmarks import on_h200
from packforcing_jax import config, pytrees
from packforcing_jax.config import loading
from packforcing_jax.errors import InputError
from packforcing_jax.memory import layout as layouts
from packforcing_jax.memory import view
from packforcing_jax.plan import bench, budget, jaxpr_cost, timing
from packforcing_jax.sampling import block_step, player

PLAIN = tiny.with_cache(top=0, capacity=0, sink=4, recent=5)  # nothing packed, no whole blocks
ALL = tuple(bench.PARTS)


@functools.cache
def model(exp=tiny.EXP):
    return bench.random_model(exp)


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Small products, and compilers that do not try hard: nothing here depends on how fast anything is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "PRODUCTS", {"cpu": (12, 17)})
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)


def ticking():
    """A clock by which every run takes as many seconds as runs were before it."""
    return itertools.accumulate(itertools.count(), lambda now, n: now + n // 2 % 10_000).__next__


@pytest.fixture(scope="module")
def found(quick):
    return bench.measure(model(), warmup=1, repeats=2, clock=ticking())


# The memory


@pytest.mark.parametrize("cfg", [*config.PROFILES.values(), tiny.EXP.cache, PLAIN.cache], ids=str)
def test_nothing_is_empty_behind_the_block_that_is_timed(cfg):
    exp = dataclasses.replace(tiny.EXP, cache=dataclasses.replace(cfg, score_pool=(1, 1, 1)))
    full = budget.full_position(exp)
    seen, before = (layouts.layout(cfg, layouts.begin(full - back)) for back in (0, 1))
    assert (int(seen.sink), int(seen.recent), int(seen.num_selected)) == (
        cfg.sink,
        cfg.recent,
        cfg.attended,
    )
    visible = [int((each.ids >= 0).sum()) for each in (seen, before)]
    assert visible == [cfg.capacity, cfg.capacity - 1 if cfg.capacity else 0]
    keys = cfg.sink + cfg.recent + cfg.block
    assert (
        bench.attended(exp)
        == keys * exp.tokens_per_frame + cfg.attended * exp.tokens_per_packed_block
    )


def test_what_is_there_is_random_finite_and_in_its_dtype():
    halves = dataclasses.replace(tiny.EXP, dtypes=config.DtypeConfig(cache="bfloat16"))
    held = bench.scene(model(halves), ALL)
    own = (
        held.model.nets,
        held.model.vae,
        held.state.memory.layers,
        held.inputs["frames"],
    )
    for x in jax.tree.leaves(own):
        values = np.asarray(x, np.float64)
        assert np.isfinite(values).all()
        assert x.size < 8 or np.unique(values).size > 0.5 * min(x.size, 100)
    views = block_step.views_of(held.state.memory)
    assert {x.dtype.name for x in jax.tree.leaves(views)} == {"bfloat16"}
    assert {x.dtype.name for x in jax.tree.leaves(held.model.nets)} == {"float32"}
    assert int(held.state.memory.num_blocks) == budget.full_position(halves)
    assert all((np.asarray(one.ids) >= 0).all() for one in held.inputs["selection"])


def test_storing_is_given_what_committing_makes():
    exp = dataclasses.replace(
        tiny.EXP, dtypes=config.DtypeConfig(cache="bfloat16", compute="float16")
    )
    held = bench.shapes(exp)
    layout = layouts.layout(exp.cache, layouts.begin(4))
    own = block_step.Access(keep=lambda own, view, past: own)

    def made(nets, latent, low, words, memory):
        nets = pytrees.cast(nets, "float16")
        views = block_step.views_of(memory)
        denoiser = block_step.Denoiser(nets, exp.step, words)
        full = block_step.read_clean(denoiser, layout, latent, views, own)
        packed = block_step.read_packed(denoiser, layout, latent, low, views, own)
        return full, packed, nets.dit.blocks[0].attn.queries(nets.dit.embed(latent))

    given = (held.inputs[name] for name in ("latent", "low_res", "text_kv"))
    want = jax.eval_shape(made, held.model.nets, *given, held.state.memory)
    given = held.inputs["full"], held.inputs["packed"], held.inputs["queries"][0]
    assert forms_of(given) == forms_of(want)


def forms_of(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)


def test_only_what_the_parts_take_is_made():
    given = bench.scene(model(), ["store"]).inputs
    assert set(given) == {"latent", "full", "packed", "selection"}
    assert set(bench.scene(model(), ALL).inputs) == {
        taken for part in bench.PARTS.values() for taken in part.takes
    }


# The parts


def test_every_part_hands_on_a_state_of_the_same_form():
    held = bench.scene(model(), ALL)
    state = held.state
    form = forms_of(held.state)
    for name in ALL:
        n = int(state.memory.num_blocks)
        state, out = held.run(name)(state)
        assert forms_of(state) == form, name
        assert int(state.memory.num_blocks) - n == (name in ("store", "commit", "second")), name
        assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(out)), name


def test_rounds_compile_nothing_again(found):
    functions = (
        player.denoise_program,
        player.show_program,
        player.commit_program,
        bench.forward,
        bench.store,
    )
    before = [each._cache_size() for each in functions]
    bench.measure(model(), ["forward", "store", "second"], warmup=0, repeats=2)
    assert [each._cache_size() for each in functions] == before


def test_forward_is_the_first_step_of_a_block():
    held = bench.scene(model(), ["forward"])
    cfg = tiny.EXP.step
    memory = held.state.memory
    none = jnp.zeros((0, *held.inputs["latent"].shape))
    noise = block_step.Noise(noise=held.inputs["latent"], renoise=none, random=none)

    def step(nets, noise, words, memory):
        layout = layouts.layout(cfg.cache, memory.progress)
        views = block_step.views_of(memory)
        denoiser = block_step.Denoiser(nets, cfg, words)
        return block_step.first_step(denoiser, layout, noise, views)[0]

    want = tiny.jit(step)(held.model.nets, noise, held.inputs["text_kv"], memory)
    _, clean = held.run("forward")(held.state)
    np.testing.assert_allclose(clean, want, atol=1e-5)


def test_choosing_is_what_each_layer_does_on_its_way():
    held = bench.scene(model(), ["selection"])
    spec = tiny.EXP.memory
    layout = layouts.layout(spec.cache, held.state.memory.progress)
    _, chosen = held.run("selection")(held.state)
    recall = tiny.jit(lambda *args: view.recall(spec, layout, *args)[1])
    for layer, found in enumerate(chosen):
        own = (
            held.state.memory.layers[layer],
            held.inputs["queries"][layer],
            held.inputs["random"][layer],
        )
        assert np.asarray(recall(*own).ids).tolist() == np.asarray(found.ids).tolist()


def test_parts_are_chosen_by_name_and_by_what_the_memory_has():
    assert tuple(bench.parts_of(tiny.EXP, ())) == ALL
    assert tuple(bench.parts_of(tiny.EXP, ("second", "forward"))) == ("forward", "second")
    assert set(ALL) - set(bench.parts_of(PLAIN, ())) == {"selection", "compression"}
    with pytest.raises(InputError, match="--part decod is unknown; did you mean decode"):
        bench.parts_of(tiny.EXP, ("decod",))
    with pytest.raises(InputError, match="selection: cache.top=0"):
        bench.parts_of(PLAIN, ("selection",))


def test_a_memory_without_packed_blocks_is_measured_too():
    found = bench.measure(model(PLAIN), ["store"], warmup=0, repeats=1)
    assert found.operations == {"store": 0}
    assert (
        found.moved["store"] >= 2 * 3 * 8 * 36 * 2 * 2 * 4
    )  # tokens, channels, K and V, layers, bytes


def test_an_archive_on_the_host_is_refused():
    exp = tiny.with_cache(archive="host", scope="shared", timing="late")
    with pytest.raises(InputError, match="archive='host'.*set cache.archive=device"):
        bench.shapes(exp)


# Figures


def test_operations_are_those_that_plan_counts(found):
    exp = tiny.EXP
    ours = found.operations
    rows = budget.of(exp, budget.full_position(exp) + 1, dtype="float32").rows
    plan = {name.removeprefix("operations/"): row.counted for name, row in rows.items()}
    padding = plan["one step"] - plan["one step, keys attended"]
    steps = len(exp.sample.steps)
    assert ours["forward"] == plan["one step, keys attended"]
    assert ours["denoise"] == plan["denoising"] + plan["selection"] - steps * padding
    assert ours["selection"] == plan["selection"]
    assert ours["decode"] == plan["decoding"] == 0
    committing = plan["clean pass"] + plan["packing pass"]  # and the last layer's attention, unread
    assert committing - padding < ours["commit"] < committing + plan["one step"] / exp.dit.layers
    assert ours["compression"] > plan["low resolution for packing"]
    assert (
        ours["second"]
        == ours["denoise"] + ours["commit"] + ours["decode"] + plan["low resolution for packing"]
    )
    assert ours["store"] == 0


def test_every_part_and_product_took_its_turn(found):
    assert list(found.times) == ["12 x 12 x 12", "17 x 17 x 17", *ALL]
    assert [each.first for each in found.times.values()] == list(range(10))
    for at in (0, 1):
        assert sorted(each.runs[at] for each in found.times.values()) == list(
            range(20 + 10 * at, 30 + 10 * at)
        )


def measured(**medians):
    """What a machine that takes these seconds would give, every round alike."""
    times = {
        name: timing.Times(first=50.0, runs=(seconds, seconds, seconds))
        for name, seconds in medians.items()
    }
    products = [timing.Product(side, side, side, "float32") for side in (10, 20)]
    for product, seconds in zip(products, (1e-3, 4e-3), strict=True):
        times[product.name] = timing.Times(1.0, (seconds,) * 3)
    return bench.Measurements(
        experiment=tiny.EXP,
        times=times,
        products=products,
        moved=dict.fromkeys(medians, 6000),
        operations={name: 0 if name == "store" else 3_000_000 for name in medians},
    )


def test_the_report_divides_work_by_medians_and_compares_with_the_best_product():
    said = bench.report(measured(forward=2.0, store=0.5, second=9.0))
    assert said["ceiling"] == {"product": "20 x 20 x 20", "operations_per_second": 2 * 20**3 / 4e-3}
    forward, store, second = (said["parts"][name] for name in ("forward", "store", "second"))
    assert (forward["operations_per_second"], forward["share"]) == (1.5e6, 1.5e6 / 4e6)
    assert (store["bytes_per_second"], "share" in store) == (12_000, False)
    assert second["median"] == pytest.approx(9.0 * 5 / 3)  # 3 frames a block, 5 a second
    assert second["operations_per_second"] == pytest.approx(3e6 / 9)
    assert said["frames_per_second"] == pytest.approx(3 / 9)
    assert json.loads(json.dumps(said)) == said


def test_metrics_are_ratios_with_a_direction():
    found = measured(forward=2.0, store=0.5, second=9.0)
    assert bench.metrics(found) == {
        "forward, share of ceiling": {"value": pytest.approx(1.5e6 / 4e6), "direction": "higher"},
        "store/forward": {"value": 0.25, "direction": "lower"},
        "second/forward": {"value": 4.5, "direction": "lower"},
    }
    assert bench.metrics(measured(denoise=2.0)) == {}


# Full size


def test_a_full_size_model_is_built_without_being_made():
    exp = loading.load_experiment("wan_t2v_1_3b_paper", ["dit.layers=1"])
    held = bench.shapes(exp)
    views = block_step.views_of(held.state.memory)
    own = held.model.nets, held.model.vae, views
    assert {x.dtype.name for x in jax.tree.leaves(own)} == {"bfloat16"}
    assert views[0].k.shape == (1, exp.memory.room, 12, 128)
    assert held.inputs["full"][0].k.shape == (1, 6_240, 12, 128)
    assert held.inputs["packed"][0].v.shape == (1, 182, 12, 128)
    assert held.inputs["frames"].shape == (1, 16, 480, 832, 3)
    assert bench.attended(exp) == 27_872
    denoiser = block_step.Denoiser(held.model.nets, exp.step, held.inputs["text_kv"])
    memory = held.state.memory
    program = bench.forward.lower(denoiser, memory, held.inputs["latent"])
    assert program.as_text().count("tf.aliasing_output") == len(jax.tree.leaves(memory))
    one_layer = 2 * 6_240 * 1_536 * (4 * 1_536 + 2 * 27_872 + 2 * 8_960 + 2 * 1_536 + 2 * 512)
    ends = 2 * 6_240 * 64 * 1_536 * 2
    counted = bench.operations(exp, ["forward"])["forward"]
    assert one_layer + ends < counted < 1.001 * (one_layer + ends)
    assert bench.moved(held, "store") > 2 * 2 * 2 * 1_536 * (6_240 + 182)
    assert jaxpr_cost.nbytes(held.inputs["full"]) == 2 * 2 * 6_240 * 1_536


# The script for a GPU, at toy sizes


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(on_h200, "WARMUP", 0)
    monkeypatch.setattr(on_h200, "REPEATS", 1)
    return on_h200.experiment(toy=True)


def rows_of(groups, toy):
    return {
        trial.full_name: on_h200.outcome(trial, toy)
        for trial in on_h200.TRIALS
        if trial.group in groups and not trial.flags
    }


def test_toy_trials_run_and_agree(toy):
    rows = rows_of(("attention", "gemm", "conv"), toy)
    assert not [name for name, row in rows.items() if "failed" in row], rows
    skipped = {name for name, row in rows.items() if "skipped" in row}
    assert {name for name in rows if "cudnn" in name} <= skipped
    assert len(skipped) <= 5
    for name, row in rows.items():
        assert name in skipped or (
            row["ms"] > 0 and row["tflops"] > 0 and row.get("error", 0) < 0.02
        ), (name, row)
        assert on_h200.line(types.SimpleNamespace(full_name=name), row).startswith(name)


def test_a_part_is_a_trial(toy, monkeypatch):
    monkeypatch.setattr(on_h200, "model", lambda exp: model(exp))
    assert {"ms", "gigabytes_per_second", "ceiling"} <= on_h200.part("store", tiny.EXP).keys()
    assert {"ms", "tflops", "share", "frames_per_second"} <= on_h200.part("second", tiny.EXP).keys()


@pytest.mark.slow
def test_all_toy_trials_run_in_processes_of_their_own(tmp_path, capsys):
    assert on_h200.main(["--toy", "--out", str(tmp_path / "toy.json")]) == 0
    said = json.loads((tmp_path / "toy.json").read_text())
    assert [row["trial"] for row in said["trials"]] == [trial.full_name for trial in on_h200.TRIALS]
    assert "0 failed" in capsys.readouterr().out


def test_a_trial_that_ends_its_process_leaves_the_others_theirs():
    started = []

    def start(numbers, flags, toy):
        started.append((tuple(numbers), flags))
        return [
            {"ms": number} for number in numbers if number < 3
        ], "the process ended with code -6: boom"

    chosen = [1, 2, 3, 4]
    group = {on_h200.TRIALS[number].group for number in chosen}
    assert group == {"attention"}
    found = dict(on_h200.results(chosen, True, start))
    assert started == [((1, 2, 3, 4), ""), ((4,), "")]
    assert [found[number] for number in (1, 2)] == [{"ms": 1}, {"ms": 2}]
    assert [found[number] for number in (3, 4)] == [
        {"failed": "the process ended with code -6: boom"}
    ] * 2


def test_flags_get_a_process_of_their_own():
    started = []

    def start(numbers, flags, toy):
        started.append((on_h200.TRIALS[numbers[0]].group, flags))
        return [{}] * len(numbers), ""

    everything = range(len(on_h200.TRIALS))
    assert [number for number, _ in on_h200.results(everything, False, start)] == list(everything)
    assert len(started) == len(set(started))
    assert {("conv", ""), ("conv", on_h200.NHWC), ("forward", on_h200.NO_TRITON)} < set(started)


def launched(platform, rows):
    def start(numbers, flags, toy):
        return [{"platform": platform, "device": "chip 9", "jax": "0"}] if not numbers else rows(
            numbers
        ), "ended"

    return start


def arguments(**changes):
    return types.SimpleNamespace(**{"toy": False, "only": [], "out": None} | changes)


def test_without_a_gpu_full_size_is_refused():
    with pytest.raises(InputError, match="no GPU here, only chip 9"):
        on_h200.run(arguments(), launched("cpu", None))
    with pytest.raises(InputError, match="--only attentoin is unknown; did you mean attention"):
        on_h200.run(arguments(only=["attentoin"]), launched("gpu", None))


@pytest.mark.parametrize(("row", "code"), [({"skipped": "no tokamax"}, 0), ({"failed": "boom"}, 1)])
def test_a_failure_is_reported_and_kept(row, code, tmp_path, capsys):
    out = tmp_path / "found.json"
    start = launched("gpu", lambda numbers: [row] * len(numbers))
    assert on_h200.run(arguments(only=["gemm"], out=str(out)), start) == code
    said = json.loads(out.read_text())
    assert said["machine"]["device"] == "chip 9"
    assert said["trials"] == [
        {"trial": trial.full_name, **row} for trial in on_h200.TRIALS if trial.group == "gemm"
    ]
    assert capsys.readouterr().out.rstrip().endswith(f"8 trials, {8 * code} failed")
