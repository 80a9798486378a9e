"""How long jax has been compiling, and a word to the user while it does."""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator

from packforcing_jax.io import compilation_cache

PATIENCE = 1.0  # seconds of one program before a word is said
LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"  # behind it XLA begins
COMPILED = "/jax/core/compile/backend_compile_duration"
SPANS = ("/jax/core/compile/jaxpr_trace_duration", LOWERED, COMPILED)
_spans: list[tuple[float, float]] = []  # that do not overlap, in the order of their ends


def seconds() -> float:
    """Seconds that went into tracing, lowering and compiling inside `told`, in this process."""
    return sum(end - start for start, end in _spans)


def add(start: float, end: float) -> None:
    """Counts a span of time once, whatever lies inside it: functions are traced inside functions."""
    while _spans and _spans[-1][0] >= start:
        _spans.pop()
    start = max(start, _spans[-1][1]) if _spans else start
    if end > start:
        _spans.append((start, end))


@contextlib.contextmanager
def told(sentence: Callable[[], str]) -> Iterator[None]:
    """While inside, compiling is counted, and where a program takes long `sentence` is printed on stderr, once each."""
    import jax

    said: set[str] = set()
    waiting: list[threading.Timer] = []

    def say(since: float) -> None:
        text = sentence()
        if text not in said and not compilation_cache.read_since(since):
            said.add(text)
            write(text)

    def heard(event: str, start_time: float, end_time: float, **kwargs: str | int) -> None:
        del kwargs
        if event in SPANS:
            add(start_time, end_time)
        if event == LOWERED:
            timer = threading.Timer(PATIENCE, say, [end_time])
            timer.daemon = True
            timer.start()
            waiting.append(timer)
        elif event == COMPILED and waiting:
            waiting.pop().cancel()

    jax.monitoring.register_event_time_span_listener(heard)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_time_span_listener(heard)
        for timer in waiting:
            timer.cancel()


def line(verb: str, what: str) -> str:
    """The sentence about `what` is compiled; that this is for once only where jax keeps programs."""
    once = " (first run only)" if compilation_cache.in_use() else ""
    return f"{verb}: compiling {what}{once}"


def write(text: str) -> None:
    """A line on stderr, above the bars that stand there."""
    if sys.stderr.isatty():
        import tqdm

        tqdm.tqdm.write(text, file=sys.stderr)
    else:
        print(text, file=sys.stderr, flush=True)
