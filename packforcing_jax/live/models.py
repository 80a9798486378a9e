"""The model of a server, and its variants: one set of weights under other memories and methods."""

import json
import threading
from typing import Any

from packforcing_jax import methods
from packforcing_jax.config import PROFILES
from packforcing_jax.config.choices import AT_PROMPT_CHANGE
from packforcing_jax.errors import require
from packforcing_jax.io import video
from packforcing_jax.live import images
from packforcing_jax.live.store import About
from packforcing_jax.methods.method import require_blocks
from packforcing_jax.networks import tokenizer
from packforcing_jax.sampling import requests, state_folder
from packforcing_jax.sampling.pipeline import Pipeline
from packforcing_jax.stage import captions

EXAMPLE = captions.Prompt(colour=0, shape=0, speed=0, backdrop=0, scene=0)
SPECIAL = {tokenizer.PAD, tokenizer.END, tokenizer.UNKNOWN}


class Models:
    """A pipeline, and what a server says of all that it makes."""

    def __init__(self, pipeline: Pipeline):
        exp = pipeline.experiment
        require_blocks(pipeline.method, "a live session")
        (width, height), scale = requests.shown_size(exp)
        self.media = images.media_of(scale)
        self.shape = video.picture_of((width, height), scale, exp.fps)
        self.digest = state_folder.digest(pipeline)
        self.block_seconds = exp.cache.block * exp.codec.time_factor / exp.fps
        self.picture = {
            "block_frames": exp.cache.block * exp.codec.time_factor,
            "fps": exp.fps,
            "width": width,
            "height": height,
        }
        known = pipeline.tokenizer.inner.get_vocab() if pipeline.tokenizer.closed else {}
        self.vocabulary = sorted(set(known) - SPECIAL)
        stage = captions.tells(exp)
        self.example = captions.write(EXAMPLE) if stage else (*self.vocabulary, "a street")[0]
        self.of_server = pipeline
        self._variants: dict[tuple[str | None, str | None], Pipeline] = {(None, None): pipeline}
        self._lock = threading.Lock()

    def of(self, about: About) -> Pipeline:
        """The model as a session uses it; raises `InputError` for a memory or method that it has not."""
        key = about.memory, about.method
        with self._lock:
            if key not in self._variants:
                model = self.of_server
                if about.method is not None:
                    model = model.with_method(about.method)
                    require_blocks(model.method, "a live session")
                if about.memory is not None:
                    model = model.with_memory(about.memory)
                self._variants[key] = model
            return self._variants[key]

    def check(self, about: About, prompt: str, policy: str | None = None) -> None:
        """Raises `InputError` for a prompt that this model does not read, or a policy that its memory cannot follow."""
        model = self.of(about)
        model.check([prompt])
        requests.check_changes(model.experiment, {} if policy is None else {1: policy})
        if about.target is not None:
            requests.require_length(model.method, model.experiment, about.target)

    def blocks_of(self, seconds: float) -> int:
        """Blocks of a video."""
        return requests.blocks_of(self.of_server.experiment, seconds)

    def settings(self, about: About) -> str:
        """What stands inside a video, as JSON."""
        model = self.of(about)
        return json.dumps(
            {
                "experiment": model.experiment.name,
                "weights": self.digest,
                "method": model.method.name,
                "memory": about.memory,
                "seed": about.seed,
                "session": about.id,
            }
        )

    def facts(self) -> dict[str, Any]:
        """What a client may want to know before it begins a session."""
        model = self.of_server
        return {
            "model": model.experiment.name,
            **self.picture,
            "media": self.media,
            "method": model.method.name,
            "methods": sorted(
                name for name, each in methods.METHODS.items() if not each.whole_clip
            ),
            "memories": sorted(PROFILES) if model.method.own_memory else [],
            "policies": list(AT_PROMPT_CHANGE),
            "vocabulary": self.vocabulary or None,
            "example": self.example,
        }


def require_shape(models: Models) -> None:
    """Raises `InputError` unless videos of these frames can be made."""
    shape = models.shape
    require(shape.width > 0, "the model makes no frames; give another one.")
    video.check_size((shape.width, shape.height), shape.scale)
