"""Messages and bodies of clients: what is right is read, what is wrong is refused in one sentence that names it."""

import contextlib
import dataclasses
import json
import typing

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from packforcing_jax.errors import InputError
from packforcing_jax.live import images, protocol
from packforcing_jax.live.limits import Limits, flag

RIGHT = [
    ({"type": "have", "block": 7}, protocol.Have(7)),
    ({"type": "prompt", "text": "a b", "at": 3, "policy": "cut", "ref": "x"},
     protocol.Prompt("a b", 3, "cut", "x")),
    ({"type": "prompt", "text": "a b", "at": None, "policy": None}, protocol.Prompt("a b")),
    ({"type": "pause", "ref": 5}, protocol.Pause(5)),
    ({"type": "resume"}, protocol.Resume()),
    ({"type": "rewind", "to": 0}, protocol.Rewind(0)),
]  # fmt: skip
WRONG = [  # what is sent, and what the sentence names
    ("", "not JSON"),
    ("{", "not JSON"),
    ("[]", "must be a JSON object"),
    ("7", "must be a JSON object"),
    ('{"type": NaN}', "NaN is no number"),
    ("[" * 100_000, "nested too deeply"),
    ('{"type": "have", "block": ' + "9" * 5000 + "}", "a number cannot be read"),
    ("{}", "type None is unknown"),
    ('{"type": 5}', "type 5 is unknown"),
    ('{"type": ["pause"]}', "is unknown"),
    ('{"type": "paus"}', "did you mean pause"),
    ('{"type": "have"}', "lacks block"),
    ('{"type": "have", "block": -1}', "block=-1"),
    ('{"type": "have", "block": true}', "block=True"),
    ('{"type": "have", "block": 1.0}', "block=1.0"),
    ('{"type": "have", "block": "1"}', "block='1'"),
    ('{"type": "have", "block": null}', "block=None"),
    ('{"type": "have", "block": 10000001}', "block=10000001"),
    ('{"type": "prompt", "text": ""}', "text=''"),
    ('{"type": "prompt", "text": 3}', "text=3"),
    (json.dumps({"type": "prompt", "text": "x" * 4001}), "4,000 characters"),
    ('{"type": "prompt", "text": "a", "policy": "forget"}', "keep, recache, flush, cut"),
    ('{"type": "prompt", "text": "a", "policy": ["cut"]}', "policy=['cut']"),
    ('{"type": "prompt", "text": "a", "polcy": "cut"}', "did you mean policy"),
    ('{"type": "rewind"}', "lacks to"),
    ('{"type": "pause", "ref": {"a": 1}}', "ref="),
    ('{"type": "pause", "ref": 1e400}', "ref=inf"),
    (json.dumps({"type": "pause", "ref": "x" * 101}), "ref="),
]


@pytest.mark.parametrize(("sent", "meant"), RIGHT)
def test_a_message_is_read(sent, meant):
    assert protocol.message(json.dumps(sent)) == meant


@pytest.mark.parametrize(("sent", "named"), WRONG)
def test_a_wrong_message_is_one_sentence(sent, named):
    with pytest.raises(InputError) as refused:
        protocol.message(sent)
    assert named in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 500


def test_the_reference_of_a_wrong_message_is_known_where_it_can_be():
    assert protocol.ref_of('{"type": "nothing", "ref": "mine"}') == "mine"
    assert protocol.ref_of('{"type": "nothing", "ref": [1]}') is None
    assert protocol.ref_of("{") is None


def test_bodies_of_requests():
    body = protocol.body(protocol.NewSession, b'{"prompt": "a", "run": true}')
    assert body == protocol.NewSession("a", run=True)
    assert protocol.body(protocol.Fork, b"") == protocol.Fork(None)
    for sent, named in [
        (b"", "lacks prompt"),
        (b"\xff\xfe{", "not UTF-8"),
        (b'{"prompt": "a", "seed": 4294967296}', "seed=4294967296"),
        (b'{"prompt": "a", "run": 1}', "run=1"),
        (b'{"prompt": "a", "drift": "re-ancor"}', "nothing, stop, re-anchor"),
    ]:
        with pytest.raises(InputError, match=named):
            protocol.body(protocol.NewSession, sent)
    for seconds in ("0", "-1", '"5"', "true", "null", "1e999", "NaN"):
        with pytest.raises(InputError):
            protocol.body(protocol.NewVideo, f'{{"prompt": "a", "seconds": {seconds}}}'.encode())


def test_every_field_has_its_check():
    kinds = [
        *typing.get_args(protocol.Message),
        protocol.NewSession,
        protocol.Fork,
        protocol.NewVideo,
    ]
    fields = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    assert fields == set(protocol.CHECKS)


VALUES = strategies.recursive(
    strategies.none() | strategies.booleans() | strategies.integers() | strategies.floats()
    | strategies.text(max_size=20),
    lambda inner: strategies.lists(inner, max_size=3)
    | strategies.dictionaries(strategies.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(
    strategies.sampled_from([*protocol.MESSAGES, "x"]),
    strategies.dictionaries(strategies.sampled_from([*protocol.CHECKS, "y"]), VALUES, max_size=4),
)
def test_whatever_is_sent_is_a_message_or_a_sentence(kind, fields):
    with contextlib.suppress(InputError):
        meant = protocol.message(json.dumps({"type": kind, **fields}))
        given = {name: value for name, value in fields.items() if value is not None}
        assert given.items() <= dataclasses.asdict(meant).items()


def test_every_bound_is_kept_by_its_flag():
    for field in dataclasses.fields(Limits):
        if "choices" in field.metadata:
            continue
        for wrong in (field.metadata["least"] - 1, field.metadata["most"] + 1):
            with pytest.raises(InputError, match=flag(field)):
                Limits(**{field.name: wrong})


# The binary message


@pytest.mark.parametrize("media", [images.PNG, images.JPEG])
def test_a_block_is_lengths_and_images(media):
    frames = np.random.default_rng(0).integers(0, 256, (3, 5, 7, 3), np.uint8)
    sent = images.message(frames, media)
    at = 0
    for _ in range(3):
        size = int.from_bytes(sent[at : at + 4], "big")
        start = sent[at + 4 : at + 8]
        assert start == (b"\x89PNG" if media == images.PNG else b"\xff\xd8\xff\xe0")
        at += 4 + size
    assert at == len(sent)
    if media == images.PNG:
        np.testing.assert_array_equal(images.decoded(sent), frames)


@pytest.mark.parametrize("cut", [1, 3, 4, 20, -1])
def test_a_cut_block_is_refused(cut):
    frames = np.zeros((2, 4, 6, 3), np.uint8)
    with pytest.raises(InputError, match="fetch it again"):
        images.decoded(images.message(frames, images.PNG)[:cut])


def test_small_pictures_stay_exact_and_large_ones_small():
    assert images.media_of(12) == images.PNG
    assert images.media_of(1) == images.JPEG
    frames = np.full((2, 480, 832, 3), 90, np.uint8)
    assert len(images.message(frames, images.media_of(1))) < frames.nbytes / 50
