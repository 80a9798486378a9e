"""Doctor tells what fails and what to do about it, and one failing check never hides the others."""

import json

import pytest

from packforcing_jax import versions
from packforcing_jax.cli import doctor, main
from packforcing_jax.errors import MachineError
from packforcing_jax.policies import attention


def good():
    return doctor.Finding(True, "as it should be")


def bad():
    return doctor.Finding(False, "too small", "buy a larger one")


def broken():
    raise RuntimeError("no such\ndevice")


@pytest.fixture
def checks(monkeypatch):
    def install(**rows):
        monkeypatch.setattr(
            doctor, "CHECKS", {name: (check, "reinstall it") for name, check in rows.items()}
        )

    return install


def test_all_well_is_exit_code_0(checks, capsys):
    checks(first=good, second=good)
    assert main.main(["doctor"]) == 0
    assert (
        capsys.readouterr().out
        == "ok   first: as it should be\nok   second: as it should be\n2 checks, 0 failed\n"
    )


def test_what_fails_comes_with_its_remedy_and_hides_nothing(checks, capsys):
    checks(first=bad, second=broken, third=good)
    assert main.main(["doctor"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "FAIL first: too small; remedy: buy a larger one",
        "FAIL second: RuntimeError: no such device; remedy: reinstall it",
        "ok   third: as it should be",
        "3 checks, 2 failed",
    ]


def test_json_holds_the_same(checks, capsys):
    checks(first=bad, third=good)
    assert main.main(["doctor", "--json"]) == 1
    got = json.loads(capsys.readouterr().out)
    assert got["failed"] == 1
    assert got["checks"][0] == {
        "name": "first",
        "ok": False,
        "detail": "too small",
        "remedy": "buy a larger one",
    }


def test_a_broken_pair_is_reported_instead_of_stopping_doctor(monkeypatch, capsys, checks):
    monkeypatch.setattr(versions, "installed", {"jax": "0.11.1", "flax": "0.12.8"}.__getitem__)
    checks(pair=doctor.pair)
    assert main.main(["doctor"]) == 1
    assert (
        'flax 0.12.8 does not work with jax 0.11.1; run: pip install "flax>='
        in capsys.readouterr().out
    )


def test_a_missing_package_is_a_finding(monkeypatch):
    def missing(name):
        raise MachineError(f"{name} is not installed; run: pip install {name}")

    monkeypatch.setattr(versions, "installed", missing)
    finding = doctor.examine(doctor.pair, "pip install jax flax")
    assert not finding.ok
    assert "jax is not installed" in finding.detail


def test_a_full_disk_fails(monkeypatch):
    usage = doctor.shutil.disk_usage(".")
    monkeypatch.setattr(
        doctor.shutil, "disk_usage", lambda path: usage._replace(free=doctor.ENOUGH_DISK - 1)
    )
    assert not doctor.disk().ok
    monkeypatch.setattr(
        doctor.shutil, "disk_usage", lambda path: usage._replace(free=doctor.ENOUGH_DISK)
    )
    assert doctor.disk().ok


def test_attention_fails_only_if_the_backend_in_use_does(monkeypatch):
    name, _ = attention.default_backend()
    other = next(each for each in attention.BACKENDS if each != name)
    monkeypatch.setattr(attention, "working_backends", lambda: {name: "ok", other: "needs a GPU"})
    assert doctor.attention().ok
    assert f"{other} needs a GPU" in doctor.attention().detail
    monkeypatch.setattr(attention, "working_backends", lambda: {name: "not today", other: "ok"})
    assert not doctor.attention().ok


@pytest.mark.parametrize("name", list(doctor.CHECKS))
def test_every_check_passes_on_the_machine_that_runs_the_tests(name):
    finding = doctor.examine(*doctor.CHECKS[name])
    assert finding.ok, finding
    assert finding.detail
