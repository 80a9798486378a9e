"""Times are taken by a clock that only the steps move: no test here depends on how fast this machine is."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from packforcing_jax.plan import timing


class Clock:
    """Time that passes only when a step says so."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Late:
    """A result that takes its time when it is waited for, as a device's does."""

    def __init__(self, clock, seconds):
        self.clock = clock
        self.seconds = seconds

    def block_until_ready(self):
        self.clock.now += self.seconds
        return self


def steps_of(clock, seconds):
    """(steps by name, the order in which they ran): each run of a step takes the next of its `seconds`."""
    order = []
    left = {name: iter(each) for name, each in seconds.items()}

    def step(name):
        def run(state):
            order.append((name, state))
            return state + 1, Late(clock, next(left[name]))

        return run

    return {name: step(name) for name in seconds}, order


def test_first_calls_warm_up_and_runs_are_told_apart_and_waited_for():
    clock = Clock()
    steps, _ = steps_of(clock, {"a": [9, 5, 5, 1, 2, 4], "b": [8, 6, 6, 30, 10, 20]})
    found = timing.measure(steps, 0, warmup=2, repeats=3, clock=clock)
    assert found == {"a": timing.Times(9, (1, 2, 4)), "b": timing.Times(8, (30, 10, 20))}


def test_steps_take_turns_in_changing_order_and_hand_one_state_on():
    clock = Clock()
    steps, order = steps_of(clock, {name: [1] * 41 for name in "abcd"})
    timing.measure(steps, 0, warmup=10, repeats=30, clock=clock)
    assert [state for _, state in order] == list(range(4 * 41))
    rounds = ["".join(name for name, _ in order[at : at + 4]) for at in range(0, 4 * 41, 4)]
    assert rounds[0] == "abcd"
    assert {"".join(sorted(each)) for each in rounds} == {"abcd"}
    assert len(set(rounds)) > 10


def test_what_passes_is_shown():
    shown = []

    def show(items, unit):
        for item in items:
            yield item
            shown.append((unit, item))

    steps, _ = steps_of(Clock(), {"a": [1] * 4, "b": [1] * 4})
    timing.measure(steps, 0, warmup=1, repeats=2, show=show)
    assert shown == [
        ("compiled", "a"),
        ("compiled", "b"),
        ("rounds", 0),
        ("rounds", 1),
        ("rounds", 2),
    ]


def test_buffers_that_are_used_up_come_back():
    grow = jax.jit(lambda x: x + 1, donate_argnums=0)
    last = []

    def step(state):
        state = grow(state)
        last[:] = [state]
        return state, state.sum()

    timing.measure({"a": step, "b": step}, jnp.zeros((3, 5)), warmup=2, repeats=4)
    assert np.array_equal(last[0], np.full((3, 5), 2 * (1 + 2 + 4)))


def test_a_spread_is_median_quartiles_and_best():
    times = timing.Times(first=99.0, runs=(5.0, 1.0, 3.0, 2.0, 100.0))
    assert (times.median, times.quartiles, times.best) == (3.0, (2.0, 5.0), 1.0)
    assert timing.Times(1.0, (7.0,)).quartiles == (7.0, 7.0)


def test_a_ratio_is_of_the_same_rounds():
    drift = np.asarray([1.0, 10.0, 3.0, 40.0])
    short = timing.Times(0, tuple(2 * drift))
    far = timing.Times(0, tuple(3 * drift * [1, 1, 1, 9]))
    assert timing.ratio(far, short) == pytest.approx(1.5)


def test_a_product_multiplies_what_it_says():
    product = timing.Product(rows=6, inner=35, columns=11, dtype="bfloat16")
    state, out = product.step()("state")
    assert (product.operations, product.name) == (2 * 6 * 35 * 11, "6 x 35 x 11")
    assert (state, out.shape, out.dtype) == ("state", (6, 11), jnp.bfloat16)
    assert bool((out != 0).all())


def test_the_ceiling_is_looked_for_in_large_products():
    found = timing.products("float32")
    assert [product.rows for product in found] == list(timing.PRODUCTS["cpu"])
    assert all(product.rows == product.inner == product.columns for product in found)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_numbers_are_random_wherever_they_go(dtype):
    x = timing.normal(3, (70, 31, 5), dtype, scale=0.25)
    flat = np.asarray(x, np.float64)
    assert (x.shape, x.dtype) == ((70, 31, 5), jnp.dtype(dtype))
    assert abs(flat.mean()) < 0.02
    assert flat.std() == pytest.approx(0.25, rel=0.05)
    assert (flat != 0).mean() > 0.99
    assert len(np.unique(flat.reshape(70, -1), axis=0)) == 70


def test_another_seed_gives_other_numbers_and_a_large_array_wraps():
    first, second = (np.asarray(timing.normal(seed, (4, 9), "float32")) for seed in (0, 1))
    assert not np.any(first == second)
    large = np.asarray(timing.normal(0, (2, timing.POOL - 3), "float32"))
    assert large[0, :7].tolist() != large[1, :7].tolist()
    assert large[0, 0] == large[1, 3]
    assert timing.normal(5, (), "float32").shape == ()


def test_the_machine_is_described(tmp_path):
    said = timing.machine()
    assert json.loads(json.dumps(said)) == said
    assert (said["platform"], said["jax"]) == ("cpu", jax.__version__)
    assert len(said["date"]) == len("2026-11-20")
    info = tmp_path / "cpuinfo"
    info.write_text(
        "processor\t: 0\nmodel name\t: Some: Chip 7\nprocessor\t: 1\nmodel name\t: Some: Chip 7\n"
    )
    assert timing.processor(info) == "Some: Chip 7"
    assert timing.processor(tmp_path / "none")
