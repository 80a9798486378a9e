"""How the server listens: uvicorn, set so that no client can hold a connection or fill the log for nothing."""

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from packforcing_jax.errors import InputError
from packforcing_jax.live.limits import Limits

NOISE = (  # what uvicorn says as errors, with tracebacks, of handshakes that were refused and of text that is none
    "ASGI callable returned without completing handshake.",
    "Invalid UTF-8 sequence received from client.",
    "Invalid HTTP request received.",
)
KEPT_ALIVE = 30.0  # seconds between two requests of one connection
LINGERING = 10.0  # seconds that a socket whose client is gone has to take what is on its way


class _Http(H11Protocol):
    """A connection on which the head of a request has to arrive in time."""

    seconds = 10.0
    _begun = True  # a request has begun and its head is not here: at first, until one is

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._look_later()

    def connection_lost(self, exc: Exception | None) -> None:
        self._look.cancel()
        super().connection_lost(exc)

    def _look_later(self) -> None:
        self._look = asyncio.get_running_loop().call_later(self.seconds, self._ended_or_not)

    def _ended_or_not(self) -> None:
        within = self.conn.their_state is h11.IDLE
        begun = within and (self.scope is None or bool(self.conn.trailing_data[0]))
        if begun and self._begun:
            self.transport.abort()
            return
        self._begun = begun
        self._look_later()


class _Socket(WebSocketsSansIOProtocol):
    """A socket whose connection ends for certain once nothing is done for it any more."""

    def on_task_complete(self, task: Any) -> None:
        super().on_task_complete(task)
        self.loop.call_later(LINGERING, self.transport.abort)


class _Quiet(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(NOISE)


def listening(host: str, port: int) -> socket.socket:
    """The socket that the server listens on; raises `InputError` for a port that is taken or not ours to take."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        sock.listen(2048)
    except OSError as error:
        sock.close()
        raise InputError(
            f"--host {host} --port {port} cannot be listened on ({error.strerror}); choose another one."
        ) from error
    return sock


def server(app: Callable[..., Awaitable[None]], limits: Limits) -> uvicorn.Server:
    """A server for `app`; `run(sockets=[...])` returns once it was told to stop."""
    quiet = _Quiet()
    for name in ("uvicorn.error", "uvicorn.asgi"):
        logger = logging.getLogger(name)
        if not any(isinstance(each, _Quiet) for each in logger.filters):
            logger.addFilter(quiet)
    http = type("_HttpInTime", (_Http,), {"seconds": limits.body_seconds})
    config = uvicorn.Config(
        app,
        http=http,
        ws=_Socket,
        ws_max_size=limits.message_bytes,
        ws_per_message_deflate=False,
        lifespan="on",
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_keep_alive=int(KEPT_ALIVE),
        timeout_graceful_shutdown=3,
        h11_max_incomplete_event_size=2**14,
        proxy_headers=False,
    )
    return uvicorn.Server(config)
