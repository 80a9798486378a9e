"""Every failure that a user can meet as (exit code, one sentence), whatever library raised it."""

import errno
import os
import re

from packforcing_jax.errors import InputError, MachineError, brief, shortened

INTERRUPTED = 130
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS}
PATHS = {  # of paths that are not as they have to be
    errno.ENOENT: "check the path",
    errno.EEXIST: "check the path",
    errno.EISDIR: "check the path",
    errno.ENOTDIR: "check the path",
    errno.EACCES: "check the path",
    errno.EPERM: "check the path",
    errno.ENAMETOOLONG: "give a shorter one",
    errno.ELOOP: "check its links",
    errno.EINVAL: "check the path",
    errno.ENXIO: "give a file",
    errno.ESPIPE: "give a file",
}
DEVICE = {
    "RESOURCE_EXHAUSTED": "the device is out of memory; lower --set cache.top or latent, or use a larger device",
    "UNAVAILABLE": "the device is not reachable any more; run `packforcing doctor`",
    "DATA_LOSS": "the device lost data; run `packforcing doctor`",
    "ABORTED": "the device stopped; run `packforcing doctor`",
    "INTERNAL": "the device failed; run `packforcing doctor`",
}
LOOP = re.compile(r"Symlink loop from '?(.+?)'?")  # what Python < 3.13 says in place of ELOOP
NO_BACKEND = re.compile(r"Unable to initialize backend|Unknown backend|no platforms? that")


def outcome(error: BaseException) -> tuple[int, str] | None:
    """(exit code, sentence) of a failure that a user can meet; None for a defect of ours, which keeps its traceback."""
    match error:
        case InputError() | MachineError():
            return error.exit_code, str(error)
        case KeyboardInterrupt():
            return INTERRUPTED, "interrupted; what was finished is kept."
        case MemoryError():
            return (
                MachineError.exit_code,
                "the machine is out of memory; choose a smaller config or free memory.",
            )
        case BrokenPipeError():
            return MachineError.exit_code, "the reader of the output went away."
        case OSError():
            return _of_system(error)
        case RuntimeError():
            return _of_links(error) or _of_device(error)
    return None


def _of_system(error: OSError) -> tuple[int, str] | None:
    """What the operating system refused."""
    if error.errno in DISK:
        where = f" ({error.filename})" if error.filename else ""
        return (
            MachineError.exit_code,
            f"cannot write{where}: {error.strerror}; free space or choose another --out.",
        )
    if error.errno in PATHS and error.filename:
        path = shortened(os.fsdecode(error.filename), 120)
        return InputError.exit_code, f"{path}: {error.strerror}; {PATHS[error.errno]}."
    return None


def _of_links(error: RuntimeError) -> tuple[int, str] | None:
    """A path that a link leads around in a circle."""
    found = LOOP.fullmatch(str(error))
    return found and (
        InputError.exit_code,
        f"{shortened(found[1], 120)}: {os.strerror(errno.ELOOP)}; {PATHS[errno.ELOOP]}.",
    )


def _of_device(error: RuntimeError) -> tuple[int, str] | None:
    """What jax says about devices."""
    said = brief(error)
    if NO_BACKEND.search(str(error)):
        asked = os.environ.get("JAX_PLATFORMS", "")
        named = f"JAX_PLATFORMS={asked} names a device that" if asked else "a device"
        return (
            InputError.exit_code,
            f"{named} is not here ({shortened(said)}); unset JAX_PLATFORMS or set it to cpu.",
        )
    status = re.match(r"[A-Z_]+", said)
    of_jax = type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError")
    if of_jax and status and status[0] in DEVICE:
        return MachineError.exit_code, f"{DEVICE[status[0]]} ({said})"
    return None
