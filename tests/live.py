"""A server in a thread of this process, and clients that speak its protocol byte by byte."""

import contextlib
import json
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from unittest import mock

from websockets.sync.client import connect

from packforcing_jax.io import atomic
from packforcing_jax.live import app, gate, serving
from packforcing_jax.live.hub import Hub
from packforcing_jax.live.limits import Limits
from packforcing_jax.live.models import Models
from packforcing_jax.live.runner import Runner

PROMPT = "a coral disc walks"
OTHER = "with guest star"


@dataclass
class Served:
    """Where the server listens, and what is behind it."""

    port: int
    hub: Hub
    server: app.Server

    @property
    def base(self):
        return f"http://127.0.0.1:{self.port}"

    def ask(self, method, path, body=None, headers=(), raw=None):
        """(status, JSON or bytes, headers) of a request."""
        data = raw if raw is not None else None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.base + path, data=data, method=method, headers=dict(headers)
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return _read(answer)
        except urllib.error.HTTPError as error:
            return _read(error)

    def begin(self, prompt=None, **fields):
        """The id of a new session."""
        status, said, _ = self.ask("POST", "/v1/sessions", {"prompt": prompt or PROMPT, **fields})
        assert status == 201, said
        return said["id"]

    def watch(self, session, **options):
        """A client of a session."""
        return Client(
            connect(
                f"ws://127.0.0.1:{self.port}/v1/sessions/{session}/live",
                max_size=None,
                compression=None,
                **options,
            )
        )

    def facts(self, session):
        return self.ask("GET", f"/v1/sessions/{session}")[1]

    def until(self, holds, seconds=60):
        """Waits until something holds."""
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, "it did not come to hold"
            time.sleep(0.02)


def _read(answer):
    content = answer.read()
    kind = answer.headers.get("content-type", "")
    return (
        answer.status,
        json.loads(content) if kind == "application/json" else content,
        answer.headers,
    )


class Client:
    """A socket that keeps all it was sent: `said` in order, `blocks` by number."""

    def __init__(self, connection):
        self._connection = connection
        self.said = []
        self.blocks = {}

    def __enter__(self):
        self.socket = self._connection.__enter__()
        return self

    def __exit__(self, *error):
        self._connection.__exit__(*error)

    def say(self, **message):
        self.socket.send(json.dumps(message))

    def hear(self, seconds=60):
        """The next message; a block's images are put away, and said to be there."""
        message = json.loads(self.socket.recv(timeout=seconds))
        self.said.append(message)
        if message["type"] == "block":
            self.blocks[message["index"]] = self.socket.recv(timeout=seconds)
            self.say(type="have", block=message["index"])
        return message

    def until(self, seconds=60, **wanted):
        """The first message from here on that says this."""
        while True:
            message = self.hear(seconds)
            if all(message.get(key) == value for key, value in wanted.items()):
                return message


@contextlib.contextmanager
def serving_of(pipeline, root, *, token=None, names=(), host="127.0.0.1", **bounds):
    """A server on a free port, as fast as it can unless `pace` is given."""
    limits = Limits(**{"pace": 0.0, **bounds})
    hub = Hub(root, Models(pipeline), limits)
    runner = Runner(hub)
    behind = app.Server(hub, runner)
    listener = serving.listening("127.0.0.1", 0)
    admitted = gate.admission(host, tuple(names), token)
    served = serving.server(app.make(behind, admitted), limits)
    thread = threading.Thread(target=served.run, kwargs={"sockets": [listener]}, daemon=True)
    quick = mock.patch.object(atomic, "_fsync", return_value=None)  # no disk is lost here
    quick.start()
    thread.start()
    try:
        while not served.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield Served(listener.getsockname()[1], hub, behind)
    finally:
        served.should_exit = True
        thread.join(30)
        listener.close()
        quick.stop()
        assert not thread.is_alive()
