"""Two processes that talk over loopback learn what one does."""

import socket

import meshed
import pytest

ALONE = (1, 1, 1, 1)


def free_port():
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        return door.getsockname()[1]


def two(objective, steps, sizes, devices):
    """What process 0 of two, with so many devices each, and one process alone measured at every step."""
    there = {"coordinator": f"127.0.0.1:{free_port()}", "processes": 2}
    pair = [
        meshed.child(devices, objective=objective, steps=steps, meshes=[sizes], process=i, **there)
        for i in range(2)
    ]
    try:
        together = [meshed.told(process)[sizes] for process in pair]
    finally:
        for process in pair:
            process.kill()
    alone = meshed.told(meshed.child(1, objective=objective, steps=steps, meshes=[ALONE]))[ALONE]
    assert together[0] == together[1]
    return alone, together[0]


def test_two_processes_of_four_devices_on_three_axes_learn_what_one_device_does():
    alone, together = two("flow_matching", 3, (1, 2, 2, 2), devices=4)
    assert meshed.apart(alone, together) < 1e-5
    assert len({step["loss"] for step in alone}) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "sizes", "devices"), [("forcing", (2, 1, 1, 1), 1), ("dmd", (1, 2, 2, 1), 2)]
)
def test_two_processes_learn_the_same_over_twenty_steps(objective, sizes, devices):
    assert meshed.apart(*two(objective, 20, sizes, devices)) < 1e-4
