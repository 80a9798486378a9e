"""Files as people have them, broken or unusual: what `packforcing convert` and other readers make of them.

    make setup VENV=.venv-parity EXTRAS=dev,parity         # an environment with torch, diffusers, peft and safetensors
    .venv-parity/bin/python -m benchmarks.peers            # a minute; a table for docs/convert.md

Every input is made here at toy size, from one intact network. A reader that ends with an error *refuses*. One that goes
on is measured: what it made is *right* if it is the network that was meant, within rounding. If it is not, or cannot be
because the file is damaged, the reader either *says* so on its log, or it is *silent*. Exit code 1 if we are silent.
"""

import argparse
import json
import logging
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from benchmarks import convert_full_size
from packforcing_jax.config import loading

SIZES = {"dim": 24, "ffn_dim": 40, "heads": 2, "layers": 2, "text_dim": 16, "freq_dim": 12}
SETTINGS = (*(f"dit.{name}={value}" for name, value in SIZES.items()), "text.dim=16")
CONFIG = {  # the same for diffusers
    "_class_name": "WanTransformer3DModel",
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 16,
    "freq_dim": 12,
    "ffn_dim": 40,
    "num_layers": 2,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "image_dim": None,
    "added_kv_proj_dim": None,
    "patch_size": [1, 2, 2],
}
RENAMED = (  # from the original names to those of diffusers, of what stands here
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("head.modulation", "scale_shift_table"),
    ("head.head", "proj_out"),
    ("modulation", "scale_shift_table"),
    ("cross_attn", "attn2"),
    ("self_attn", "attn1"),
    (".norm3.", ".norm2."),
    ("ffn.0", "ffn.net.0.proj"),
    ("ffn.2", "ffn.net.2"),
    *((f".{name}.", f".to_{name}.") for name in "qkv"),
    (".o.", ".to_out.0."),
)
CLOSE = 2e-3  # largest difference of equal weights: float16 and the order of sums; a missing addition is 0.1 and more
RANK = 2
MISMATCH = "not used|newly initialized|unexpected|missing"
LINEARS = (*(f"{kind}_attn.{x}" for kind in ("self", "cross") for x in "qkvo"), "ffn.0", "ffn.2")
MODULES = tuple(f"blocks.{layer}.{name}" for layer in range(SIZES["layers"]) for name in LINEARS)
Tensors = Mapping[str, np.ndarray]
DIT = "diffusion_pytorch_model.safetensors"


# Inputs


class Input(NamedTuple):
    """A network in a file (or a folder of several), the same as a folder of diffusers, additions, and what is meant.

    `meant` None: the file is damaged, and nothing can be right but to refuse it or to say `word`. Who says `word` of
    what came out otherwise was not silent either.
    """

    file: Path
    folder: Path
    lora: Path | None = None
    meant: Tensors | None = None
    word: str = MISMATCH


def intact() -> dict[str, np.ndarray]:
    """The network under its original names."""
    exp = loading.load_experiment("wan_t2v_1_3b", SETTINGS)
    rng = np.random.default_rng(0)
    return {
        name: rng.normal(size=shape).astype(np.float32)
        for name, shape in convert_full_size.shapes(exp).items()
    }


def in_diffusers(name: str) -> str:
    """The name of a tensor in diffusers."""
    for ours, theirs in RENAMED:
        if ours in name:
            name = name.replace(ours, theirs)
            if "scale_shift_table" in name:
                break
    return name


def additions() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(down, up) of each module of a LoRA."""
    rng = np.random.default_rng(1)
    wide = intact()
    return {
        name: (
            rng.normal(size=(RANK, wide[f"{name}.weight"].shape[1])).astype(np.float32),
            rng.normal(size=(wide[f"{name}.weight"].shape[0], RANK)).astype(np.float32),
        )
        for name in MODULES
    }


def merged(scale: float) -> dict[str, np.ndarray]:
    """The network with the LoRA at a strength."""
    out = intact()
    for name, (down, up) in additions().items():
        out[f"{name}.weight"] = out[f"{name}.weight"] + np.float32(scale) * (up @ down)
    return out


def write(path: Path, tensors: Tensors, header: Mapping[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    save_file(plain, path, metadata=dict(header) if header else None)
    return path


def both(folder: Path, tensors: Tensors, **rest) -> Input:
    """The tensors as a file under original names, and as a folder of diffusers."""
    theirs = folder / "diffusers"
    write(theirs / DIT, {in_diffusers(name): value for name, value in tensors.items()})
    (theirs / "config.json").write_text(json.dumps(CONFIG))
    return Input(write(folder / "wan.safetensors", tensors), theirs, **rest)


def bytes_in_place(folder: Path, content: Callable[[bytes], bytes]) -> Input:
    """The same with other bytes in both files."""
    made = both(folder, intact())
    for path in (made.file, made.folder / DIT):
        path.write_bytes(content(path.read_bytes()))
    return made


def zeros(folder: Path) -> Input:
    return both(
        folder,
        {name: 0 * value if "blocks.1." in name else value for name, value in intact().items()},
        word="zero",
    )


def not_a_number(folder: Path) -> Input:
    held = intact()
    held["blocks.1.ffn.0.weight"][3, 5] = np.nan
    return both(folder, held, word="nan|finite")


def cut(folder: Path) -> Input:
    return bytes_in_place(folder, lambda content: content[: len(content) // 2])


def web_page(folder: Path) -> Input:
    return bytes_in_place(
        folder, lambda _: b"<!DOCTYPE html><html><body>Entry not found</body></html>"
    )


def pointer(folder: Path) -> Input:
    text = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize 5676070424\n"
    return bytes_in_place(folder, lambda _: text % (b"9b" * 32))


def unknown_prefix(folder: Path) -> Input:
    made = {f"policy.backbone.{name}": value for name, value in intact().items()}
    return both(folder, made, meant=intact())


def two_dtypes(folder: Path) -> Input:
    made = {
        name: value.astype(np.float16) if "blocks.1." in name else value
        for name, value in intact().items()
    }
    return both(folder, made, meant=made)


def fp8(folder: Path) -> Input:
    """Matrices of the blocks as e4m3 with a scale each, as ComfyUI stores them."""
    made = {}
    meant = {}
    for name, value in intact().items():
        made[name] = meant[name] = value
        if re.fullmatch(r"blocks\..*(attn|ffn)\..*weight", name) and value.ndim == 2:
            scale = np.float32(np.abs(value).max() / 448)
            made[name] = (value / scale).astype(ml_dtypes.float8_e4m3fn)
            made[name.removesuffix("weight") + "scale_weight"] = np.asarray([scale])
            meant[name] = made[name].astype(np.float32) * scale
    return both(folder, made, meant=meant)


def two_transformers(folder: Path) -> Input:
    """A pipeline of two experts, for high and for low noise."""
    for name in ("transformer", "transformer_2"):
        one = both(folder / name, intact())
        for path in one.folder.iterdir():
            path.rename(folder / name / path.name)
        one.folder.rmdir()
        one.file.unlink()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    return Input(folder, folder, meant=None, word="transformer_2")


def lora(
    folder: Path,
    factors: Tensors,
    *,
    scale: float,
    header: Mapping[str, str] | None = None,
    word: str = MISMATCH,
    broken: bool = False,
) -> Input:
    """An intact network, and a LoRA that is meant to be added at a strength."""
    path = write(folder / "lora" / "lora.safetensors", factors, header)
    made = both(folder, intact())
    return made._replace(lora=path, meant=None if broken else merged(scale), word=word)


def factors(form: str, rename: Callable[[str], str] = str) -> dict[str, np.ndarray]:
    """The factors under names such as `{}.lora_{}.weight`; the second gap is filled by down and up, or by A and B."""
    sides = ("down", "up") if "kohya" in form else ("A", "B")
    form = form.removeprefix("kohya ")
    return {
        form.format(rename(name), side): pair[at]
        for name, pair in additions().items()
        for at, side in enumerate(sides)
    }


def kohya(alpha: float | None) -> dict[str, np.ndarray]:
    def flat(name: str) -> str:
        return name.replace(".", "_")

    made = factors("kohya lora_unet_{}.lora_{}.weight", flat)
    if alpha is not None:
        made |= {f"lora_unet_{flat(name)}.alpha": np.asarray(alpha, np.float32) for name in MODULES}
    return made


def strength_in_header(folder: Path) -> Input:
    table = {"transformer.r": RANK, "transformer.lora_alpha": 16, "transformer.target_modules": []}
    named = factors("transformer.{}.lora_{}.weight", lambda name: in_diffusers(f"{name}.")[:-1])
    header = {"format": "pt", "lora_adapter_metadata": json.dumps(table)}
    return lora(folder, named, scale=16 / RANK, header=header)


def strength_in_trainers_header(folder: Path) -> Input:
    header = {"ss_network_alpha": "16", "ss_network_dim": str(RANK)}
    return lora(folder, kohya(None), scale=16 / RANK, header=header)


def kohya_names(folder: Path) -> Input:
    return lora(folder, kohya(1.0), scale=1 / RANK)


def no_strength(folder: Path) -> Input:
    made = factors("diffusion_model.{}.lora_{}.weight")
    return lora(folder, made, scale=1.0, word="assum", broken=True)


def alpha_zero(folder: Path) -> Input:
    return lora(folder, kohya(0.0), scale=0.0, word="adds nothing|strength of 0|alpha 0|at 0")


def half_matches_nothing(folder: Path) -> Input:
    made = factors("diffusion_model.{}.lora_{}.weight")
    beyond = {name.replace("blocks.1", "blocks.7"): value for name, value in made.items()}
    return lora(folder, made | beyond, scale=1.0, word="blocks.7", broken=True)


def with_differences(folder: Path) -> Input:
    made = factors("diffusion_model.{}.lora_{}.weight")
    made |= {f"diffusion_model.{name}.alpha": np.asarray(2.0, np.float32) for name in MODULES}
    rng = np.random.default_rng(2)
    more = {
        "blocks.0.self_attn.norm_q.diff": "blocks.0.self_attn.norm_q.weight",
        "blocks.0.self_attn.q.diff_b": "blocks.0.self_attn.q.bias",
    }
    meant = merged(1.0)
    for stored, name in more.items():
        made[f"diffusion_model.{stored}"] = rng.normal(size=meant[name].shape).astype(np.float32)
        meant[name] = meant[name] + made[f"diffusion_model.{stored}"]
    return lora(folder, made, scale=1.0)._replace(meant=meant)


CASES: Mapping[str, Callable[[Path], Input]] = {
    "half of the tensors all zero": zeros,
    "one NaN": not_a_number,
    "file cut in half": cut,
    "web page named .safetensors": web_page,
    "git-LFS pointer": pointer,
    "flat file, unknown prefix": unknown_prefix,
    "float16 and float32 mixed": two_dtypes,
    "fp8 with `scale_weight`": fp8,
    "folder with two transformers": two_transformers,
    "LoRA, strength in the header (`lora_adapter_metadata`)": strength_in_header,
    "LoRA, strength in the header (`ss_network_alpha`)": strength_in_trainers_header,
    "LoRA in kohya's names": kohya_names,
    "LoRA, alpha 0": alpha_zero,
    "LoRA without a strength": no_strength,
    "LoRA with `.diff`, `.diff_b`": with_differences,
    "LoRA, half of it for layers that are not there": half_matches_nothing,
}


# Readers


@dataclass
class Read:
    """What a reader made, under original names, and what it said."""

    made: Tensors
    said: list[str] = field(default_factory=list)


class Refused(Exception):
    """A reader ended with an error."""


def ours(given: Input, room: Path) -> Read | None:
    """`packforcing convert`, and the network back out of the model folder."""
    sources = [given.file, *([given.lora] if given.lora else [])]
    there = packforcing("convert", *sources, "--out", room / "model", "--set", "dit.heads=2")
    packforcing("convert", room / "model", "--to-torch", room / "back.safetensors")
    return Read(load_file(room / "back.safetensors"), there)


def packforcing(*words: str | Path) -> list[str]:
    """What a command said on stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "packforcing_jax", *map(str, words)], capture_output=True, text=True
    )
    said = done.stderr.splitlines()
    if done.returncode:
        raise Refused(next(line for line in said if line.startswith("packforcing: "))[13:])
    return said


def single_file(given: Input, room: Path) -> Read | None:
    """diffusers' loader of files under original names."""
    if not given.file.is_file() or given.lora is not None:
        return None
    import diffusers  # pyright: ignore[reportMissingImports]

    sizes = room / "sizes"
    sizes.mkdir()
    (sizes / "config.json").write_text(json.dumps(CONFIG))
    model, said = heard(
        lambda: diffusers.WanTransformer3DModel.from_single_file(
            str(given.file), config=str(sizes), local_files_only=True
        )
    )
    return Read(weights(model), said)


def pretrained(given: Input, room: Path) -> Read | None:
    """diffusers' loader of folders."""
    del room
    if given.lora is not None:
        return None
    import diffusers  # pyright: ignore[reportMissingImports]

    two = (given.folder / "transformer").is_dir()
    options = {"subfolder": "transformer"} if two else {}
    model, said = heard(
        lambda: diffusers.WanTransformer3DModel.from_pretrained(str(given.folder), **options)
    )
    return Read(weights(model), said)


def lora_loader(given: Input, room: Path) -> Read | None:
    """diffusers' and peft's loader of LoRAs, into an intact network, and their sum."""
    del room
    lora = given.lora
    if lora is None:
        return None
    import diffusers  # pyright: ignore[reportMissingImports]

    def load():
        base = diffusers.WanTransformer3DModel.from_pretrained(str(given.folder))
        pipeline = diffusers.WanPipeline(
            tokenizer=None, text_encoder=None, vae=None, scheduler=None, transformer=base
        )
        pipeline.load_lora_weights(str(lora.parent), weight_name=lora.name)
        pipeline.fuse_lora(components=["transformer"])
        return pipeline.transformer

    model, said = heard(load)
    return Read(weights(model), said)


def bare(given: Input, room: Path) -> Read | None:
    """The safetensors library, which knows of tensors alone."""
    del room
    if not given.file.is_file() or given.lora is not None or given.meant is not None:
        return None
    from safetensors.torch import load_file as load

    tensors, said = heard(lambda: load(given.file))
    return Read({name: value.float().numpy() for name, value in tensors.items()}, said)


def weights(model) -> dict[str, np.ndarray]:
    """The parameters of diffusers' network under original names; a parameter without a value is NaN."""
    theirs = {in_diffusers(name): name for name in intact()}
    found = {}
    for name, value in model.state_dict().items():
        name = name.replace(".base_layer", "")
        if name in theirs:
            lacks = value.device.type == "meta"
            found[theirs[name]] = (
                np.full(value.shape, np.nan) if lacks else value.detach().float().numpy()
            )
    return found


def heard(load: Callable):
    """What `load` gives, and every warning meanwhile. An error is `Refused`."""
    said = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    ear = Ear(logging.WARNING)
    loggers = [logging.getLogger(name) for name in (None, "diffusers", "transformers", "peft")]
    for each in loggers:
        each.addHandler(ear)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            made = load()
    except Exception as error:
        raise Refused(f"{type(error).__name__}: {error}") from error
    finally:
        for each in loggers:
            each.removeHandler(ear)
    return made, said + [str(each.message) for each in caught]


READERS: Mapping[str, Callable[[Input, Path], Read | None]] = {
    "packforcing convert": ours,
    "diffusers from_single_file": single_file,
    "diffusers from_pretrained": pretrained,
    "diffusers load_lora_weights": lora_loader,
    "safetensors load_file": bare,
}


# Outcomes


class Outcome(NamedTuple):
    """`refuses`, `says`, `right` or `silent`, with the sentence or what was done."""

    kind: str
    text: str


def outcome(given: Input, read: Callable[[Input, Path], Read | None], room: Path) -> Outcome | None:
    """What comes of an input in a reader; None where it is not made for such."""
    try:
        result = read(given, room)
    except Refused as error:
        return Outcome("refuses", short(str(error), room))
    if result is None:
        return None
    did = compared(result.made, given)
    named = [line for line in result.said if re.search(given.word, line, re.IGNORECASE)]
    if did and named:
        return Outcome("says", short(f"{did}: {named[0]}", room))
    return Outcome("silent", did) if did else Outcome("right", "")


def compared(made: Tensors, given: Input) -> str:
    """In what the network is not the one that was meant; nothing if it is. Of damaged ones: that it was loaded."""
    if given.meant is None:
        return "loaded"
    absent = [name for name in given.meant if name not in made or np.isnan(made[name]).any()]
    other = [
        name
        for name, value in given.meant.items()
        if name not in absent and np.abs(made[name] - value.astype(np.float32)).max() > CLOSE
    ]
    if not absent and not other:
        return ""
    if given.lora is not None and not absent:
        return f"{len(other)} of {len(given.meant)} tensors wrong{strength(made, given.meant)}"
    return f"{len(absent)} tensors without a value, {len(other)} wrong, of {len(given.meant)}"


def strength(made: Tensors, meant: Tensors) -> str:
    """At which part of its strength a LoRA was added."""
    name = f"{MODULES[0]}.weight"
    wanted, got = meant[name] - intact()[name], made[name] - intact()[name]
    part = float((wanted * got).sum() / max((wanted * wanted).sum(), 1e-9))
    return f": added at {part:.3g} times its strength"


def short(text: str, room: Path, most: int = 240) -> str:
    """A line without paths of this machine."""
    text = re.sub(
        rf"(/private)?{re.escape(str(room.parent))}/[^/\s]*/?", "", " ".join(text.split())
    )
    return text if len(text) <= most else f"{text[:most]}..."


def all_outcomes() -> dict[str, dict[str, Outcome | None]]:
    """By case and reader."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, make) in enumerate(CASES.items()):
            found[name] = {}
            for at, (reader, read) in enumerate(READERS.items()):
                room = Path(folder) / f"{number}-{at}"
                room.mkdir()
                found[name][reader] = outcome(make(room / "given"), read, room)
            print(f"{name}: {found[name]}", file=sys.stderr)
    return found


def table(found: Mapping[str, Mapping[str, Outcome | None]]) -> str:
    """The outcomes as a table of Markdown."""
    rows = [f"| input | {' | '.join(READERS)} |", "|---" * (len(READERS) + 1) + "|"]
    for name, by_reader in found.items():
        cells = [
            "-" if each is None else f"**{each.kind}** {each.text}".strip()
            for each in by_reader.values()
        ]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def versions() -> dict[str, str]:
    return {
        name: metadata.version(name)
        for name in ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors")
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; 1 if we are silent about anything."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print versions and outcomes as JSON")
    args = parser.parse_args(argv)
    found = all_outcomes()
    if args.json:
        print(json.dumps({"versions": versions(), "outcomes": found}))
    else:
        print(f"{table(found)}\n\n{versions()}")
    mine = [by_reader["packforcing convert"] for by_reader in found.values()]
    return 1 if any(each is None or each.kind == "silent" for each in mine) else 0


if __name__ == "__main__":
    sys.exit(main())
