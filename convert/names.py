"""Names of tensors and files as tools write them, as tables: which network, which part, and what is only wrapping."""

import re
from collections.abc import Iterable, Mapping
from typing import TypeAlias

Path: TypeAlias = tuple[str, ...]  # words that lead to a table of tensors

# Words in the names of tensors

NETWORKS = (  # words in front of a name, or keys of a trainer's file, that say which of several networks it belongs to
    "generator",
    "generator_ema",
    "student",
    "student_ema",
    "ema",
    "ema_model",
    "model_ema",
    "net_ema",
    "dit_ema",
    "critic",
    "discriminator",
    "fake_score",
    "real_score",
    "teacher",
    "generator_lora",
    "generator_ema_lora",
    "student_lora",
    "critic_lora",
)
SAMPLED = ("generator_ema", "generator", "student_ema", "student")  # those that may be sampled with
UNNAMED = frozenset(  # words that say of a network no more than that it is one
    ("", "model", "module", "net", "dit", "params", "weights", "state_dict", "model_state_dict")
)
MARKERS = (  # names of which every network has one
    "patch_embedding.weight",
    "patch_embedding.proj.weight",
    "encoder.conv1.weight",
    "encoder.conv_in.weight",
    "token_embedding.weight",
    "shared.weight",
)
PARTS = (  # what stands in front of the names of another part than the transformer, where one file holds all
    (re.compile(r"(?:vae|first_stage_model)\."), "vae"),
    (re.compile(r"(?:text_encoders\.[^.]+|text_encoder|cond_stage_model)\."), "text_encoder"),
)
PART_KEYS = {  # keys of such a file that holds tables in place of long names
    "vae": "vae",
    "first_stage_model": "vae",
    "text_encoder": "text_encoder",
    "text_encoders": "text_encoder",
    "cond_stage_model": "text_encoder",
}
WRAPPERS = re.compile(  # what tools for training and fine-tuning put into names, anywhere
    r"(?:^|(?<=\.))(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module|_orig_mod|base_model|"
    r"base_layer|diffusion_model|transformer|module|model)\."
)
DEEPEST = 64  # wrappers around each other
LEADING = re.compile(r"(?:pipe|dit|net|unet)\.")  # only in front: diffusers has `ffn.net`


def plain(name: str) -> str:
    """A tensor's name without what tools put around it."""
    for _ in range(DEEPEST):
        shorter = WRAPPERS.sub("", name)
        front = LEADING.match(shorter)
        shorter = shorter[front.end() :] if front else shorter
        if shorter == name:
            break
        name = shorter
    return name


def split(name: str) -> tuple[Path, str]:
    """(the words in front that say which network or part a tensor belongs to, the rest of its name).

    `generator.model.blocks.0...` is (("generator",), "model.blocks.0..."). A name without such words stays whole.
    """
    words: list[str] = []
    kept = rest = name  # kept: behind the last such word; rest: behind wrappers as well
    for _ in range(DEEPEST):
        part = next(((hit, word) for pattern, word in PARTS if (hit := pattern.match(rest))), None)
        head, dot, tail = rest.partition(".")
        if part is not None:
            return (*words, part[1]), rest[part[0].end() :]
        if dot and head in NETWORKS:
            words.append(head)
            kept = rest = tail
        elif hit := WRAPPERS.match(rest) or LEADING.match(rest):
            rest = rest[hit.end() :]
        else:
            break
    return tuple(words), kept


def raw_of(network: str) -> str | None:
    """The network that `network` is the average of by its name, "" for one without a name; None if it is no average."""
    words = network.lower().split("_")
    rest = "_".join(word for word in words if word != "ema")
    return None if "ema" not in words else "" if rest in UNNAMED else rest


def marked(table: Iterable[str]) -> bool:
    """Whether names are those of a network, whatever stands in front of them."""
    return any(name.endswith(marker) for name in table for marker in MARKERS)


def fronts(table: Iterable[str]) -> list[str]:
    """What stands in front of the names of networks that only something unknown wraps; none where one is bare."""
    hits = [(name, marker) for name in table for marker in MARKERS if name.endswith(marker)]
    if any(plain(name) == marker for name, marker in hits):
        return []
    found = {name.removesuffix(marker) for name, marker in hits}
    return sorted(front for front in found if front.endswith("."))


def part_of(path: Iterable[str]) -> str | None:
    """The part that a table is of, by the keys that lead to it: "vae", "text_encoder", or None for any other."""
    return next((PART_KEYS[key] for key in path if key in PART_KEYS), None)


# Words in the names of additions to a network (LoRA and its kin)

SIDES: tuple[tuple[re.Pattern[str], str], ...] = tuple(  # how a name ends -> what it is
    (re.compile(rf"(?P<module>.+?)(?:{ending})"), what)
    for ending, what in (
        (r"\.lora_(?:A|down)(?:\.[^.]+)?\.weight", "down"),
        (r"\.lora_(?:B|up)(?:\.[^.]+)?\.weight", "up"),
        (r"[._]lora\.down\.weight|\.lora_linear_layer\.down\.weight", "down"),
        (r"[._]lora\.up\.weight|\.lora_linear_layer\.up\.weight", "up"),
        (r"\.lora_(?:A|down)", "down"),
        (r"\.lora_(?:B|up)", "up"),
        (r"\.lora_B(?:\.[^.]+)?\.bias", "up_bias"),
        (r"\.(?:lora_)?alpha", "alpha"),
        (r"(?:\.weight)?\.diff", "diff"),
        (r"\.diff_b", "diff_b"),
        (r"\.diff_m", "diff_m"),
    )
)
ONLY_BESIDE = ("alpha",)  # endings that are an addition's only where others are in the file
OTHER_ADDITIONS: Mapping[
    str, str
] = {  # names that only other kinds of additions have -> which kind
    r".*\.(?:dora_scale|lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?)": "DoRA",
    r".*\.hada_(?:w[12]_[ab]|t[12])": "LoHa",
    r".*\.lokr_(?:w[12](?:_[ab])?|t2)": "LoKr",
    r".*\.(?:oft_diag|oft_blocks|oft_R(?:\.[^.]+)?(?:\.weight)?|boft_.*)": "OFT",
    r".*\.lora_mid\.weight": "a LoRA with a middle factor (LoCon)",
    r".*\.lora_embedding_[AB](?:\.[^.]+)?": "a LoRA of an embedding",
    r".*\.set_weight": "a replacement of whole weights",
}
FRONTS = frozenset(  # words that tools put in front of an addition's name, between dots or underscores
    "lora unet transformer diffusion model base pipe dit net student generator ema module lycoris wan default "
    "backbone denoiser".split()
)


def addition(name: str) -> tuple[str, str] | None:
    """(module, what it is) of a tensor that adds to a network, such as ("blocks.0.self_attn.q", "down")."""
    hits = ((hit["module"], what) for pattern, what in SIDES if (hit := pattern.fullmatch(name)))
    return next(hits, None)


def adds(name: str) -> bool:
    """Whether a tensor of this name adds to a network, whatever else its file holds."""
    hit = addition(name)
    return (
        hit is not None
        and hit[1] not in ONLY_BESIDE
        or name.startswith("lora_")
        or ".lora_" in name
        or any(re.fullmatch(pattern, name) for pattern in OTHER_ADDITIONS)
    )


def joined(name: str) -> str:
    """A module's name with its words joined by underscores alone, as trainers of LoRA write it."""
    return re.sub(r"[._]+", "_", name)


def found(module: str, known: Mapping[str, str]) -> str | None:
    """What `known`, by `joined` name, has for a module, whatever words tools put in front of it."""
    words = joined(module).strip("_").split("_")
    for start in range(len(words)):
        hit = known.get("_".join(words[start:]))
        if hit is not None or words[start] not in FRONTS:
            return hit
    return None


# Files beside the weights

TRAINERS = re.compile(  # state of a trainer, which is no network
    r"(?:optimizer|optim|scheduler|lr_scheduler|scaler|rng_state|random_states|training_args|trainer_state|"
    r"training_state|train_state|trainer_args|custom_checkpoint|dataloader|sampler)(?:[_-]\w+)*\.(?:bin|pt|pth|ckpt|pkl|json|safetensors)"
)
OF_MACOS = re.compile(r"\._.*|\.DS_Store")
DEEPSPEED = re.compile(r"(?:bf16_)?zero_pp_rank_.*\.pt|mp_rank_\d+.*_states\.pt")
EXPERTS = re.compile(
    r"transformer(?:_\d+)?|(?:high|low)_noise(?:_model)?"
)  # folders of a transformer
