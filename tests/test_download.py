"""`packforcing download` says what weights may be used for, fetches them into plain files, and says what comes next."""

import functools
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import test_hub

from packforcing_jax.cli import main
from packforcing_jax.config import cards
from packforcing_jax.io import hub

VERB = main.Verb("download", "fetch public weights", "packforcing download --list", checked=False)
WAN = {
    "config.json": b'{"dim": 1536}',
    "diffusion_pytorch_model.safetensors": test_hub.content(7321),
    "Wan2.1_VAE.pth": test_hub.content(5003, 2),
    "models_t5_umt5-xxl-enc-bf16.pth": test_hub.content(6011, 3),
    "google/umt5-xxl/tokenizer.json": test_hub.content(311, 4),
    "google/umt5-xxl/spiece.model": test_hub.content(5237, 5),
    "README.md": b"read me",
    "assets/comp_effic.png": test_hub.content(9001, 6),
}
OTHERS = {
    "checkpoints/self_forcing_dmd.pt": test_hub.content(8009),
    "checkpoints/ode_init.pt": test_hub.content(7001),
}
LONG = {"models/longlive_base.pt": test_hub.content(6007), "models/lora.pt": test_hub.content(5501)}
FILES = {
    "Wan-AI/Wan2.1-T2V-1.3B": WAN,
    "gdhe17/Self-Forcing": OTHERS,
    "Efficient-Large-Model/LongLive-1.3B": LONG,
}
PATIENCE = 120  # seconds; a busy machine takes long to start a program
HERE = Path(__file__).parent.parent
PROGRAM = """
import sys
from packforcing_jax.cli import main
if sys.argv[1:] == ["--help"]:
    main.main(["download", "--help"])
    sys.exit("huggingface_hub" in sys.modules)
sys.exit(main.main(["download", *sys.argv[1:]]))
"""


class Terminal(io.StringIO):
    """Somebody who types."""

    def isatty(self):
        return True


@pytest.fixture
def site(monkeypatch, tmp_path):
    """The hub's stand-in, with the working directory in `tmp_path` and nobody at a terminal."""
    test_hub.keep_to_ourselves(monkeypatch, tmp_path)
    monkeypatch.setitem(main.VERBS, "download", VERB)
    monkeypatch.setattr(hub, "PIECE", 1000)
    monkeypatch.setattr(hub, "PAUSE", 0.0)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.chdir(tmp_path)
    with test_hub.serving(
        test_hub.Site({repository: dict(files) for repository, files in FILES.items()})
    ) as running:
        monkeypatch.setattr(hub, "listing", functools.partial(hub.listing, endpoint=running.url))
        yield running


def run(capsys, *words):
    """(exit code, stdout, stderr) of `packforcing download WORDS`."""
    code = main.main(["download", *words])
    return code, *capsys.readouterr()


@pytest.mark.parametrize("words", [[], ["--list"], ["--list", "causvid"]])
def test_without_a_name_it_lists_what_there_is(site, capsys, words):
    code, out, err = run(capsys, *words)
    assert (code, err, site.asked) == (0, "", [])
    for name, source in hub.sources().items():
        assert f"{name}\n    {source.repository}, " in out
        assert source.what in out
        method = out.partition(f"{name}\n    {source.repository}, ")[2].partition("    method ")[2]
        card = cards.find(source.card)
        told = (
            f"{card.method}; cannot be sampled block by block: "
            if card.samples
            else f"{card.method}\n"
        )
        assert method.startswith(told)
    assert "Wan-AI/Wan2.1-T2V-1.3B, about 17.5 GB, apache-2.0\n" in out
    assert (
        "LongLive-1.3B, size not recorded, licence unsettled\n    licence unsettled: its README"
        in out
    )
    assert "    not confirmed: its network generator_ema; the name of its file\n" in out
    assert max(map(len, out.splitlines())) <= 120


def test_the_list_as_json(site, capsys):
    code, out, _ = run(capsys, "--json")
    rows = {row["name"]: row for row in json.loads(out)["sources"]}
    assert code == 0
    assert list(rows) == list(hub.sources())
    assert rows["self-forcing-dmd"]["licence"] == "cc-by-nc-sa-4.0"
    assert rows["longlive"]["bytes"] is None
    assert "its README says apache-2.0" in rows["longlive"]["unsettled"]
    assert rows["causal-forcing-chunkwise"]["network"] == "generator"
    assert rows["causvid-4step"]["method"] == "causvid"
    assert "bidirectional" in rows["wan2.1-t2v-14b"]["samples"]
    assert rows["wan2.1-t2v-14b"]["parts"] == ["dit", "codec", "text"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["self-forcing"],
            "the weights 'self-forcing' are called self-forcing-dmd now (beside self-forcing-ode-init, "
            "self-forcing-sid); give that name.",
        ),
        (["wan2.1-t2v-1.3"], "no weights 'wan2.1-t2v-1.3'; did you mean wan2.1-t2v-1.3b?"),
        (
            ["self-forcing-dmd", "--part", "codec"],
            "gdhe17/Self-Forcing has no part 'codec'; it has dit.",
        ),
    ],
)
def test_unknown_words_are_bad_input_and_nobody_is_asked(site, capsys, words, sentence):
    code, out, err = run(capsys, *words)
    assert (code, out, site.asked) == (2, "", [])
    assert err.strip() == f"packforcing: {sentence}"


def test_free_weights_come_without_a_question_into_plain_files(site, capsys, tmp_path):
    code, out, err = run(capsys, "wan2.1-t2v-1.3b")
    folder = tmp_path / "weights" / "wan2.1-t2v-1.3b"
    needed = [name for name in WAN if name not in ("README.md", "assets/comp_effic.png")]
    assert code == 0
    assert test_hub.present(folder) == sorted(needed)
    for name in needed:
        assert (folder / name).read_bytes() == WAN[name]
        assert f"{hashlib.sha256(WAN[name]).hexdigest()}  " in out
    assert "download: Wan-AI/Wan2.1-T2V-1.3B: apache-2.0\n" in err
    assert "download: 6 files of 23.896 kB into weights/wan2.1-t2v-1.3b\n" in err
    *_, count, following = out.splitlines()
    assert count == "6 files in weights/wan2.1-t2v-1.3b"
    assert (
        following
        == "next: packforcing convert weights/wan2.1-t2v-1.3b --out models/wan2.1-t2v-1.3b "
        "--card wan2.1-t2v-1.3b"
    )


def test_one_part_alone(site, capsys, tmp_path):
    code, _, _ = run(
        capsys, "wan2.1-t2v-1.3b", "--part", "codec", "--part", "text", "--out", "here"
    )
    assert code == 0
    assert test_hub.present(tmp_path / "here") == [
        "Wan2.1_VAE.pth",
        "google/umt5-xxl/spiece.model",
        "google/umt5-xxl/tokenizer.json",
        "models_t5_umt5-xxl-enc-bf16.pth",
    ]


def test_a_second_run_fetches_nothing_and_says_so(site, capsys):
    run(capsys, "wan2.1-t2v-1.3b")
    site.asked = []
    code, out, _ = run(capsys, "wan2.1-t2v-1.3b")
    assert (code, site.fetched()) == (0, [])
    assert out.count(", was there\n") == 6


@pytest.mark.parametrize(
    ("name", "terms"),
    [
        ("self-forcing-dmd", "gdhe17/Self-Forcing: cc-by-nc-sa-4.0, not for commercial use"),
        (
            "longlive",
            "Efficient-Large-Model/LongLive-1.3B: licence unsettled: its README says apache-2.0 since 2025-11, a "
            "stored copy of its model card cc-by-nc-sa-4.0",
        ),
    ],
)
def test_restricted_weights_without_yes_are_refused_before_any_file_is_asked_for(
    site, capsys, tmp_path, name, terms
):
    code, out, err = run(capsys, name)
    assert (code, out, site.fetched()) == (2, "", [])
    assert err.splitlines() == [
        f"download: {terms}",
        f"packforcing: {terms}; give --yes if you accept its licence.",
    ]
    assert test_hub.present(tmp_path) == []


def test_with_yes_the_licence_is_said_first_and_the_files_come(site, capsys, tmp_path, monkeypatch):
    said = []

    def fetch(*given, act=hub.fetch, **more):
        said.append(capsys.readouterr().err)
        return act(*given, **more)

    monkeypatch.setattr(hub, "fetch", fetch)
    code, out, _ = run(capsys, "self-forcing-dmd", "--yes")
    assert code == 0
    assert "not for commercial use" in said[0]
    assert test_hub.present(tmp_path / "weights" / "self-forcing-dmd") == [
        "checkpoints/self_forcing_dmd.pt"
    ]
    assert (
        " weights/self-forcing-dmd/checkpoints/self_forcing_dmd.pt --out models/self-forcing-dmd"
        in out
    )


@pytest.mark.parametrize(
    ("typed", "accepted"),
    [("y\n", True), ("YES\n", True), ("n\n", False), ("\n", False), ("", False)],
)
def test_at_a_terminal_it_asks(site, capsys, tmp_path, monkeypatch, typed, accepted):
    monkeypatch.setattr(sys, "stdin", Terminal(typed))
    code, _, err = run(capsys, "longlive")
    assert code == (0 if accepted else 2)
    assert "Do you accept that licence? [y/N] " in err
    assert len(site.fetched()) == len(test_hub.present(tmp_path)) == (2 if accepted else 0)


def test_a_licence_that_changed_since_is_asked_about(site, capsys):
    site.licences = {"Wan-AI/Wan2.1-T2V-1.3B": "cc-by-nc-4.0"}
    code, _, err = run(capsys, "wan2.1-t2v-1.3b")
    assert (code, site.fetched()) == (2, [])
    assert "apache-2.0; the card says cc-by-nc-4.0 today; give --yes" in err


def test_json_reports_what_came_from_where(site, capsys):
    site.licences = {"gdhe17/Self-Forcing": "cc-by-nc-sa-4.0"}
    code, out, _ = run(capsys, "self-forcing-dmd", "--yes", "--json", "--out", "sf")
    got = json.loads(out)
    content = OTHERS["checkpoints/self_forcing_dmd.pt"]
    assert code == 0
    base = "packforcing convert weights/wan2.1-t2v-1.3b"
    following = (
        "sf/checkpoints/self_forcing_dmd.pt --out models/self-forcing-dmd --card self-forcing-dmd"
    )
    assert got.pop("next") == f"{base} {following}"
    assert got == {
        "name": "self-forcing-dmd",
        "repository": "gdhe17/Self-Forcing",
        "commit": test_hub.COMMIT,
        "licence": "cc-by-nc-sa-4.0",
        "declared_licence": "cc-by-nc-sa-4.0",
        "folder": "sf",
        "files": [
            {
                "name": "checkpoints/self_forcing_dmd.pt",
                "part": "dit",
                "size": 8009,
                "sha256": hashlib.sha256(content).hexdigest(),
                "fetched": True,
            }
        ],
    }


def test_a_damaged_file_is_exit_code_3_and_the_next_run_fetches_it_anew(site, capsys, tmp_path):
    good = site.files["gdhe17/Self-Forcing"]
    site.recorded = {"checkpoints/self_forcing_dmd.pt": good["checkpoints/self_forcing_dmd.pt"]}
    good["checkpoints/self_forcing_dmd.pt"] = test_hub.content(8009, 77)
    code, out, err = run(capsys, "self-forcing-dmd", "--yes")
    assert (code, out) == (3, "")
    assert "arrived damaged" in err
    assert test_hub.present(tmp_path) == []
    good["checkpoints/self_forcing_dmd.pt"] = site.recorded["checkpoints/self_forcing_dmd.pt"]
    assert run(capsys, "self-forcing-dmd", "--yes")[0] == 0


def test_a_full_disk_is_found_before_anything_is_fetched(site, capsys, monkeypatch):
    usage = hub.shutil.disk_usage(".")
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda path: usage._replace(free=23_895))
    code, _, err = run(capsys, "wan2.1-t2v-1.3b")
    assert (code, site.fetched()) == (3, [])
    assert "weights/wan2.1-t2v-1.3b needs 23,896 bytes and its disk has 23,895 free" in err


def test_a_disk_that_fills_up_meanwhile_leaves_nothing_that_looks_finished(
    site, capsys, tmp_path, monkeypatch
):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub.os, "fsync", full)
    code, _, err = run(capsys, "self-forcing-dmd", "--yes")
    assert code == 3
    assert "cannot write: No space left on device; free space or choose another --out." in err
    assert [name.rsplit(".", 1)[1] for name in test_hub.present(tmp_path)] == ["part"]


def test_a_folder_that_is_a_file_is_bad_input(site, capsys, tmp_path):
    (tmp_path / "taken").write_text("mine")
    code, _, err = run(capsys, "self-forcing-dmd", "--yes", "--out", "taken")
    assert code == 2
    assert "taken" in err
    assert (tmp_path / "taken").read_text() == "mine"


def environment(folder, **more):
    kept = {
        key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))
    }
    return (
        kept
        | {"HF_HOME": str(folder), "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONUNBUFFERED": "1"}
        | more
    )


def test_help_does_not_load_the_library(tmp_path):
    command = [sys.executable, "-c", PROGRAM, "--help"]
    done = subprocess.run(
        command, cwd=HERE, env=environment(tmp_path), capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "--yes" in done.stdout


def test_the_program_itself_goes_on_after_ctrl_c(site, tmp_path):
    weights = test_hub.content(3_333_333)
    site.files["gdhe17/Self-Forcing"]["checkpoints/self_forcing_dmd.pt"] = weights
    site.stall = ("checkpoints/self_forcing_dmd.pt", 2_500_000)
    command = [
        sys.executable,
        "-c",
        PROGRAM,
        "self-forcing-dmd",
        "--yes",
        "--out",
        str(tmp_path / "sf"),
    ]
    settings = environment(tmp_path / "home", HF_ENDPOINT=site.url)
    with subprocess.Popen(
        command, cwd=HERE, env=settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as program:
        try:
            growing = until(
                lambda: next(
                    (part for part in Path(tmp_path, "sf").rglob("*.part") if part.stat().st_size),
                    None,
                )
            )
            program.send_signal(signal.SIGINT)
            out, err = program.communicate(timeout=PATIENCE)
        finally:
            program.kill()
    site.stall = None
    assert (program.returncode, out) == (130, b"")
    assert b"Traceback" not in err
    left = growing.stat().st_size
    assert weights.startswith(growing.read_bytes())
    done = subprocess.run(command, cwd=HERE, env=settings, capture_output=True, check=True)
    assert site.fetched() == [
        ("checkpoints/self_forcing_dmd.pt", wanted) for wanted in (None, f"bytes={left}-")
    ]
    assert (tmp_path / "sf" / "checkpoints" / "self_forcing_dmd.pt").read_bytes() == weights
    assert hashlib.sha256(weights).hexdigest().encode() in done.stdout
    assert not growing.exists()
    assert list(Path(tmp_path, "home").rglob("*")) == []


def until(look):
    """What `look` finds, once it finds something."""
    for _ in range(100 * PATIENCE):
        if (found := look()) is not None:
            return found
        time.sleep(0.01)
    raise AssertionError(f"nothing appeared within {PATIENCE} seconds")
