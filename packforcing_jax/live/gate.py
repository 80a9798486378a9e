"""What stands before the server: who may ask at all, and how much may be sent. Pure ASGI, for requests and sockets.

A request is refused with a JSON error, a socket in its handshake with the same answer. A browser, whose script sees
no answer to a handshake, is told of a wrong token by the close code 4401.
"""

import asyncio
import hmac
import ipaddress
import json
import re
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from packforcing_jax.errors import require
from packforcing_jax.live.limits import Limits

PLAIN = "packforcing"  # the subprotocol that is spoken; `packforcing.TOKEN` beside it carries a browser's token
WRONG_TOKEN = 4401  # close code
TOKEN = re.compile(r"[A-Za-z0-9_-]{8,256}")
HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9._-]+))(?::[0-9]{1,5})?")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
ANY = ("0.0.0.0", "::", "")
OPEN = ("/", "/live.js", "/style.css", "/icon.svg", "/health")  # what needs no token

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Refusal(NamedTuple):
    """An HTTP status and a sentence."""

    status: int
    message: str


@dataclass(frozen=True)
class Admission:
    """Who may ask: names under which the server may be called, None for any address in digits, and the token."""

    names: frozenset[str]
    any_address: bool = False
    token: str | None = None


def admission(host: str, names: tuple[str, ...] = (), token: str | None = None) -> Admission:
    """Who may ask a server that listens on `host`; raises `InputError` for an open one without a token."""
    local = host in LOOPBACK
    require(
        local or token is not None,
        f"--host {host} can be reached from other machines; give --token-file FILE too, or listen on 127.0.0.1.",
    )
    known = {*LOOPBACK, *names, host} - {*ANY}
    return Admission(frozenset(name.lower() for name in known), host in ANY, token)


def read_token(path: str | Path) -> str:
    """The token in a file; raises `InputError` unless it is one that a browser can send."""
    try:
        text = Path(path).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        text = ""
    require(
        TOKEN.fullmatch(text) is not None,
        f"--token-file {path} holds no token; write 8 to 256 letters, digits, - and _ into it, such as those of "
        "python -c 'import secrets; print(secrets.token_urlsafe())'.",
    )
    return text


class Gate:
    """`app` behind checks of host, origin, token, size and number."""

    def __init__(self, app: App, admitted: Admission, limits: Limits):
        self._app = app
        self._admitted = admitted
        self._limits = limits
        self._requests = 0
        self.refused = 0  # requests and handshakes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._request(scope, receive, send)
        elif scope["type"] == "websocket":
            await self._socket(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _request(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._foreign(scope) or self._unknown(scope)
        if refusal is None and self._requests >= self._limits.requests:
            refusal = Refusal(
                429,
                f"{self._requests} requests are in progress; wait for some of them (--requests).",
            )
        if refusal is not None:
            await self._refuse(refusal, send)
            return
        self._requests += 1
        try:
            content = await self._body(scope, receive)
            if isinstance(content, Refusal):
                await self._refuse(content, send)
            elif content is not None:
                await self._app(scope, _once(content, receive), send)
        finally:
            self._requests -= 1

    async def _body(self, scope: Scope, receive: Receive) -> bytes | Refusal | None:
        """The whole body; None where the client left before its end."""
        most = self._limits.body_bytes
        too_large = Refusal(
            413, f"the body is larger than {most:,} bytes; send less (--body-bytes)."
        )
        claimed = _header(scope, b"content-length")
        if claimed.isdigit() and len(claimed) < 20 and int(claimed) > most:
            return too_large
        content = b""
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                while True:
                    event = await receive()
                    if event["type"] == "http.disconnect":
                        return None
                    content += event.get("body", b"")
                    if len(content) > most:
                        return too_large
                    if not event.get("more_body"):
                        return content
        except TimeoutError:
            return Refusal(
                400,
                f"the body did not arrive within {self._limits.body_seconds:g} s; send it faster (--body-seconds).",
            )

    async def _socket(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._foreign(scope)
        offered = scope.get("subprotocols", [])
        if refusal is None and (refusal := self._unknown(scope)) is not None and PLAIN in offered:
            self.refused += 1
            await receive()
            await send({"type": "websocket.accept", "subprotocol": PLAIN})
            await send(
                {"type": "websocket.close", "code": WRONG_TOKEN, "reason": "the token is wrong"}
            )
            return
        if refusal is not None:
            await receive()
            await self._refuse(refusal, send, kind="websocket.http.response")
            return
        await self._app(scope, receive, send)

    def _foreign(self, scope: Scope) -> Refusal | None:
        """403 for a request that was meant for another host, or that a page of another origin makes."""
        host = _header(scope, b"host")
        if not self._own(_hostname(host)):
            return Refusal(
                403, "this server does not go by the name in the Host header; start it with --name."
            )
        origin = _header(scope, b"origin").lower()
        if origin and origin not in (f"http://{host.lower()}", f"https://{host.lower()}"):
            return Refusal(
                403, "pages of other origins may not use this server; open its own page."
            )
        return None

    def _own(self, name: str) -> bool:
        if name in self._admitted.names:
            return True
        try:
            return self._admitted.any_address and bool(ipaddress.ip_address(name))
        except ValueError:
            return False

    def _unknown(self, scope: Scope) -> Refusal | None:
        """401 unless the token, if there is one, stands in the Authorization header or among the subprotocols."""
        token = self._admitted.token
        if token is None or (scope["type"] == "http" and scope["path"] in OPEN):
            return None
        kind, _, given = _header(scope, b"authorization").partition(" ")
        offers = [given.strip()] if kind.lower() == "bearer" else []
        prefix = f"{PLAIN}."
        offers += [
            each.removeprefix(prefix)
            for each in scope.get("subprotocols", [])
            if each.startswith(prefix)
        ]
        known = [
            hmac.compare_digest(each.encode("utf-8", "replace"), token.encode()) for each in offers
        ]
        if any(known):
            return None
        return Refusal(401, "the token is missing or wrong; send Authorization: Bearer TOKEN.")

    async def _refuse(self, refusal: Refusal, send: Send, kind: str = "http.response") -> None:
        self.refused += 1
        content = error_body(refusal.message)
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(content)).encode()),
            (b"connection", b"close"),
        ]
        if refusal.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        await send({"type": f"{kind}.start", "status": refusal.status, "headers": headers})
        await send({"type": f"{kind}.body", "body": content})


def error_body(message: str) -> bytes:
    """The JSON of a refusal."""
    return json.dumps({"error": {"message": message}}).encode()


def _header(scope: Scope, name: bytes) -> str:
    return next((value for key, value in scope["headers"] if key == name), b"").decode("latin-1")


def _hostname(host: str) -> str:
    """The name in a Host header, without its port and the brackets of an address; empty where there is none."""
    found = HOST.fullmatch(host.lower())
    return (found[1] or found[2]) if found else ""


def _once(content: bytes, receive: Receive) -> Receive:
    """Gives the body that was read, then what `receive` gives."""
    given = False

    async def receive_body() -> MutableMapping[str, Any]:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": content, "more_body": False}

    return receive_body
