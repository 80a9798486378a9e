"""The names that settings of text may have, and the refusal of all others."""

from packforcing_jax.errors import require

DTYPES = ("float32", "bfloat16", "float16")
AT_PROMPT_CHANGE = ("keep", "recache", "flush", "cut")  # what a new prompt does to the memory
KEEPS_TOKENS = ("keep", "cut")  # those of them that a memory of single tokens can be put to
CHOICES = {
    "cache.rope_adjustment": ("sink", "incremental", "sink_only", "none"),
    "cache.span": ("true", "fit"),
    "cache.token_positions": ("none", "token", "segment"),
    "cache.scope": ("layer", "shared"),
    "cache.timing": ("first", "late", "every"),
    "cache.registry": ("per_layer", "shared"),
    "cache.archive": ("device", "host"),
    "compressor.branches": ("both", "hr", "lr", "own"),
    "compressor.positions": ("stretched", "native"),
    "compressor.keys": ("blocks", "projected", "unmodulated"),
    "sample.prediction": ("velocity", "clean"),
    "train.history": ("memory", "clean", "noisy"),
    "train.remat": ("layers", "blocks"),
    **{f"dtypes.{name}": DTYPES for name in ("params", "compute", "cache", "vae", "text")},
}

RENAMED = {  # keys of earlier versions, and what they are called now
    "cache.trained": "cache.max_position",
    "compressor.places": "compressor.positions",
    "train.trained": "train.trainable",
    "train.negative": "train.negative_prompt",
    "train.distil.low": "train.distil.min_timestep",
    "train.distil.high": "train.distil.max_timestep",
}

GONE = {  # keys of earlier versions that have no other name, and what to do instead
    "cache.spare": "the memory keeps recent frames and the block at hand alone; leave it out or raise cache.recent.",
}


def require_choices(group: str, settings: object) -> None:
    """Raises `InputError` for the first field of the dataclass `settings` that is none of its `CHOICES`."""
    for key, allowed in CHOICES.items():
        owner, name = key.split(".")
        if owner == group:
            value = getattr(settings, name)
            require(
                value in allowed, f"{key}={value!r} is unknown; choose one of {', '.join(allowed)}."
            )
