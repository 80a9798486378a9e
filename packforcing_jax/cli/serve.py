"""`packforcing serve`: live sessions with a page, sockets and an HTTP side, kept on disk."""

import argparse
import contextlib
import dataclasses
import importlib.util
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from packforcing_jax.cli import common
from packforcing_jax.errors import require, shown
from packforcing_jax.io import append_file, ffmpeg, locks
from packforcing_jax.live.limits import Limits, flag

if TYPE_CHECKING:
    from packforcing_jax.live.models import Models

NEEDED = ("starlette", "uvicorn", "websockets")  # of the extra `web`


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `serve`."""
    parser.add_argument(
        "--weights", metavar="DIR", help="model folder (default: the Stage model that ships)"
    )
    parser.add_argument(
        "--host",
        metavar="NAME",
        default="127.0.0.1",
        help="address to listen on; any but a local one needs --token-file (default: 127.0.0.1)",
    )
    parser.add_argument(
        "--port", type=int, default=8000, help="0: any that is free (default: 8000)"
    )
    parser.add_argument(
        "--root",
        metavar="DIR",
        default="out/live",
        help="where sessions and videos are kept (default: out/live)",
    )
    parser.add_argument(
        "--token-file", metavar="FILE", help="a file with the token that clients must send"
    )
    parser.add_argument(
        "--name",
        metavar="NAME",
        action="append",
        default=[],
        help="another name that this server goes by in the Host header; may be repeated",
    )
    parser.add_argument(
        "--method", metavar="NAME", help="method of sessions that name none (default: the model's)"
    )
    parser.add_argument(
        "--memory", metavar="PROFILE", help="another memory than the model's own, such as no-mid"
    )
    parser.add_argument(
        "--anyway",
        action="store_true",
        help="try even what seems to need more memory than there is",
    )
    bounds = parser.add_argument_group("bounds")
    for field in dataclasses.fields(Limits):
        kind = type(field.default)
        bounds.add_argument(
            flag(field),
            type=kind,
            default=field.default,
            choices=field.metadata.get("choices"),
            metavar=None if kind is str else "N",
            help=f"{field.metadata['meaning']} (default: {field.default})",
        )
    common.add_experiment_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Serves until it is interrupted. Everything that can be wrong is looked at before the model is loaded."""
    for package in NEEDED:
        require(
            importlib.util.find_spec(package) is not None,
            f"packforcing serve needs {package}, which is not installed; install packforcing-jax[web].",
        )
    from packforcing_jax.live import gate, serving

    limits = Limits(**{each.name: getattr(args, each.name) for each in dataclasses.fields(Limits)})
    require(
        0 <= args.port < 65536,
        f"--port {shown(args.port)} is no port; give 1 to 65535, or 0 for any that is free.",
    )
    token = gate.read_token(args.token_file) if args.token_file else None
    admitted = gate.admission(args.host, tuple(args.name), token)
    append_file.check_folder(args.root, "--root")
    common.require_model_folder(args.weights)
    ffmpeg.require_encoder()
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(serving.listening(args.host, args.port))
        stack.enter_context(locks.held([("--root", args.root)]))
        models = _models(args)
        from packforcing_jax.live import app, hub, runner

        logging.basicConfig(format="serve: %(message)s", level=logging.INFO, stream=sys.stderr)
        sessions = hub.Hub(Path(args.root), models, limits)
        for said in sessions.lost:
            print(f"serve: {said}", file=sys.stderr)
        server = app.Server(sessions, runner.Runner(sessions))
        host, port = listener.getsockname()[:2]
        named = f"[{host}]" if ":" in host else host
        held = len(sessions.of("sessions"))
        print(
            f"serve: http://{named}:{port}/  {held} sessions in {args.root}; Ctrl-C ends it",
            file=sys.stderr,
            flush=True,
        )
        serving.server(app.make(server, admitted), limits).run(sockets=[listener])
    return 0


def _models(args: argparse.Namespace) -> "Models":
    """The model, once there is memory for it."""
    from packforcing_jax.io import model_folder
    from packforcing_jax.live import models
    from packforcing_jax.plan import memory_fit
    from packforcing_jax.policies import attention
    from packforcing_jax.sampling import pipeline

    config = common.load_experiment(args.config) if args.config else None
    exp = config or model_folder.opened(args.weights or pipeline.SHIPPED).experiment
    exp = pipeline.with_overrides(exp, args.memory, args.overrides, args.method)
    if not args.anyway:
        memory_fit.require_fits(exp)
    loaded = models.Models(
        pipeline.Pipeline.from_pretrained(
            args.weights,
            experiment=config,
            memory=args.memory,
            overrides=args.overrides,
            method=args.method,
        )
    )
    models.require_shape(loaded)
    backend, why = attention.resolve(exp.attention, exp.dtypes.cache)
    common.start_line("serve", experiment=exp, dtype=exp.dtypes.compute, attention=backend, why=why)
    return loaded
