"""Public weights come whole, checked and no more than needed, whatever the network does on the way."""

import contextlib
import hashlib
import http.server
import json
import pathlib
import shutil
import threading
import time
from dataclasses import dataclass, field, replace

import pytest
from huggingface_hub import constants

from packforcing_jax.errors import InputError, MachineError
from packforcing_jax.io import hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = 5000  # bytes from which on the served files are recorded with their SHA-256


@dataclass
class Site:
    """A hub on this machine: the files it serves, the ways in which it fails, and what it was asked for."""

    files: dict[str, dict[str, bytes]]  # repository -> name -> bytes
    licences: dict[str, str] = field(default_factory=dict)
    url: str = ""
    recorded: dict[str, bytes] = field(
        default_factory=dict
    )  # name -> what is recorded instead of what is sent
    budget: int | None = None  # bytes of files it sends in all before it falls silent
    cuts: dict[str, list[int]] = field(
        default_factory=dict
    )  # name -> bytes after which each answer breaks off
    stall: tuple[str, int] | None = (
        None  # (name, bytes) after which it sends nothing more while this is set
    )
    ranges: bool = True
    refusal: tuple[int, dict[str, str]] | None = None
    page: bytes | None = None  # answers everything
    elsewhere: str | None = None  # another server that has the files
    asked: list[tuple[str, str | None, str | None]] = field(
        default_factory=list
    )  # path, range, authorization

    def fetched(self):
        """(name, range) of every request for a file, in order."""
        mark = f"/resolve/{COMMIT}/"
        return [(path.partition(mark)[2], wanted) for path, wanted, _ in self.asked if mark in path]

    def record(self, repository):
        """What the hub says about a repository."""
        siblings = []
        for name, content in self.files[repository].items():
            content = self.recorded.get(name, content)
            row = {"rfilename": name, "size": len(content), "blobId": git_name(content)}
            if len(content) >= LARGE:
                digest = hashlib.sha256(content).hexdigest()
                row |= {
                    "blobId": "0" * 40,
                    "lfs": {"sha256": digest, "size": len(content), "pointerSize": 131},
                }
            siblings.append(row)
        card = {"license": self.licences[repository]} if repository in self.licences else {}
        return {
            "id": repository,
            "sha": COMMIT,
            "cardData": card,
            "siblings": siblings,
            "tags": [],
            "private": False,
        }


def git_name(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    site: Site

    def log_message(self, *words):
        pass

    def do_GET(self):
        site = self.site
        path = self.path.partition("?")[0]
        site.asked.append((path, self.headers["Range"], self.headers["Authorization"]))
        if site.refusal is not None:
            return self.answer(site.refusal[0], b"", site.refusal[1])
        if site.page is not None:
            return self.answer(200, site.page, {"Content-Type": "text/html"})
        if path.startswith("/api/models/"):
            repository = path.removeprefix("/api/models/").partition("/revision/")[0]
            if repository not in site.files:
                return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
            return self.answer(200, json.dumps(site.record(repository)).encode())
        return self.file(*path.removeprefix("/").split(f"/resolve/{COMMIT}/"))

    def file(self, repository, name):
        site = self.site
        if site.elsewhere is not None:
            self.answer(302, b"", {"Location": f"{site.elsewhere}{self.path}"})
            return
        content = site.files[repository][name]
        status = 200
        headers = {}
        if site.ranges and self.headers["Range"]:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            status = 206
            headers = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
            content = content[start:]
        stops = site.cuts.get(name, [])
        sent = content[: stops.pop(0)] if stops else content
        if site.budget is not None:
            sent = sent[: site.budget]
            site.budget -= len(sent)
        stalls = site.stall is not None and site.stall[0] == name
        headers["Content-Length"] = str(len(content))
        self.answer(status, sent[: site.stall[1]] if stalls else sent, headers)
        while stalls and site.stall is not None:
            time.sleep(0.01)

    def answer(self, status, content, headers=None):
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(content)


@contextlib.contextmanager
def serving(site):
    """The site, reachable at `site.url`."""
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), type("Bound", (Handler,), {"site": site})
    )
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    site.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def keep_to_ourselves(monkeypatch, folder):
    """Keeps the library from the user's token and from asking its own hub anything."""
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(folder / "tokens"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)


def content(size, seed=1):
    """`size` bytes that do not repeat soon."""
    return b"".join(hashlib.sha256(b"%d %d" % (seed, i)).digest() for i in range(size // 32 + 1))[
        :size
    ]


MODEL = {
    "config.json": b'{"dim": 1536}',
    "weights-1.bin": content(7321),
    "weights-2.bin": content(5003, 2),
    "words/rules.json": content(311, 3),
    "words/none.txt": b"",
    "words/old/rules.json": content(97, 4),
    "photo.png": content(6007, 5),
}
NEEDED = ["config.json", "weights-1.bin", "weights-2.bin", "words/rules.json", "words/none.txt"]
SOURCE = hub.Source(
    "some/model",
    "for tests",
    "apache-2.0",
    (hub.Files("dit", ("config.json", "weights-*.bin")), hub.Files("text", ("words/*",), 311.0)),
    "{folder}",
)


@pytest.fixture
def site(monkeypatch, tmp_path):
    keep_to_ourselves(monkeypatch, tmp_path)
    monkeypatch.setattr(hub, "PIECE", 1000)
    monkeypatch.setattr(hub, "PAUSE", 0.0)
    with serving(Site({"some/model": dict(MODEL)})) as running:
        yield running


def listed(site, *parts):
    return hub.listing(SOURCE, parts, endpoint=site.url)


def fetched(site, folder, name="weights-1.bin", **options):
    """What `hub.fetch` makes of one file."""
    listing = listed(site)
    file = next(each for each in listing.files if each.name == name)
    return hub.fetch(listing, file, folder, pause=0.0, **options)


def present(folder):
    """Names of all files below a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_listing_is_one_request_and_holds_what_is_needed(site):
    got = listed(site)
    assert [file.name for file in got.files] == NEEDED
    assert [file.part for file in got.files] == ["dit", "dit", "dit", "text", "text"]
    assert [file.size for file in got.files] == [13, 7321, 5003, 311, 0]
    assert got.files[1].sha256 == hashlib.sha256(MODEL["weights-1.bin"]).hexdigest()
    assert (got.files[0].sha256, got.files[0].git) == (None, git_name(MODEL["config.json"]))
    assert got.commit == COMMIT
    assert [path for path, *_ in site.asked] == ["/api/models/some/model"]


def test_one_part_is_listed_alone_and_an_unknown_one_is_refused(site):
    assert [file.name for file in listed(site, "text").files] == [
        "words/rules.json",
        "words/none.txt",
    ]
    with pytest.raises(InputError, match="some/model has no part 'codec'; it has dit, text"):
        listed(site, "codec")


def test_all_that_is_needed_comes_and_nothing_else(site, tmp_path):
    got = [hub.fetch(listed(site), file, tmp_path / "m") for file in listed(site).files]
    assert present(tmp_path / "m") == sorted(NEEDED)
    for each in got:
        assert (tmp_path / "m" / each.name).read_bytes() == MODEL[each.name]
        assert each.sha256 == hashlib.sha256(MODEL[each.name]).hexdigest()
        assert (each.size, each.fetched) == (len(MODEL[each.name]), each.size > 0)
        assert not (tmp_path / "m" / each.name).is_symlink()
    assert site.fetched() == [(name, None) for name in NEEDED if MODEL[name]]


def test_a_broken_connection_is_taken_up_again_in_the_same_run_as_long_as_something_comes(
    site, tmp_path
):
    site.cuts = {"weights-1.bin": [2500, 0, 3001]}
    fetched(site, tmp_path, tries=2)
    assert (tmp_path / "weights-1.bin").read_bytes() == MODEL["weights-1.bin"]
    assert [wanted for _, wanted in site.fetched()] == [
        None,
        "bytes=2000-",
        "bytes=2000-",
        "bytes=5000-",
    ]


def test_a_later_run_continues_what_an_earlier_one_left(site, tmp_path):
    site.budget = 4500
    with pytest.raises(
        MachineError, match="no connection to the hub.*The same command goes on where it stopped"
    ):
        fetched(site, tmp_path, tries=2)
    (left,) = tmp_path.iterdir()
    assert left.suffix == ".part"
    assert left.read_bytes() == MODEL["weights-1.bin"][:4000]
    site.budget = None
    site.asked = []
    assert fetched(site, tmp_path).fetched
    assert site.fetched() == [("weights-1.bin", "bytes=4000-")]
    assert present(tmp_path) == ["weights-1.bin"]
    assert (tmp_path / "weights-1.bin").read_bytes() == MODEL["weights-1.bin"]


def test_it_gives_up_after_attempts_that_bring_nothing(site, tmp_path):
    site.budget = 0
    with pytest.raises(MachineError):
        fetched(site, tmp_path, tries=3)
    assert len(site.fetched()) == 3


def test_a_server_without_ranges_sends_all_of_it_again(site, tmp_path):
    site.cuts = {"weights-1.bin": [3333]}
    site.ranges = False
    fetched(site, tmp_path)
    assert [wanted for _, wanted in site.fetched()] == [None, "bytes=3000-"]
    assert (tmp_path / "weights-1.bin").read_bytes() == MODEL["weights-1.bin"]


def test_ctrl_c_leaves_a_partial_file_that_is_continued(site, tmp_path):
    def interrupt(pieces, what, size):
        for count, piece in enumerate(pieces):
            if count == 3:
                raise KeyboardInterrupt
            yield piece

    with pytest.raises(KeyboardInterrupt):
        fetched(site, tmp_path, watch=interrupt)
    assert not (tmp_path / "weights-1.bin").exists()
    fetched(site, tmp_path)
    assert [wanted for _, wanted in site.fetched()] == [None, "bytes=3000-"]
    assert (tmp_path / "weights-1.bin").read_bytes() == MODEL["weights-1.bin"]


def test_a_partial_file_of_another_version_is_not_continued(site, tmp_path):
    site.budget = 4500
    with pytest.raises(MachineError):
        fetched(site, tmp_path, tries=1)
    site.budget = None
    site.asked = []
    site.files["some/model"]["weights-1.bin"] = content(7321, 9)
    fetched(site, tmp_path)
    assert site.fetched() == [("weights-1.bin", None)]
    assert (tmp_path / "weights-1.bin").read_bytes() == content(7321, 9)


@pytest.mark.parametrize("name", ["weights-1.bin", "config.json"])
def test_a_file_with_another_hash_is_removed_and_both_hashes_are_named(site, tmp_path, name):
    sent = MODEL[name]
    recorded = bytes(reversed(MODEL[name]))
    site.recorded = {name: recorded}
    digest = (lambda x: hashlib.sha256(x).hexdigest()) if len(sent) >= LARGE else git_name
    with pytest.raises(
        MachineError, match=f"{digest(sent)}, not {digest(recorded)}.*removed; run the same command"
    ):
        fetched(site, tmp_path, name)
    assert present(tmp_path) == []


def test_more_bytes_than_recorded_are_not_taken(site, tmp_path):
    site.files["some/model"]["weights-1.bin"] = content(90_001)
    site.recorded = {"weights-1.bin": content(6001)}
    largest = []

    def measured(pieces, what, size):
        for piece in pieces:
            yield piece
            largest.extend(path.stat().st_size for path in tmp_path.iterdir())

    with pytest.raises(MachineError, match="bytes, not 6,001"):
        fetched(site, tmp_path, watch=measured)
    assert max(largest) < 9000
    assert present(tmp_path) == []


def test_what_is_there_is_checked_and_not_fetched_again(site, tmp_path):
    fetched(site, tmp_path)
    site.asked = []
    again = fetched(site, tmp_path)
    assert (again.fetched, again.sha256) == (
        False,
        hashlib.sha256(MODEL["weights-1.bin"]).hexdigest(),
    )
    assert site.fetched() == []


@pytest.mark.parametrize("mine", [b"mine", bytes(7321)])
def test_a_file_of_the_user_is_not_overwritten(site, tmp_path, mine):
    (tmp_path / "weights-1.bin").write_bytes(mine)
    with pytest.raises(InputError, match="remove it or choose another --out"):
        fetched(site, tmp_path)
    assert (tmp_path / "weights-1.bin").read_bytes() == mine
    assert site.fetched() == []


def test_a_file_that_was_renamed_there_is_named_with_its_nearest(site):
    site.files["some/model"]["config_v2.json"] = site.files["some/model"].pop("config.json")
    with pytest.raises(
        InputError, match="no longer holds config.json; the nearest is config_v2.json"
    ):
        listed(site)


def test_a_hub_that_records_no_hash_is_refused(site, monkeypatch):
    record = Site.record
    bare = [{"rfilename": name} for name in MODEL]
    monkeypatch.setattr(Site, "record", lambda *given: record(*given) | {"siblings": bare})
    with pytest.raises(InputError, match="records no size or hash of config.json"):
        listed(site)


@pytest.mark.parametrize(
    ("status", "headers", "kind", "sentence"),
    [
        (401, {}, InputError, "some/model is not there or not open to you"),
        (401, {"X-Error-Code": "GatedRepo"}, InputError, "some/model is gated; accept its terms"),
        (403, {"X-Error-Code": "GatedRepo"}, InputError, "some/model is gated; accept its terms"),
        (403, {}, InputError, "some/model is closed to you"),
        (
            404,
            {"X-Error-Code": "RepoNotFound"},
            InputError,
            "some/model or one of its files is not there",
        ),
        (404, {}, InputError, "some/model or one of its files is not there"),
        (429, {}, MachineError, "the hub answers 429 for some/model; try again later"),
        (500, {}, MachineError, "the hub answers 500 for some/model; try again later"),
    ],
)
@pytest.mark.parametrize("late", [False, True])
def test_every_refusal_is_one_sentence(site, tmp_path, late, status, headers, kind, sentence):
    known = listed(site)
    site.refusal = status, headers
    late_or_not = {
        False: lambda: listed(site),
        True: lambda: hub.fetch(known, known.files[1], tmp_path, pause=0.0),
    }
    with pytest.raises(kind, match=sentence):
        late_or_not[late]()
    assert present(tmp_path) == []


def test_nobody_answering_is_a_failure_of_the_machine(site):
    address = site.url
    with serving(Site({})) as gone:
        address = gone.url
    with pytest.raises(
        MachineError, match="no connection to the hub for some/model .*check the network"
    ):
        hub.listing(SOURCE, endpoint=address)


@pytest.mark.parametrize("page", [b"<html>", b"[]", b"{}"])
def test_another_program_behind_the_address_is_recognised(site, page):
    site.page = page
    with pytest.raises(InputError, match="is not a hub; check HF_ENDPOINT"):
        listed(site)


def test_offline_by_setting_says_so(site, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
        listed(site)
    assert site.asked == []


def test_the_token_stays_with_the_hub_and_the_range_goes_along(site, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with serving(Site(site.files, cuts={"weights-1.bin": [2222]})) as store:
        site.elsewhere = store.url
        fetched(site, tmp_path)
    assert {token for *_, token in site.asked} == {"Bearer hf_secret"}
    assert [(wanted, token) for _, wanted, token in store.asked] == [
        (None, None),
        ("bytes=2000-", None),
    ]
    assert (tmp_path / "weights-1.bin").read_bytes() == MODEL["weights-1.bin"]


def test_room_is_asked_for_what_is_missing_only(site, tmp_path, monkeypatch):
    files = listed(site).files
    folder = tmp_path / "not" / "yet"
    usage = shutil.disk_usage(tmp_path)

    def free(count):
        monkeypatch.setattr(hub.shutil, "disk_usage", lambda path: usage._replace(free=count))

    free(12_648)
    hub.require_room(files, folder)
    free(12_647)
    with pytest.raises(
        MachineError, match="yet needs 12,648 bytes and its disk has 12,647 free; free space"
    ):
        hub.require_room(files, folder)
    folder.mkdir(parents=True)
    (folder / "weights-2.bin").write_bytes(MODEL["weights-2.bin"])
    hub.partial(folder, files[1]).write_bytes(bytes(321))
    free(12_648 - 5003 - 321)
    hub.require_room(files, folder)
    free(12_648 - 5003 - 322)
    with pytest.raises(MachineError):
        hub.require_room(files, folder)


@pytest.mark.parametrize(
    ("licence", "declared", "asks", "sentence"),
    [
        ("apache-2.0", None, False, "some/model: apache-2.0"),
        ("apache-2.0", "apache-2.0", False, "some/model: apache-2.0"),
        (
            "apache-2.0",
            "cc-by-nc-4.0",
            True,
            "some/model: apache-2.0; the card says cc-by-nc-4.0 today",
        ),
        ("cc-by-nc-4.0", "cc-by-nc-4.0", True, "some/model: cc-by-nc-4.0, not for commercial use"),
        (
            "cc-by-nc-4.0",
            "mit",
            True,
            "some/model: cc-by-nc-4.0, not for commercial use; the card says mit today",
        ),
        (None, None, True, "licence not recorded here; read the model card at some/model"),
        (
            None,
            "mit",
            True,
            "licence not recorded here; read the model card at some/model; the card says mit today",
        ),
    ],
)
def test_terms_say_what_is_known_and_who_has_to_accept_them(licence, declared, asks, sentence):
    source = replace(SOURCE, licence=licence)
    assert hub.terms(source, declared) == sentence
    assert hub.needs_consent(source, declared) is asks


@pytest.mark.parametrize(
    ("licence", "sentence"),
    [
        ("apache-2.0", "some/model: apache-2.0, unsettled: it was not read"),
        (None, "some/model: licence unsettled: it was not read"),
    ],
)
def test_an_unsettled_licence_is_said_so_and_has_to_be_accepted(licence, sentence):
    source = replace(SOURCE, licence=licence, unsettled="it was not read")
    assert hub.terms(source, licence) == sentence
    assert hub.needs_consent(source, licence)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("self-forcing", r"called self-forcing-dmd now \(beside self-forcing-ode-init, self-forcing-sid\);"),
        ("causvid", r"called causvid-3step now \(beside causvid-4step\); give that name\."),
        ("causal-forcing", "called causal-forcing-chunkwise now"),
        ("packforcing-unofficial", "no file of packforcing-unofficial is published; train it with"),
    ],
)  # fmt: skip
def test_an_earlier_name_gets_the_new_one(name, sentence):
    with pytest.raises(InputError, match=sentence):
        hub.find(name)


def test_every_card_with_a_file_can_be_fetched():
    from packforcing_jax.config import cards

    published = {name for name, card in cards.cards().items() if card.files}
    assert set(hub.sources()) == published | set(hub.OTHER_LAYOUTS)
    for name, card in cards.cards().items():
        assert card.licence or card.unsettled, name
        if card.lora:
            assert card.lora.file in hub.sources()[name].files[0].names


def test_the_declared_licence_is_read_from_the_card(site):
    assert listed(site).declared is None
    site.licences = {"some/model": "cc-by-4.0"}
    assert listed(site).declared == "cc-by-4.0"


def test_an_unknown_name_gets_the_nearest():
    assert hub.find("causvid-3step").repository == "tianweiy/CausVid"
    with pytest.raises(InputError, match="no weights 'longlve'; did you mean longlive?"):
        hub.find("longlve")


def test_sizes_are_summed_only_if_all_are_recorded():
    assert SOURCE.size is None
    assert hub.sources()["wan2.1-t2v-1.3b"].size == pytest.approx(17.55e9, rel=1e-3)
    assert hub.sources()["longlive"].size is None


@pytest.mark.parametrize("name", list(hub.sources()))
def test_every_source_names_parts_once_and_files_by_relative_paths(name):
    source = hub.sources()[name]
    assert len(set(source.parts)) == len(source.parts)
    assert set(source.parts) <= {"dit", "codec", "text"}
    for files in source.files:
        for path in map(pathlib.PurePosixPath, files.names):
            assert not path.is_absolute()
            assert ".." not in path.parts
            assert "*" not in str(path.parent)
