"""The routes: HTTP for programs, a socket for those who watch, one page. Nothing here waits for a model or a disk."""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import anyio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from packforcing_jax.errors import InputError, MachineError, sentence, shown
from packforcing_jax.live import protocol
from packforcing_jax.live.gate import PLAIN, Admission, Gate, error_body
from packforcing_jax.live.hub import Hub, Live, Refused, Told
from packforcing_jax.live.runner import Runner
from packforcing_jax.live.watchers import Gone, Shot, Watcher

log = logging.getLogger("packforcing.live")
Result = TypeVar("Result")

PAGE = Path(__file__).parent / "page"
FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/live.js": ("live.js", "text/javascript; charset=utf-8"),
    "/style.css": ("style.css", "text/css; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
SECURE = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}
CLOSING = 2.0  # seconds that a socket is given to close
DELETED, FAREWELL = 4404, 4408  # close codes: the session is not there, the client took nothing


class Server:
    """A hub and its runner behind routes."""

    def __init__(self, hub: Hub, runner: Runner):
        self.hub = hub
        self.runner = runner
        self.clients = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        hub.told = self._told

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """The runner makes blocks as long as the server answers."""
        self._loop = asyncio.get_running_loop()
        self.runner.start()
        yield
        await asyncio.to_thread(self.runner.stop)

    def _told(self, live: Live, told: list[Told]) -> None:
        """From any thread: what happened, to the watchers of a session."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_deliver, live, told)

    # HTTP

    async def health(self, request: Request) -> Response:
        return _json({"status": "ok"})

    async def model(self, request: Request) -> Response:
        return _json(await _aside(self.hub.models.facts))

    async def file(self, request: Request) -> Response:
        name, kind = FILES[request.url.path]
        return FileResponse(PAGE / name, media_type=kind, headers=SECURE)

    async def begin(self, request: Request) -> Response:
        wish = protocol.body(protocol.NewSession, await request.body())
        return _json(await _aside(lambda: self.hub.facts(self.hub.begin(wish))), 201)

    async def sessions(self, request: Request) -> Response:
        return _json(
            {"sessions": await _aside(lambda: [*map(self.hub.facts, self.hub.of("sessions"))])}
        )

    async def session(self, request: Request) -> Response:
        live = self._session(request)
        return _json(await _aside(lambda: self.hub.facts(live)))

    async def delete(self, request: Request) -> Response:
        await _aside(lambda: self.hub.delete("sessions", request.path_params["id"]))
        return Response(status_code=204)

    async def fork(self, request: Request) -> Response:
        live = self._session(request)
        wish = protocol.body(protocol.Fork, await request.body())
        return _json(await _aside(lambda: self.hub.facts(self.hub.fork(live, wish.at))), 201)

    async def block(self, request: Request) -> Response:
        live = self._session(request)
        number = request.path_params["block"]
        index = int(number) if number.isascii() and number.isdigit() and len(number) < 9 else -1
        if not 0 <= index < live.next:
            raise Refused(
                404, f"there is no block {shown(number, 40)}; this session has {live.next} of them."
            )
        try:
            content = await _aside(lambda: live.folder.images(index))
        except FileNotFoundError:
            raise Refused(404, f"block {index} was taken back just now.") from None
        return Response(content, media_type="application/octet-stream", headers=SECURE)

    async def video(self, request: Request) -> Response:
        return await self._video(self._session(request))

    async def _video(self, live: Live) -> Response:
        blocks = live.next
        if blocks == 0:
            raise Refused(409, "no block is finished yet; ask again.")
        size = await _aside(lambda: live.folder.video_bytes(blocks))
        headers = {
            "content-length": str(size),
            "content-disposition": f'attachment; filename="{live.about.id}.mp4"',
        }
        return StreamingResponse(
            live.folder.video(blocks), media_type="video/mp4", headers=SECURE | headers
        )

    async def order(self, request: Request) -> Response:
        wish = protocol.body(protocol.NewVideo, await request.body())
        return _json(await _aside(lambda: self.hub.status(self.hub.order(wish))), 202)

    async def videos(self, request: Request) -> Response:
        return _json({"videos": [*map(self.hub.status, self.hub.of("videos"))]})

    async def status(self, request: Request) -> Response:
        return _json(self.hub.status(self.hub.get("videos", request.path_params["id"])))

    async def content(self, request: Request) -> Response:
        live = self.hub.get("videos", request.path_params["id"])
        status = self.hub.status(live)["status"]
        if status != "completed":
            raise Refused(
                409, f"this video is {status}; its content can be had once it is completed."
            )
        return await self._video(live)

    async def cancel(self, request: Request) -> Response:
        await _aside(lambda: self.hub.delete("videos", request.path_params["id"]))
        return Response(status_code=204)

    def _session(self, request: Request) -> Live:
        return self.hub.get("sessions", request.path_params["id"])

    # The socket

    async def live(self, socket: WebSocket) -> None:
        """A client of a session, from its handshake to its end."""
        refusal = self._refusal(socket)
        if refusal is not None:
            await socket.send_denial_response(_json_error(*refusal))
            return
        live = self.hub.get("sessions", socket.path_params["id"])
        self.clients += 1
        watcher = Watcher(self.hub.limits.patience)
        try:
            offered = socket.scope.get("subprotocols", [])
            await socket.accept(PLAIN if PLAIN in offered else None)
            watcher.tell(self._hello(live))
            live.watchers.add(watcher)
            live.due = 0.0
            self.runner.wake()
            await self._watched(socket, live, watcher)
        finally:
            live.watchers.discard(watcher)
            self.clients -= 1

    def _refusal(self, socket: WebSocket) -> tuple[int, str] | None:
        most = self.hub.limits.clients
        if self.clients >= most:
            return 429, f"{most} clients are watching; wait until one leaves (--clients)."
        try:
            self.hub.get("sessions", socket.path_params["id"])
        except Refused as error:
            return error.status, str(error)
        return None

    def _hello(self, live: Live) -> dict[str, Any]:
        return {
            "type": "hello",
            "media": self.hub.models.media,
            **self.hub.models.picture,
            "block": live.next,
            "state": live.state if live.state != "waiting" else "running",  # from now on
        }

    async def _watched(self, socket: WebSocket, live: Live, watcher: Watcher) -> None:
        """Speaks and listens until one of both ends; what the client does wrong ends neither."""
        tasks = {
            asyncio.create_task(watcher.send_all(_sender(socket))),
            asyncio.create_task(self._listen(socket, live, watcher)),
        }
        done, left = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        code, reason = 1000, ""
        for task in done:
            match task.exception():
                case Gone() as gone:
                    code, reason = FAREWELL, str(gone)
                    log.info("session %s: a client counts as gone: %s", live.about.id, gone)
                case None | WebSocketDisconnect():
                    pass
                case error:
                    raise error
        if live.gone:
            code, reason = DELETED, "this session was deleted."
        with contextlib.suppress(RuntimeError, OSError, TimeoutError, WebSocketDisconnect):
            await asyncio.wait_for(socket.close(code, reason), CLOSING)

    async def _listen(self, socket: WebSocket, live: Live, watcher: Watcher) -> None:
        while True:
            event = await socket.receive()
            if event["type"] == "websocket.disconnect" or live.gone:
                return
            text = event.get("text")
            try:
                await self._heard(live, watcher, protocol.message(_required(text)))
            except (InputError, MachineError, OSError) as error:
                watcher.wrong += 1
                said = sentence(str(error))
                await watcher.answer({"type": "error", **_ref(text), "message": said})

    async def _heard(self, live: Live, watcher: Watcher, message: protocol.Message) -> None:
        """Does what a client wishes, and answers it."""
        hub = self.hub
        match message:
            case protocol.Have():
                watcher.have(message.block)
                if message.ref is not None:
                    await watcher.answer({"type": "received", "ref": message.ref})
            case protocol.Prompt():
                for told in await _aside(lambda: hub.prompt(live, message, watcher)):
                    await watcher.answer(dict(told.what))  # type: ignore[arg-type]
            case protocol.Pause() | protocol.Resume():
                await watcher.answer({"type": "received", "ref": message.ref})
                paused = isinstance(message, protocol.Pause)
                block = await _aside(lambda: hub.pause(live, paused))
                await watcher.answer({"type": "applied", "ref": message.ref, "block": block})
            case protocol.Rewind():
                await watcher.answer({"type": "received", "ref": message.ref})
                await _aside(lambda: hub.rewind(live, message.to))
                await watcher.answer({"type": "applied", "ref": message.ref, "block": message.to})


def _required(text: str | None) -> str:
    if text is None:
        raise InputError(
            'a message is binary, and clients send text; send one JSON object, such as {"type": "pause"}.'
        )
    return text


def _ref(text: str | None) -> dict[str, Any]:
    ref = protocol.ref_of(text) if text is not None else None
    return {} if ref is None else {"ref": ref}


def _deliver(live: Live, told: list[Told]) -> None:
    """In the event loop."""
    for what, to in told:
        everyone = to is None or to not in live.watchers
        for watcher in tuple(live.watchers) if everyone else (to,):
            assert watcher is not None
            if isinstance(what, Shot):
                watcher.show(what)
            elif what["type"] == "rewound":
                watcher.rewound(what["to"])
            else:
                watcher.tell(what)
    if live.gone:
        for watcher in live.watchers:
            watcher.end()


def _sender(socket: WebSocket) -> Callable[[str | bytes], Awaitable[None]]:
    async def say(content: str | bytes) -> None:
        if isinstance(content, str):
            await socket.send_text(content)
        else:
            await socket.send_bytes(content)

    return say


async def _aside(work: Callable[[], Result]) -> Result:
    """What `work` returns, done in a thread beside the loop; once begun it is done to its end."""
    return await anyio.to_thread.run_sync(work)


def _json(content: Any, status: int = 200) -> Response:
    return Response(
        json.dumps(content), status_code=status, media_type="application/json", headers=SECURE
    )


def _json_error(status: int, message: str) -> Response:
    return Response(
        error_body(message), status_code=status, media_type="application/json", headers=SECURE
    )


async def _refused(request: Request, error: Exception) -> Response:
    """Failures as the contract's codes and one sentence."""
    match error:
        case Refused():
            return _json_error(error.status, sentence(str(error)))
        case InputError():
            return _json_error(400, sentence(str(error)))
        case MachineError() | OSError():
            log.error("%s %s: %s", request.method, request.url.path, error)
            return _json_error(500, sentence(str(error)))
    return _json_error(
        404,
        f"there is no {shown(request.method, 20)[1:-1]} {shown(request.url.path, 80)}; docs/live.md "
        "lists what there is.",
    )


def make(server: Server, admitted: Admission) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
    """The ASGI application."""
    one, video = "/v1/sessions/{id}", "/v1/videos/{id}"
    routes: list[Route | WebSocketRoute] = [
        *(Route(path, server.file, methods=["GET"]) for path in FILES),
        Route("/health", server.health, methods=["GET"]),
        Route("/v1/model", server.model, methods=["GET"]),
        Route("/v1/sessions", server.begin, methods=["POST"]),
        Route("/v1/sessions", server.sessions, methods=["GET"]),
        Route(one, server.session, methods=["GET"]),
        Route(one, server.delete, methods=["DELETE"]),
        Route(f"{one}/fork", server.fork, methods=["POST"]),
        Route(f"{one}/video.mp4", server.video, methods=["GET"]),
        Route(f"{one}/blocks/{{block}}", server.block, methods=["GET"]),
        Route("/v1/videos", server.order, methods=["POST"]),
        Route("/v1/videos", server.videos, methods=["GET"]),
        Route(video, server.status, methods=["GET"]),
        Route(video, server.cancel, methods=["DELETE"]),
        Route(f"{video}/content", server.content, methods=["GET"]),
        WebSocketRoute(f"{one}/live", server.live),
    ]
    handlers: Any = {kind: _refused for kind in (HTTPException, InputError, MachineError, OSError)}
    app = Starlette(routes=routes, exception_handlers=handlers, lifespan=server.lifespan)
    app.router.redirect_slashes = False
    return Gate(app, admitted, server.hub.limits)
