"""Two hundred hostile messages and requests: the contract's codes, one sentence, no traceback, and sessions live on."""

import base64
import contextlib
import json
import logging
import os
import socket
import time

import live
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from packforcing_jax.errors import InputError
from packforcing_jax.live import gate
from packforcing_jax.sampling.pipeline import Pipeline

TOKEN = "Right-token_1"
CODES = {400, 401, 403, 404, 409, 413, 429}
BEARER = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture(scope="module")
def served(folder, tmp_path_factory):
    with live.serving_of(
        Pipeline.from_pretrained(folder),
        tmp_path_factory.mktemp("root"),
        token=TOKEN,
        names=("studio.example",),
        sessions=500,
        body_seconds=1.0,
        body_bytes=4096,
        message_bytes=8192,
    ) as server:
        yield server


@pytest.fixture(autouse=True)
def no_traceback(caplog):
    """Nothing that a client does is a defect of the server."""
    caplog.set_level(logging.WARNING)
    yield
    assert [each.getMessage() for each in caplog.records if each.exc_info] == []
    assert not [each for each in caplog.records if each.levelno >= logging.ERROR]


@pytest.fixture(scope="module")
def session(served):
    """One that has to outlive everything here."""
    status, said, _ = served.ask("POST", "/v1/sessions", {"prompt": live.PROMPT}, BEARER)
    assert status == 201
    return said["id"]


def alive(served, session):
    """The session makes another block."""
    with served.watch(session, additional_headers=BEARER) as client:
        block = client.hear()["block"]
        client.until(type="block", index=block)


def raw(served, content, *, slowly=0.0, seconds=10):
    """What the server answers to bytes; (status, head, body)."""
    with socket.create_connection(("127.0.0.1", served.port), timeout=seconds) as link:
        if slowly:
            for at in range(len(content)):
                try:
                    link.sendall(content[at : at + 1])
                except OSError:
                    break
                time.sleep(slowly)
        else:
            link.sendall(content)
        answer = b""
        with contextlib.suppress(TimeoutError, ConnectionResetError):
            while piece := link.recv(65536):
                answer += piece
                head, _, body = answer.partition(b"\r\n\r\n")
                if f"content-length: {len(body)}".encode() in head.lower():
                    break
    head, _, body = answer.partition(b"\r\n\r\n")
    status = int(head.split()[1]) if head.startswith(b"HTTP/1.1") else 0
    return status, head, body


def request(
    method, path, *headers, body=b"", host="127.0.0.1", token: str | None = TOKEN, length=True
):
    lines = [
        f"{method} {path} HTTP/1.1",
        *([f"Host: {host}"] if host is not None else []),
        *headers,
    ]
    if token is not None:
        lines.append(f"Authorization: Bearer {token}")
    if length and body:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def refused(answer, *codes):
    status, head, body = answer
    assert status in (codes or CODES), answer
    said = json.loads(body)["error"]["message"]
    assert said
    assert "\n" not in said
    assert "Traceback" not in said
    assert b"application/json" in head


# Who asks


@pytest.mark.parametrize("host", [
    "evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "evil.example:8000", "[::2]",
    "10.0.0.1", "", "studio.example.evil", "@127.0.0.1", "127.0.0.1@evil.example", "[", "a b", "%00",
    "STUDIO.example.", "0", "2130706433", "xn--80ak6aa92e.com", "127.0.0.1:8000:9",
])  # fmt: skip
@pytest.mark.parametrize("path", ["/", "/v1/sessions"])
def test_another_host_is_403(served, host, path):
    refused(raw(served, request("GET", path, host=host)), 403)


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost:99", "[::1]:8000", "studio.example", "LOCALHOST"]
)
def test_its_own_names_are_let_in(served, host):
    assert raw(served, request("GET", "/v1/sessions", host=host))[0] == 200


@pytest.mark.parametrize("origin", [
    "null", "http://evil.example", "https://127.0.0.1.evil.example", "http://127.0.0.1:1",
    "file://", "chrome-extension://x", "http://", "http://[", "javascript:alert(1)", "127.0.0.1",
    "http://localhost", "http://127.0.0.1@evil.example", "ftp://127.0.0.1",
])  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_another_origin_is_403(served, origin, method):
    refused(raw(served, request(method, "/v1/sessions", f"Origin: {origin}", body=b"{}")), 403)


def test_its_own_origin_is_let_in(served):
    content = request("GET", "/v1/sessions", "Origin: http://127.0.0.1:77", host="127.0.0.1:77")
    assert raw(served, content)[0] == 200


@pytest.mark.parametrize("token", [
    None, "", "wrong", TOKEN[:-1], TOKEN + "x", TOKEN.lower(), f" {TOKEN}x", "\u00fc\u00df", "a" * 5000,
    TOKEN.replace("-", "\u00ad"),
])  # fmt: skip
@pytest.mark.parametrize(
    "path", ["/v1/sessions", "/v1/model", "/v1/videos/" + "0" * 16, "/nothing"]
)
def test_without_the_token_it_is_401(served, token, path):
    refused(raw(served, request("GET", path, token=token)), 401)


@pytest.mark.parametrize("header", [
    f"Authorization: Basic {base64.b64encode(TOKEN.encode()).decode()}", f"Authorization: {TOKEN}",
    f"X-Token: {TOKEN}", f"Cookie: token={TOKEN}", "Authorization: Bearer",
])  # fmt: skip
def test_a_token_elsewhere_is_none(served, header):
    refused(raw(served, request("GET", "/v1/sessions", header, token=None)), 401)


def test_the_page_and_health_need_no_token(served):
    for path in gate.OPEN:
        assert raw(served, request("GET", path, token=None))[0] == 200


# What is asked for


@pytest.mark.parametrize("path", [
    "/v1/sessions/../../etc/passwd", "/v1/sessions/%2e%2e%2f%2e%2e", "/v1/sessions/..%2f..%2fetc%2fpasswd",
    "/../pyproject.toml", "/%2e%2e/live.js", "//live.js", "/live.js/", "/page/live.js", "/index.html",
    "/v1/sessions/%00", "/v1/sessions/" + "f" * 16, "/v1/sessions/" + "F" * 5000, "/v1/sessions/%F0%9F%98%80",
    "/v1/sessions/%ff%fe", "/v1/videos/.unfinished", "/v1/videos/" + "0" * 16 + "/content", "/v2", "/v1",
    "/V1/SESSIONS", "/v1/sessions/", "/v1/sessions//live", "/health/", "/openapi.json", "/docs", "/.git/config",
])  # fmt: skip
def test_what_is_not_there_is_404(served, path):
    refused(raw(served, request("GET", path)), 404)


@pytest.mark.parametrize("block", [
    "-1", "1e3", "0x0", "99999999999999999999", "..", "%2e%2e", "00000000000000", "NaN", "%C2%B2", "1.0", "+1", " 1",
])  # fmt: skip
def test_a_block_that_is_none_is_404(served, session, block):
    path = f"/v1/sessions/{session}/blocks/{block.replace(' ', '%20')}"
    refused(raw(served, request("GET", path)), 404)


@pytest.mark.parametrize(
    "method", ["PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND", "HEAD2"]
)
@pytest.mark.parametrize("path", ["/", "/v1/sessions", "/health"])
def test_a_method_that_is_none_is_404(served, method, path):
    refused(raw(served, request(method, path)), 404)


@pytest.mark.parametrize("body", [
    b"", b"{", b"[]", b"null", b"5", b'"x"', b"\xff\xfe\x00", b'{"prompt": 5}', b'{"prompt": ""}',
    b'{"prompt": null}', b'{"prompt": ["a"]}', b'{"prompt": {"a": 1}}', b'{"prompt": "  "}',
    b'{"prompt": "\\ud800"}', b'{"prompt": "a\\u0000b"}', b'{"prompt": "elephant"}',
    b'{"prompt": "a", "seed": 1.5}', b'{"prompt": "a", "seed": "1"}', b'{"prompt": "a", "seed": true}',
    b'{"prompt": "a", "seed": 99999999999999999999999}', b'{"prompt": "a", "seed": -0.0}',
    b'{"prompt": "a", "memory": "../../x"}', b'{"prompt": "a", "memory": 5}', b'{"prompt": "a", "method": ""}',
    b'{"prompt": "a", "method": "' + b"x" * 99 + b'"}', b'{"prompt": "a", "run": "yes"}',
    b'{"prompt": "a", "__class__": "x"}', b'{"prompt": "a", "seed": NaN}', b'{"prompt": "a", "seed": Infinity}',
    b'{"prompt": "' + b"a " * 1900 + b'"}x', b"[" * 4000, b'{"a":' * 600, b'{"prompt": "a", "seed": 1' + b"0" * 3000,
    b'{"prompt": "a", "\\ud800": 1}', b"{'prompt': 'a'}", b'{"prompt": "a",}', b'{"prompt" "a"}',
])  # fmt: skip
def test_a_body_that_is_wrong_is_400(served, body):
    refused(raw(served, request("POST", "/v1/sessions", body=body)), 400)


@pytest.mark.parametrize("body", [
    b'{"prompt": "a"}', b'{"prompt": "a", "seconds": 0}', b'{"prompt": "a", "seconds": -5}',
    b'{"prompt": "a", "seconds": 1e308}', b'{"prompt": "a", "seconds": 1e999}', b'{"prompt": "a", "seconds": "5"}',
    b'{"prompt": "a", "seconds": [1]}', b'{"seconds": 5}', b'{"prompt": "a", "seconds": 1, "method": "x"}',
])  # fmt: skip
def test_a_job_that_is_wrong_is_400(served, body):
    refused(raw(served, request("POST", "/v1/videos", body=body)), 400)


@pytest.mark.parametrize(
    "body", [b'{"at": -1}', b'{"at": 99}', b'{"at": "0"}', b'{"at": 1e2}', b"[]", b'{"to": 0}']
)
def test_a_fork_that_is_wrong_is_400(served, session, body):
    refused(raw(served, request("POST", f"/v1/sessions/{session}/fork", body=body)), 400)


# How it is sent


def test_a_large_body_is_413_whatever_it_claims(served):
    large = b"x" * 5000
    refused(raw(served, request("POST", "/v1/sessions", body=large)), 413)
    claimed = request("POST", "/v1/sessions", "Content-Length: 99999999999", length=False)
    refused(raw(served, claimed), 413)
    chunk = b"1000\r\n" + b"x" * 4096 + b"\r\n"
    head = request("POST", "/v1/sessions", "Transfer-Encoding: chunked", length=False)
    refused(raw(served, head + chunk * 3 + b"0\r\n\r\n"), 413)


def test_a_body_that_never_ends_is_given_up(served):
    began = time.monotonic()
    head = request("POST", "/v1/sessions", "Content-Length: 300", length=False)
    refused(raw(served, head + b"{" * 10), 400)
    slow = request("POST", "/v1/sessions", "Content-Length: 50", length=False) + b"x" * 40
    assert raw(served, slow, slowly=0.02)[0] in (0, 400)
    assert time.monotonic() - began < 15


def test_a_head_that_never_ends_is_given_up(served):
    for content in (b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: "):
        began = time.monotonic()
        with socket.create_connection(("127.0.0.1", served.port), timeout=10) as link:
            link.sendall(content)
            with contextlib.suppress(ConnectionResetError):
                assert link.recv(100) == b""
        assert time.monotonic() - began < 6
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as link:
        link.sendall(request("GET", "/health", token=None))
        assert link.recv(10_000).startswith(b"HTTP/1.1 200")
        link.sendall(b"GET /health HTTP/1.1\r\nHost: ")
        with contextlib.suppress(ConnectionResetError):
            assert link.recv(100) == b""


@pytest.mark.parametrize("content", [
    b"\x00" * 100, b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", b"GET / HTTP/1.1\r\n: x\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost 127.0.0.1\r\n\r\n", b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\n",
    b"POST /v1/sessions HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
    b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
])  # fmt: skip
def test_what_is_no_request_is_refused(served, content):
    status, _, body = raw(served, content)
    assert status in (0, 200, 400, 401, 403, 404)  # long is not wrong
    assert b"Traceback" not in body


# Over the socket

MESSAGES = [
    "", "{", "[]", "null", "5", "pause", '{"type": "x"}', '{"type": null}', '{"type": {"a": 1}}', '{"ref": 1}',
    '{"type": "prompt"}', '{"type": "prompt", "text": 5}', '{"type": "prompt", "text": ""}',
    '{"type": "prompt", "text": "elephant"}', '{"type": "prompt", "text": "\\ud800"}',
    '{"type": "prompt", "text": "a", "at": -1}', '{"type": "prompt", "text": "a", "at": 1e3}',
    '{"type": "prompt", "text": "a", "at": "next"}', '{"type": "prompt", "text": "a", "policy": "explode"}',
    '{"type": "prompt", "text": "a", "policy": {}}', '{"type": "rewind"}', '{"type": "rewind", "to": -1}',
    '{"type": "rewind", "to": 9999}', '{"type": "rewind", "to": null}', '{"type": "rewind", "to": [0]}',
    '{"type": "have"}', '{"type": "have", "block": 9999}', '{"type": "have", "block": "0"}',
    '{"type": "pause", "now": true}', '{"type": "resume", "ref": [1]}', '{"type": "pause", "ref": 1e999}',
    '{"type": "hello"}', '{"type": "block", "index": 0}', "[" * 8000, '{"a":' * 1200,
    '{"type": "have", "block": ' + "9" * 5000 + "}", '{"type": "prompt", "text": "' + "a" * 7000 + '"}',
    '{"__proto__": {"type": "pause"}}', "\u0000", '{"type": "pause"}{"type": "pause"}', "NaN", "\ufeff{}",
]  # fmt: skip


def test_wrong_messages_are_answered_and_counted_and_the_session_lives(served, session):
    with served.watch(session, additional_headers=BEARER) as client:
        client.hear()
        client.say(type="pause", ref="first")
        client.until(type="applied", ref="first")
        for content in [*MESSAGES, b"\x00\x01", b"", json.dumps({"type": "pause"}).encode()]:
            client.socket.send(content)
            said = client.until(type="error")["message"]
            assert said
            assert len(said) < 1200
            assert "Traceback" not in said
        (watcher,) = served.hub.get("sessions", session).watchers
        assert watcher.wrong == len(MESSAGES) + 3
        client.say(type="resume", ref="last")
        client.until(type="applied", ref="last")
        client.until(type="block")
    alive(served, session)


def test_a_message_that_is_too_large_closes_the_socket_and_nothing_else(served, session):
    with served.watch(session, additional_headers=BEARER) as client:
        client.hear()
        with pytest.raises(ConnectionClosed) as closed:
            _send_and_read(client, "x" * 9000)
        assert closed.value.rcvd.code == 1009
    alive(served, session)


def test_text_that_is_none_closes_the_socket_and_nothing_else(served, session):
    frame = bytes(
        [0x81, 0x80 | 2, 0, 0, 0, 0, 0xC3, 0x28]
    )  # text of two bytes that are not UTF-8, masked by zeros
    with served.watch(session, additional_headers=BEARER) as client:
        client.hear()
        client.socket.socket.sendall(frame)
        with pytest.raises(ConnectionClosed):
            _send_and_read(client)
    alive(served, session)


def _send_and_read(client, content=None):
    if content is not None:
        client.socket.send(content)
    while True:
        client.socket.recv(timeout=10)


@pytest.mark.parametrize(
    "offers", [["packforcing"], ["packforcing", "packforcing.wrong"], ["packforcing", "x"]]
)
def test_a_browser_without_the_token_is_closed_with_4401(served, session, offers):
    with served.watch(session, subprotocols=offers) as client:
        assert client.socket.subprotocol == "packforcing"
        with pytest.raises(ConnectionClosed) as closed:
            client.socket.recv(timeout=10)
        assert closed.value.rcvd.code == 4401


@pytest.mark.parametrize(("headers", "code"), [
    ({}, 401), ({"Authorization": "Bearer wrong"}, 401), ({**BEARER, "Origin": "http://evil.example"}, 403),
    ({**BEARER, "Origin": "null"}, 403),
])  # fmt: skip
def test_a_program_that_may_not_watch_is_told_why(served, session, headers, code):
    with (
        pytest.raises(InvalidStatus) as status,
        served.watch(session, additional_headers=headers),
    ):
        pass
    assert status.value.response.status_code == code
    assert json.loads(status.value.response.body)["error"]["message"]


def test_a_handshake_for_another_host_is_refused(served, session):
    content = request(
        "GET",
        f"/v1/sessions/{session}/live",
        "Upgrade: websocket",
        "Connection: Upgrade",
        "Sec-WebSocket-Version: 13",
        f"Sec-WebSocket-Key: {base64.b64encode(b'0' * 16).decode()}",
        host="evil.example",
    )
    refused(raw(served, content), 403)


@pytest.mark.parametrize("name", ["0" * 16, "..", "x", "%00"])
def test_a_session_that_is_not_there_cannot_be_watched(served, name):
    with pytest.raises(InvalidStatus) as status, served.watch(name, additional_headers=BEARER):
        pass
    assert status.value.response.status_code == 404


def test_the_token_is_taken_from_a_subprotocol_and_not_echoed(served, session):
    offers = ["packforcing", f"packforcing.{TOKEN}"]
    with served.watch(session, subprotocols=offers) as client:
        assert client.socket.subprotocol == "packforcing"
        assert client.hear()["type"] == "hello"


@pytest.mark.parametrize("upgrade", [
    ["Upgrade: websocket", "Connection: Upgrade"],
    ["Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 1", "Sec-WebSocket-Key: eA=="],
    ["Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: x"],
    ["Upgrade: h2c", "Connection: Upgrade"],
])  # fmt: skip
def test_half_a_handshake_is_refused(served, session, upgrade):
    status, _, body = raw(served, request("GET", f"/v1/sessions/{session}/live", *upgrade))
    assert status in {400, 404, 426}
    assert b"Traceback" not in body


def test_clients_that_come_and_go_at_once_leave_nothing(served, session):
    for _ in range(10):
        with socket.create_connection(("127.0.0.1", served.port), timeout=10) as link:
            link.sendall(request(
                "GET", f"/v1/sessions/{session}/live", "Upgrade: websocket", "Connection: Upgrade",
                "Sec-WebSocket-Version: 13",
                f"Sec-WebSocket-Key: {base64.b64encode(os.urandom(16)).decode()}",
            ))  # fmt: skip
            link.recv(10)
    served.until(lambda: served.server.clients == 0)
    alive(served, session)


def test_ten_thousand_messages_are_taken_one_by_one(served, session):
    with served.watch(session, additional_headers=BEARER) as client:
        client.hear()
        client.say(type="pause", ref="first")
        client.until(type="applied", ref="first")
        answers = 0
        for number in range(2000):  # the full number is in benchmarks/live.py
            client.socket.send('{"type": "x"}')
            if number % 20 == 19:
                for _ in range(20):
                    client.until(type="error")
                    answers += 1
        assert answers == 2000
        client.say(type="resume")
        client.until(type="block")


# The token itself


@pytest.mark.parametrize(
    "content",
    [b"", b"short", b"with space-", b"a/b+c===x", b"\xff" * 20, b"x" * 300, b"a\nb\nc\nddd"],
)
def test_a_token_that_no_browser_can_send_is_refused(tmp_path, content):
    (tmp_path / "token").write_bytes(content)
    with pytest.raises(InputError, match="--token-file"):
        gate.read_token(tmp_path / "token")


def test_a_token_may_end_with_a_line(tmp_path):
    (tmp_path / "token").write_text(TOKEN + "\n")
    assert gate.read_token(tmp_path / "token") == TOKEN
    with pytest.raises(InputError, match="--token-file"):
        gate.read_token(tmp_path / "none")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.9", "studio.example"])
def test_an_open_address_needs_a_token(host):
    with pytest.raises(InputError, match="--token-file"):
        gate.admission(host)
    assert gate.admission(host, token=TOKEN).any_address == (host in ("0.0.0.0", "::"))


def test_a_server_on_every_address_goes_by_addresses_but_not_by_names(folder, tmp_path):
    with live.serving_of(
        Pipeline.from_pretrained(folder), tmp_path, token=TOKEN, host="0.0.0.0"
    ) as served:
        for host, code in [("192.168.7.7:80", 200), ("[fe80::1]", 200), ("evil.example", 403)]:
            assert raw(served, request("GET", "/v1/sessions", host=host))[0] == code
