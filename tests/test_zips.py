"""Only a whole, plain and unambiguous zip archive is read; any other file is refused in one sentence."""

import io
import pickle
import struct
import zipfile

import pytest
import torchfiles
from packforcing_jax.convert import pickles
from torchfiles import complaint, numbers


def sound(tmp_path):
    """The bytes of a sound checkpoint."""
    return torchfiles.save(tmp_path / "sound.pt", {"x": numbers(5, 3), "step": 3}).read_bytes()


def patched(entry, *, central=None, local=None):
    """Overwrites header bytes of one entry: (offset into the header, new bytes) in the directory or before the data."""

    def change(content):
        content = bytearray(content)
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            info = archive.getinfo(f"archive/{entry}")
            place = archive.start_dir
            while not content[place + 46 :].startswith(info.filename.encode()):
                place = content.index(b"PK\x01\x02", place + 4)
        for start, patch in ((place, central), (info.header_offset, local)):
            if patch is not None:
                content[start + patch[0] : start + patch[0] + len(patch[1])] = patch[1]
        return bytes(content)

    return change


def claimed_directory(size, offset):
    """Another size and place of the directory in the last record."""
    return lambda content: content[:-10] + struct.pack("<II", size, offset) + content[-2:]


ARCHIVES = {  # a change of a sound file's bytes, and what the refusal names
    "truncated by one byte": (lambda content: content[:-1], "damaged"),
    "truncated in the middle": (lambda content: content[: len(content) // 2], "damaged"),
    "truncated at the start": (lambda content: content[:30], "damaged"),
    "only the magic": (lambda content: content[:4], "damaged"),
    "the start cut off": (lambda content: content[100:], "no checkpoint"),
    "the first entry cut short": (lambda content: content[:40] + content[60:], "damaged"),
    "another magic": (lambda content: b"GGUF" + content[4:], "no checkpoint"),
    "empty": (lambda content: b"", "is empty"),
    "a web page": (lambda content: b"<!doctype html><title>Not found</title>", "web page"),
    "a pointer": (
        lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "git LFS",
    ),
    "safetensors": (
        lambda content: b"\x10\x00\x00\x00\x00\x00\x00\x00{}              ",
        "no checkpoint",
    ),
    "torch < 1.6": (
        lambda content: pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2),
        "torch < 1.6",
    ),
    "a bare pickle": (lambda content: pickle.dumps({"x": 3}, 2), "no checkpoint"),
    "an encrypted storage": (patched("data/0", central=(8, b"\x01\x08")), "encrypts data/0"),
    "a storage encrypted in secret": (patched("data/0", local=(6, b"\x41\x00")), "encrypts data/0"),
    "a compressed storage": (patched("data/0", central=(10, b"\x08\x00")), "compresses data/0"),
    "a storage compressed in secret": (
        patched("data/0", local=(8, b"\x08\x00")),
        "compresses data/0",
    ),
    "no local header": (patched("data/0", local=(0, b"PK\x01\x02")), "data/0 has no header"),
    "another local name": (patched("data/0", local=(30, b"archivf")), "not where it should be"),
    "a local name that is too long": (
        patched("data/0", local=(26, b"\xff\xff")),
        "not where it should be",
    ),
    "local extras that are too long": (
        patched("data/0", local=(28, b"\xff\xff")),
        "not where it should be",
    ),
    "a storage that leaves the file": (
        patched("data/0", central=(20, b"\xff\xff\xff\x7f" * 2)),
        "not where",
    ),
    "a storage that starts elsewhere": (
        patched("data/0", central=(42, b"\x00\x00\x00\x00")),
        "not where it should",
    ),
    "a storage that starts outside": (
        patched("data/0", central=(42, b"\xff\xff\xff\x7f")),
        "damaged",
    ),
    "a storage of another size": (
        patched("data/0", central=(20, b"\x08\x00\x00\x00" * 2)),
        "60 bytes and has 8",
    ),
    "an entry from the future": (patched("data/0", central=(6, b"\xff\x00")), "damaged"),
    "a directory outside": (claimed_directory(2**31, 0), "damaged"),
    "a directory of nothing": (claimed_directory(0, 0), "0 entries data.pkl"),
    "a directory elsewhere": (claimed_directory(100, 2**31), "damaged"),
}


@pytest.mark.parametrize("case", ARCHIVES)
def test_damaged_archives_are_refused(tmp_path, case):
    change, named = ARCHIVES[case]
    (tmp_path / "a.pt").write_bytes(change(sound(tmp_path)))
    assert named in complaint(tmp_path / "a.pt")


def parts(**changes):
    """The entries of a sound checkpoint, some changed."""
    found = torchfiles.entries({"x": numbers(5, 3), "step": 3})
    named = {
        name.replace("__", "/").replace("_pkl", ".pkl"): part for name, part in changes.items()
    }
    return found | {f"archive/{name}": part for name, part in named.items()}


def without(name):
    return {known: part for known, part in parts().items() if known != f"archive/{name}"}


ENTRIES = {  # what the archive holds, and what the refusal names
    "big-endian numbers": (parts(byteorder=b"big"), "byte order big"),
    "numbers in no known order": (parts(byteorder=b"\xff\x00"), r"byte order \xff\x00"),
    "a long byte order": (parts(byteorder=b"little" * 10), "60 bytes"),
    "no data.pkl": (without("data.pkl"), "0 entries data.pkl"),
    "two data.pkl": (parts() | {"other/data.pkl": b"\x80\x02}."}, "2 entries data.pkl"),
    "data.pkl inside and outside": (parts() | {"data.pkl": b"\x80\x02}."}, "2 entries data.pkl"),
    "data.pkl further inside": ({"a/b/data.pkl": b"\x80\x02}."}, "0 entries data.pkl"),
    "nothing": ({"readme": b"hello"}, "0 entries data.pkl"),
    "a storage that is missing": (without("data/0"), "lacks the entry data/0"),
    "a storage that is too short": (parts(data__0=b"1234"), "60 bytes and has 4"),
    "an endless pickle": (parts(data_pkl=bytes(pickles.LONGEST_PICKLE + 1)), "at most"),
}  # fmt: skip


@pytest.mark.parametrize("case", ENTRIES)
def test_archives_of_other_things_are_refused(tmp_path, case):
    held, named = ENTRIES[case]
    assert named in complaint(torchfiles.write(tmp_path / "a.pt", held))


def test_compressed_and_repeated_entries_are_refused(tmp_path):
    assert "compresses" in complaint(
        torchfiles.write(tmp_path / "a.pt", parts(), zipfile.ZIP_DEFLATED)
    )
    repeated = [*parts().items(), ("archive/data/0", b"1234")]
    with pytest.warns(UserWarning, match="Duplicate name"):
        torchfiles.write(tmp_path / "b.pt", repeated)
    assert "an entry twice" in complaint(tmp_path / "b.pt")


def test_paths_that_are_no_files_are_refused(tmp_path):
    assert "No such file" in complaint(tmp_path / "absent.pt")
    assert "Is a directory" in complaint(tmp_path)
    assert "No such file" in complaint(str(tmp_path / "neither" / "nor.pt"))
