"""VBench's own environment: making it, and processes in it, each with a time limit and, unless allowed, no network.

`python -m packforcing_jax.evaluation.vbench_process PATH` makes it.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from packforcing_jax.errors import InputError, MachineError, require, sentence

DRIVER = Path(__file__).with_name("vbench_driver.py")
VERSIONS = Path(__file__).with_name("vbench.txt")
PYTHON = "python3.11"  # for which the versions are complete
BASE = ("setuptools==", "torch==", "torchvision==")  # installed first, with what they depend on
MAKE = "python -m packforcing_jax.evaluation.vbench_process"
INSPECTION = 600.0  # seconds for the versions and the sizes of all videos
CLOSED = "http://127.0.0.1:9"  # where no proxy listens: wget, git and urllib fail at once
PROXIES = ("http_proxy", "https_proxy", "ftp_proxy", "all_proxy")
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
PLACES = {  # variables and the folders of a process's room that they name
    "HOME": "home",
    "XDG_CACHE_HOME": "home/.cache",
    "TMPDIR": "tmp",
    "VBENCH_CACHE_DIR": "cache/vbench",
    "TORCH_HOME": "cache/torch",
}
ALONE = ("-I", "-B")  # nothing of ours on its path, no files beside code in the caches
TAIL = 4000  # bytes of a log in which its last line is looked for


class Failure(NamedTuple):
    """Why a process gave no answer; `late`: it was ended at the time limit."""

    reason: str
    late: bool = False


@dataclasses.dataclass(frozen=True)
class Host:
    """Starts processes of another environment's `python` in the folder `room`; what they print goes into `logs`.

    Where the network is allowed they use `caches` (the variables VBENCH_CACHE_DIR and TORCH_HOME), so that what is
    fetched is kept; elsewhere the caches in `room` (see `PLACES`).
    """

    python: Path
    room: Path
    logs: Path
    allow_network: bool
    caches: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def inspect(self, videos: Sequence[Path]) -> dict:
        """What `vbench_driver.inspect` answers; `InputError` if the environment cannot."""
        request = {"action": "inspect", "videos": [str(path) for path in videos]}
        answer = self.ask("inspect", request, INSPECTION)
        if isinstance(answer, Failure):
            raise InputError(f"the environment of {self.python} cannot be used: {answer.reason}.")
        require(
            answer["versions"].get("vbench") is not None,
            f"the environment of {self.python} has no vbench; make one with {MAKE} PATH.",
        )
        return answer

    def ask(self, name: str, request: Mapping, limit: float) -> dict | Failure:
        """The answer of one process, or why there is none."""
        asked = self.room / "request.json"
        answer = self.room / "answer.json"
        answer.unlink(missing_ok=True)
        asked.write_text(json.dumps(request), encoding="utf-8")
        path = self.logs / f"{name}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        command = [str(self.python), *ALONE, str(DRIVER), str(asked), str(answer)]
        with path.open("ab") as log:
            status = _ended(command, self.room, self.variables(), log, limit)
        where = f"its log is {path}"
        if status is None:
            return Failure(f"no answer within {limit:g} seconds (--time-limit); {where}", late=True)
        try:
            said = json.loads(answer.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return Failure(f"{_ending(status)} and no answer ({_last_line(path)}); {where}")
        return Failure(f"{sentence(str(said['error']))}; {where}") if "error" in said else said

    def variables(self) -> dict[str, str]:
        """The variables of a process: nothing of ours on its path, and no way out unless it is allowed."""
        mine = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        if self.allow_network:
            return {**mine, **self.caches}
        closed = {each: CLOSED for name in PROXIES for each in (name, name.upper())}
        for name in ("no_proxy", "NO_PROXY"):
            mine.pop(name, None)
        for place in PLACES.values():
            (self.room / place).mkdir(parents=True, exist_ok=True)
        inside = {key: str(self.room / place) for key, place in PLACES.items()}
        return {**mine, **closed, **OFFLINE, **inside}


def interpreter(environment: Path) -> Path:
    """The Python of an environment, which is given as that file or as its folder."""
    python = environment / "bin" / "python" if environment.is_dir() else environment
    require(
        python.is_file() and os.access(python, os.X_OK),
        f"--environment {environment} has no Python that starts; make one with {MAKE} {environment}.",
    )
    return (
        python.absolute()
    )  # not resolved: the link is what makes it the Python of its environment


def make_environment(path: Path, python: str = PYTHON) -> None:
    """Makes a virtual environment with the versions in `vbench.txt`; nothing of it stays if that fails."""
    require(
        not path.exists(),
        f"{path} is there already; remove it or choose another.",
    )
    found = shutil.which(python)
    if found is None:
        raise InputError(
            f"{python} is not here; install it: VBench's environment is pinned for it."
        )
    pip = [str(path.absolute() / "bin" / "python"), "-m", "pip", "install", "-q", "--no-compile"]
    base = [line for line in VERSIONS.read_text().split("\n") if line.startswith(BASE)]
    steps = (
        [found, "-m", "venv", str(path.absolute())],
        [*pip, "-c", str(VERSIONS), *base],
        [*pip, "--no-deps", "-r", str(VERSIONS)],  # the list is complete; vbench asks for more
    )
    try:
        for step in steps:
            done = subprocess.run(step, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
            if done.returncode:
                said = done.stderr.decode(errors="replace").strip().split("\n")
                raise MachineError(f"{path} could not be made ({sentence(said[-1])}).")
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise


def _ended(
    command: Sequence[str], room: Path, variables: Mapping[str, str], log: IO[bytes], limit: float
) -> int | None:
    """The exit status of a process, None if it did not end in time; whatever it started ends with it."""
    try:
        process = subprocess.Popen(
            command,
            cwd=room,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        raise MachineError(f"{command[0]} does not start ({error.strerror}).") from error
    status = None
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = process.wait(limit)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return status


def _ending(status: int) -> str:
    """An exit status in words; SIGKILL is often the system's answer to a lack of memory."""
    if status >= 0:
        return f"exit code {status}"
    often = ", as when memory runs out," if -status == signal.SIGKILL else ""
    return f"ended by {signal.Signals(-status).name}{often}"


def _last_line(path: Path) -> str:
    """The last thing that a log says."""
    with path.open("rb") as log:
        log.seek(max(0, path.stat().st_size - TAIL))
        said = log.read().decode(errors="replace").replace("\r", "\n").split("\n")
    return sentence(next((line for line in reversed(said) if line.strip()), "it said nothing"))


def main(words: Sequence[str]) -> int:
    """Makes the environment at the one path that is given; bad input and failures are a sentence and a code."""
    try:
        require(len(words) == 1, f"give the folder for VBench's environment: {MAKE} PATH.")
        make_environment(Path(words[0]))
    except (InputError, MachineError) as error:
        print(sentence(str(error)), file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
