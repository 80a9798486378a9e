"""What fits: peaks add up, settings that are named really make a model fit, and nothing is traced where nobody asks."""

import dataclasses
import itertools
import os

import jax
import pytest
import tiny

from packforcing_jax import config
from packforcing_jax.config import loading
from packforcing_jax.errors import InputError
from packforcing_jax.plan import budget, formulas, jaxpr_cost, memory_fit, programs
from packforcing_jax.plan.memory_fit import Room
from packforcing_jax.plan.programs import COMMITTING, DENOISING, ENCODING, PROMPT, SHOWING, Use

HALF = dataclasses.replace(tiny.EXP, dtypes=config.HALF)
HOST = tiny.with_cache(scope="shared", timing="late", archive="host", capacity=9)
FILM = dataclasses.replace(
    tiny.EXP,
    dit=dataclasses.replace(tiny.EXP.dit, in_channels=4, out_channels=4),
    latent=(8, 12),
    codec=config.VAEConfig(
        dim=4,
        z_dim=4,
        dim_mult=(1, 2, 3),
        num_res_blocks=1,
        temporal_downsample=(True, False),
        mean=(0.0,) * 4,
        std=(1.0,) * 4,
    ),
)


# Peaks


@pytest.mark.parametrize("exp", [tiny.EXP, HALF, HOST, FILM, tiny.with_cache(top=0, capacity=0)])
def test_what_lies_between_two_blocks_is_what_the_budget_counts(exp):
    counted = budget.resident(exp, programs.shapes_of(exp, 2))
    smallest = 4 * (exp.dit.layers + 3)  # where each sink begins, and how far the video is
    assert sum(memory_fit.resting(exp, 2).values()) == counted["held/on the device"] - smallest


def test_a_peak_is_what_lies_there_and_what_the_program_takes():
    """Hand-made: programs that take a hundred, or of which a part is laid into what was handed in."""
    uses = dict.fromkeys((ENCODING, PROMPT, SHOWING, COMMITTING), Use(0, 0, 0, 0)) | {
        DENOISING: Use(temporary=100, results=50, arguments=7, reused=30),
        f"{SHOWING} the first block": Use(temporary=1000, results=0, arguments=0, reused=0),
    }
    found = memory_fit.peaks(FILM, 2, uses)
    held = memory_fit.resting(FILM, 2)
    whole = sum(held.values())
    frames = 2 * 6 * 32 * 48 * 3 * 4
    latent = 2 * 3 * 8 * 12 * 4 * 4
    low = 2 * 2 * 4 * 12 * 4 * 4
    layers = 2 * (4 * 10 * 6 + 3 * 10 * 9 + 32 * 2 + 2 * 10) * 4
    assert found.device["loading"] == held["transformer"] + held["compressor"] + held["codec"]
    assert found.device["reading prompts"] == whole + frames + layers + 3 * 16 * 10 * 4
    assert found.device[DENOISING] == whole + frames + 100 + 50 - 30
    assert found.device[SHOWING] == whole + frames + latent + 1000
    assert found.device[COMMITTING] == whole + 2 * frames + latent + low + held["decoder"]
    assert found.on_device == max(found.device.values())
    assert found.host["sampling"] == frames  # of two blocks of one of two videos
    assert (
        found.host["reading prompts"] == frames + 10 * 9 * 4
    )  # and a matrix of the text encoder on its way
    assert found.together == found.on_device + frames


def test_packed_blocks_on_the_host_are_fetched_and_counted_there():
    device, host = (
        memory_fit.peaks(exp, 2, memory_fit.estimated(exp, 2))
        for exp in (tiny.with_cache(scope="shared", timing="late", capacity=9), HOST)
    )
    one = 8 * 2 * 2 * 2 * 36 * 4
    slots = 9 + 1  # keys, k and v, layers, videos, width, bytes
    fetched = 2 * one + slots * one // (2 * 2)  # the chosen ones; one layer's keys to score
    assert host.host["sampling"] - device.host["sampling"] == slots * one + fetched
    assert device.device[SHOWING] - host.device[SHOWING] == slots * one
    assert device.device[DENOISING] - host.device[DENOISING] == slots * one - fetched


@pytest.mark.parametrize(
    ("attention", "dtype", "platform", "fused"),
    [
        ("auto", "bfloat16", "gpu", True),
        ("auto", "float32", "gpu", False),
        ("auto", "float16", "cpu", False),
        ("reference", "bfloat16", "gpu", False),
        ("cudnn", "bfloat16", "gpu", True),
    ],
)
def test_attention_is_estimated_as_it_will_run(attention, dtype, platform, fused):
    exp = dataclasses.replace(tiny.EXP, attention=attention, dtypes=config.DtypeConfig(cache=dtype))
    assert memory_fit.fused(exp, platform) == fused
    kind = programs.FUSED if fused else programs.WRITTEN
    space = programs.workspace
    if platform == "gpu":
        assert memory_fit.estimated(exp)[DENOISING].temporary == space(exp)[f"{DENOISING}, {kind}"]


def test_a_cpu_computes_halves_in_float32():
    half, single = (
        memory_fit.estimated(exp, 2, "cpu")[DENOISING].temporary for exp in (HALF, tiny.EXP)
    )
    assert half == single


EVERY = [tiny.EXP, HOST, FILM, *map(loading.load_experiment, ("stage", "wan_t2v_1_3b_paper"))]


@pytest.mark.parametrize("exp", EVERY, ids=["tiny", "host", "film", "stage", "paper"])
@pytest.mark.parametrize("platform", ["gpu", "cpu"])
def test_the_quick_bounds_hold_the_estimate(exp, platform):
    found = memory_fit.estimated(exp, 2, platform)
    above = memory_fit.bounded(exp, 2)
    below = memory_fit._floor(exp, 2, platform)
    for name, use in found.items():
        assert below[name].temporary <= use.temporary <= above[name].temporary, name
        assert use.results == above[name].results == below[name].results


# What fits: which settings are tried and named does not depend on how well programs are estimated


@pytest.fixture
def roughly(monkeypatch):
    """Workspace by rule of thumb, so that nothing has to be traced."""

    def workspace(exp, batch=1):
        each = {
            SHOWING: exp.dtypes.vae,
            DENOISING: exp.dtypes.compute,
            COMMITTING: exp.dtypes.compute,
        }
        cells = batch * exp.latent[0] * exp.latent[1] * 1000
        return {name: cells * formulas.BYTES[dtype] for name, dtype in each.items()}

    monkeypatch.setattr(programs, "workspace", workspace)


def room_below(exp, share=0.999, platform="gpu"):
    """A room of a little less, or much less, than `exp` needs."""
    need = memory_fit._need(exp, Room("", 0, platform=platform), 1)
    return Room("this one", int(share * need.on_device), platform=platform)


def test_what_fits_is_left_alone(roughly):
    verdict = memory_fit.judge(tiny.EXP, Room("large", 10**9))
    assert (verdict.overrides, verdict.then) == ((), verdict.need)
    assert verdict.lacks == verdict.need.on_device - 10**9 < 0


def test_the_most_harmless_change_that_is_enough_is_named(roughly):
    verdict = memory_fit.judge(FILM, room_below(FILM))
    assert verdict.overrides == ("dtypes.vae=bfloat16",)
    assert verdict.lacks > 0 >= verdict.room.lacks(verdict.then)


@pytest.mark.parametrize("share", [0.95, 0.8, 0.6, 0.4, 0.3, 0.1])
@pytest.mark.parametrize("exp", [FILM, tiny.with_cache(capacity=150)], ids=["film", "tiny"])
def test_flags_that_are_named_make_it_fit_and_none_is_in_vain(roughly, exp, share):
    room = room_below(exp, share)
    verdict = memory_fit.judge(exp, room)
    if verdict.overrides is None:
        assert room.lacks(verdict.then) > 0
        return
    assert room.lacks(memory_fit._need(loading.override(exp, verdict.overrides), room, 1)) <= 0
    taken = [
        change
        for change in itertools.chain(*memory_fit.attempts(exp))
        if set(change) <= set(verdict.overrides)
    ]
    assert set(itertools.chain(*taken)) == set(verdict.overrides)
    for change in set(taken):
        rest = [each for each in verdict.overrides if each not in change]
        assert not rest or room.lacks(memory_fit._need(loading.override(exp, rest), room, 1)) > 0, (
            change
        )


def test_the_picture_shrinks_only_when_all_else_is_not_enough():
    tried = list(memory_fit.attempts(FILM))
    sized = [
        at
        for at, changes in enumerate(tried)
        if any("latent" in one for change in changes for one in change)
    ]
    assert sized == list(range(sized[0], len(tried)))
    assert tried[sized[0]] == (("latent=6,8",),)  # whole patches
    assert [len(changes) for changes in tried[: sized[0]]] == [1] * 6 + [2, 3, 4, 5, 6]


def test_a_change_to_more_or_to_nothing_is_none():
    """Capacity is 4 and top 2 here; a host archive is turned in place no more."""
    tried = set(
        itertools.chain(*memory_fit.attempts(tiny.with_cache(rope_adjustment="incremental")))
    )
    assert not any(one.startswith("cache.") for change in tried for one in change)
    assert ("dtypes.vae=bfloat16",) not in set(itertools.chain(*memory_fit.attempts(HALF)))


def test_packed_blocks_move_to_a_host_that_has_room(roughly):
    exp = dataclasses.replace(tiny.with_cache(capacity=150), dtypes=config.HALF)
    verdict = memory_fit.judge(exp, room_below(exp))
    assert verdict.overrides == memory_fit.CHANGES[5]
    narrow = dataclasses.replace(room_below(exp), host=1000)
    assert "cache.archive=host" not in (memory_fit.judge(exp, narrow).overrides or ())


def test_nothing_is_said_to_help_where_nothing_does(roughly):
    verdict = memory_fit.judge(tiny.EXP, Room("pocket", 1000))
    assert verdict.overrides is None
    assert 1000 < verdict.then.on_device < verdict.need.on_device
    assert "settings alone bring it down to 0.00 GB at best" in memory_fit.refusal("tiny", verdict)


# Refusing


def test_a_model_that_is_too_large_is_refused_by_name_with_what_would_fit():
    before = sum(array.nbytes for array in jax.live_arrays())
    room = Room("this NVIDIA H200", 100_000)
    with pytest.raises(InputError) as refused:
        memory_fit.require_fits(FILM, room=room)
    assert sum(array.nbytes for array in jax.live_arrays()) == before
    assert str(refused.value).startswith(
        "tiny needs 0.00 GB of memory, this NVIDIA H200 has 0.00 GB; "
    )
    wan = loading.load_experiment("wan_t2v_1_3b_paper")
    verdict = memory_fit.judge(wan, memory_fit.parse("22GB"))
    said = memory_fit.refusal(wan.name, verdict)
    assert said.startswith("wan_t2v_1_3b_paper needs 23.")
    assert (
        "22GB has 22.00 GB; --set cache.archive=host --set cache.scope=shared --set cache.timing=late brings"
        in said
    )


def test_nothing_is_traced_for_a_model_that_fits_easily(monkeypatch):
    monkeypatch.setattr(programs, "workspace", lambda *args: pytest.fail("traced"))
    memory_fit.require_fits(loading.load_experiment("stage"), batch=3)
    with pytest.raises(pytest.fail.Exception, match="traced"):
        memory_fit.require_fits(loading.load_experiment("stage"), room=Room("small", 10**7))


# Rooms


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GB", 24 * 10**9),
        ("22.5GiB", 22.5 * 2**30),
        ("141 gb", 141 * 10**9),
        ("512MiB", 2**29),
        ("1tb", 10**12),
    ],
)
def test_sizes_are_read_as_they_are_written(text, size):
    assert memory_fit.parse(text).device == size


@pytest.mark.parametrize("text", ["24", "GB", "24G", "0GB", "-3GB", "24 GBit", "1.2.3GB"])
def test_a_size_without_a_meaning_is_refused(text):
    with pytest.raises(InputError, match="is no size of a memory; write it as 24GB"):
        memory_fit.parse(text)


def machine(folder, meminfo="", group="", **files):
    """A copy of what Linux says, with what is given."""
    proc = folder / "proc"
    groups = folder / "groups"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(meminfo)
    (proc / "self" / "cgroup").write_text(group)
    for name, content in files.items():
        path = groups / name.replace("__", "/").replace("_at_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return proc, groups


FREE = "MemTotal:  900 kB\nMemAvailable:    700 kB\nMemFree: 100 kB\n"
KB = 1024


def test_what_the_system_says_is_available(tmp_path):
    assert memory_fit.available(*machine(tmp_path, FREE)) == 700 * KB


@pytest.mark.parametrize(
    ("group", "files", "left"),
    [
        ("0::/", {"memory_at_max": str(500 * KB)}, 500),
        (
            "0::/a/b",
            {"a__memory_at_max": str(300 * KB), "a__b__memory_at_max": "max"},
            300,
        ),  # of the group around it
        ("0::/a", {"a__memory_at_max": str(9000 * KB)}, 700),  # more than there is
        (
            "7:cpu:/x\n5:memory:/a",
            {"memory__a__memory_at_limit_in_bytes": str(250 * KB)},
            250,
        ),  # version 1
    ],
)
def test_a_control_group_may_leave_less(tmp_path, group, files, left):
    others = {}
    for name in files:
        start = name.rpartition("memory_at_")[0]
        old = "limit" in name
        others[f"{start}memory_at_{'usage_in_bytes' if old else 'current'}"] = str(80 * KB)
        others[f"{start}memory_at_stat"] = f"anon 1\n{'total_' * old}inactive_file {60 * KB}\n"
    used = (80 - 60) if left != 700 else 0  # file pages can be given up
    assert (
        memory_fit.available(*machine(tmp_path, FREE, group, **files, **others))
        == (left - used) * KB
    )


def test_without_linux_it_is_what_the_machine_has(tmp_path):
    assert memory_fit.available(tmp_path, tmp_path) == os.sysconf("SC_PHYS_PAGES") * os.sysconf(
        "SC_PAGE_SIZE"
    )


def test_this_machine_has_one_memory():
    room = memory_fit.this_machine()
    assert room.platform == "cpu"
    assert 10**8 < room.device <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_logits_and_largest_arrays_at_full_size():
    wan = loading.load_experiment("wan_t2v_1_3b_paper")
    assert formulas.logits(wan, 1) == 12 * 6240 * 28160 * 4 == formulas.largest(wan, 1)
    assert jaxpr_cost.nbytes(programs.shapes_of(wan).latent) == 4 * 60 * 104 * 16 * 4
