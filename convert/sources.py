"""What the user points at: files and folders of weights by their names, and no file outside of a folder given."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

from packforcing_jax.convert import names, networks, passed_over, pickles

from packforcing_jax.errors import InputError, require
from packforcing_jax.io import beginnings, model_folder, safetensors_io

Content: TypeAlias = (
    Any  # of a file: tables and lists inside each other, at their ends tensors and plain values
)
SAFE = ".safetensors"
READERS: dict[str, Callable[[Path], Content]] = {
    suffix: safetensors_io.opened if suffix == SAFE else pickles.opened
    for suffix in passed_over.READABLE
}
INDEX = ".index.json"  # ends the name of the list of a network's shards
SETTINGS = "config.json"
ADAPTER = "adapter_config.json"
TOKENIZERS = ("google/umt5-xxl/tokenizer.json", "tokenizer/tokenizer.json", "tokenizer.json")
LONGEST_INDEX = 1 << 26  # bytes


@dataclass(frozen=True)
class Group:
    """What came together, as one file or as shards: tables of tensors inside each other, and the settings beside it.

    `header` holds the texts of a safetensors header. `named`: the user named the file itself, and not a folder that has
    it.
    """

    origin: str
    content: Content
    settings: Mapping[str, Any]
    adapter: Mapping[str, Any]
    header: Mapping[str, str]
    named: bool


@dataclass
class Inputs:
    """Everything that the sources hold; `files` are those read, under the names that reports give them.

    `left` are the files that were not read, `unmeant` the tensors that --prefix leaves out.
    """

    groups: list[Group] = field(default_factory=list)
    folders: list[model_folder.Opened] = field(default_factory=list)
    tokenizers: list[Path] = field(default_factory=list)
    files: dict[str, Path] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    left: list[passed_over.Left] = field(default_factory=list)
    unmeant: list[safetensors_io.Tensor] = field(default_factory=list)

    def label(self, path: str | Path) -> str:
        """The name that reports give to a file, or that name itself."""
        if str(path) in self.files:
            return str(path)
        return next(
            (name for name, known in self.files.items() if str(known) == str(path)), Path(path).name
        )


def gather(paths: list[Path], prefix: str | None = None) -> Inputs:
    """What the files and folders `paths` hold; every tensor of them unread.

    With a `prefix`, of each file that has names which begin with it those alone, without it.
    """
    inputs = Inputs()
    for path in paths:
        require(
            path.is_dir() or path.is_file(),
            f"{path} does not exist; give a file or a folder of weights.",
        )
        if path.is_dir():
            _folder(path, inputs)
        else:
            _group(path, Folder(path.parent), inputs, named=True)
    inputs.notes += passed_over.told(inputs.left)
    return inputs if prefix is None else _behind(prefix, inputs)


def _behind(prefix: str, inputs: Inputs) -> Inputs:
    """The inputs with the tensors alone whose names begin with `prefix`, in each file that has such names."""
    groups = []
    fronts: set[str] = set()
    for group in inputs.groups:
        flat = dict(_flat(group.content))
        inside = {
            name.removeprefix(prefix): tensor
            for name, tensor in flat.items()
            if name.startswith(prefix)
        }
        fronts |= {name.partition(".")[0] for name in flat}
        if inside:
            inputs.unmeant += [
                tensor for name, tensor in flat.items() if not name.startswith(prefix)
            ]
        groups.append(replace(group, content=inside) if inside else group)
    require(
        any(group is not own for group, own in zip(groups, inputs.groups, strict=True)),
        f"no tensor of the sources has a name that begins with --prefix {prefix}; their names begin with "
        f"{', '.join(sorted(fronts)[:8])}.",
    )
    return replace(inputs, groups=groups)


def _flat(content: Content, front: str = "") -> Iterator[tuple[str, safetensors_io.Tensor]]:
    """Every tensor of a file by its keys, joined with dots."""
    if isinstance(content, safetensors_io.Tensor):
        yield front.removesuffix("."), content
    elif isinstance(content, dict | list | tuple):
        items = content.items() if isinstance(content, dict) else enumerate(content)
        for key, value in items:
            yield from _flat(value, f"{front}{key}.")


@dataclass(frozen=True)
class Folder:
    """A folder given by the user, whose files are read only if they really lie in it."""

    root: Path

    def inside(self, path: Path) -> Path:
        """`path`, unless a symbolic link leads out of the folder or nothing is there."""
        real = path.resolve()
        require(real.is_file(), f"{path} is no file; fetch it again or remove it.")
        lies = any(real.is_relative_to(home) for home in self.homes())
        require(
            lies,
            f"{path} is a symbolic link that leads out of {self.root}; copy the file into the folder.",
        )
        return path

    def homes(self) -> Iterator[Path]:
        """The folder itself and, if it lies in a cache of the hub, where that keeps the files it links to."""
        root = self.root.resolve()
        yield root
        for folder in (root, *root.parents):
            if folder.parent.name == "snapshots":
                yield folder.parent.parent / "blobs"

    def known(self, path: Path) -> Path | None:
        """`path` if there is such a file."""
        return self.inside(path) if path.is_symlink() or path.is_file() else None


def _folder(path: Path, inputs: Inputs) -> None:
    """Notes everything in a folder: one of our models, or weights in the layouts of others."""
    folder = Folder(path)
    _refuse_folder(path)
    before = len(inputs.groups) + len(inputs.folders) + len(inputs.tokenizers)
    inputs.tokenizers += [file for name in TOKENIZERS if (file := folder.known(path / name))]
    if _is_model(folder):
        _model(folder, inputs)
        _note_rest(folder, inputs)
        return
    for name in passed_over.FOLDERS:
        if (path / name).is_dir():
            _weights(path / name, folder, inputs)
    _note_rest(folder, inputs)
    read = len(inputs.groups) + len(inputs.folders) + len(inputs.tokenizers)
    require(read > before, f"{path} holds no weights{passed_over.instead(path)}.")


def _refuse_folder(path: Path) -> None:
    """Raises `InputError` for folders of several models, and of a cache."""
    inside = [each.name for each in path.iterdir() if each.is_dir()]
    snapshots = model_folder.snapshots(path)
    require(
        not snapshots,
        f"{path} is a folder of the hub's cache, whose files lie in snapshots/; give {' or '.join(snapshots)}.",
    )
    experts = sorted(
        name
        for name in inside
        if names.EXPERTS.fullmatch(name) and passed_over.has_weights(path / name)
    )
    require(
        len(experts) < 2,
        f"{path} holds {len(experts)} transformers ({', '.join(experts)}), one for each noise level as in Wan2.2, "
        f"and a model here has one; give the folder of one alone, such as {path / (experts or [''])[0]}.",
    )


def _note_rest(folder: Folder, inputs: Inputs) -> None:
    """Notes every file of the folder that was not read, and why."""
    read = {*inputs.files.values(), *inputs.tokenizers}
    for file in passed_over.files_in(folder.root):
        beside = file.name in (SETTINGS, ADAPTER) or file.name.endswith(INDEX)
        if file in read or beside and any(each.parent == file.parent for each in read):
            continue
        weights = file.suffix in passed_over.LIKE_WEIGHTS and not names.OF_MACOS.fullmatch(
            file.name
        )
        inputs.left.append(
            passed_over.Left(
                _label(file, folder),
                passed_over.size(file),
                passed_over.why_left(file, folder.root),
                weights,
            )
        )


def _is_model(folder: Folder) -> bool:
    """Whether a folder is a model folder of ours, by the settings it has."""
    settings = folder.known(folder.root / model_folder.CONFIG)
    return (
        settings is not None and {"name", "dit", "cache"} <= networks.read_settings(settings).keys()
    )


def opened_model(path: Path) -> model_folder.Opened:
    """The model folder at `path`, of whose files none leads out of it."""
    for name in (model_folder.CONFIG, *map(model_folder.weights_file, model_folder.PARTS)):
        Folder(path).known(path / name)
    return model_folder.opened(path)


def _model(folder: Folder, inputs: Inputs) -> None:
    model = opened_model(folder.root)
    inputs.folders.append(model)
    for part in model.parts:
        _note(folder.root / model_folder.weights_file(part), folder, inputs, named=False)


def _weights(path: Path, folder: Folder, inputs: Inputs) -> None:
    """Notes the weights that lie directly in `path`: shards together, every other file alone."""
    files = sorted(
        file
        for file in path.iterdir()
        if not file.is_dir() and not passed_over.no_network(file.name)
    )
    indexes = [file for file in files if file.name.endswith(INDEX)]
    shards = {path / name for index in indexes for name in _shards(folder.inside(index)).values()}
    alone = [file for file in files if file.suffix in READERS and file not in shards]
    if any(file.suffix == SAFE for file in [*alone, *shards]):
        alone, indexes = (
            [file for file in files if not passed_over.PICKLED_COPY.match(file.name)]
            for files in (alone, indexes)
        )
    for file in [*indexes, *alone]:
        _group(file, folder, inputs, named=False)


def _group(file: Path, folder: Folder, inputs: Inputs, *, named: bool) -> None:
    """Notes one file, or the shards that an index lists."""
    index = file.name.endswith(INDEX)
    require(
        not names.OF_MACOS.fullmatch(file.name),
        f"{file} is a note of macOS about a file and not the file; give {file.name.removeprefix('._')}.",
    )
    unread = passed_over.UNREADABLE.get(file.suffix)
    require(unread is None, f"{file} {unread}.")
    require(
        index or file.suffix in READERS,
        f"{file} is of a type that is not known; known are {', '.join([*READERS, '*' + INDEX])}.",
    )
    beside = [folder.known(file.parent / name) for name in (SETTINGS, ADAPTER)]
    settings, adapter = ({} if path is None else networks.read_settings(path) for path in beside)
    real = file if named else folder.inside(file)
    content = _sharded(real, folder, inputs) if index else READERS[file.suffix](real)
    header = safetensors_io.metadata(real) if file.suffix == SAFE else {}
    inputs.groups.append(
        Group(_note(file, folder, inputs, named), content, settings, adapter, header, named)
    )


def _note(file: Path, folder: Folder, inputs: Inputs, named: bool) -> str:
    """The name that reports give to a file from now on, which tells nothing of this machine."""
    name = file.name if named else _label(file, folder)
    while name in inputs.files and inputs.files[name] != file:
        name += "'"
    inputs.files[name] = file
    return name


def _label(file: Path, folder: Folder) -> str:
    return str(Path(folder.root.resolve().name, file.relative_to(folder.root)))


# Shards


def _shards(index: Path) -> dict[str, str]:
    """The file of each tensor according to an index, files of its own folder."""
    require(
        index.stat().st_size <= LONGEST_INDEX, f"{index} is too long for an index; check the path."
    )
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        whole = bool(weight_map) and all(isinstance(name, str) for name in weight_map.values())
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        whole = False
    other = None if whole else beginnings.complaint(index, "json")
    require(
        whole,
        f"{index} {other or 'is damaged (no weight_map of tensors to files); fetch it again.'}",
    )
    for name in set(weight_map.values()):
        plain = Path(name).name == name and "\\" not in name and "\0" not in name
        require(
            plain and Path(name).suffix in READERS,
            f"{index} names the file {name!r}, which is no weights file "
            "of its own folder; fetch it again.",
        )
    return weight_map


def _sharded(index: Path, folder: Folder, inputs: Inputs) -> dict[str, safetensors_io.Tensor]:
    """The tensors of all shards by name; raises `InputError` where index and shards do not agree."""
    weight_map = _shards(index)
    tensors = {}
    for name in sorted(set(weight_map.values())):
        shard = index.parent / name
        require(
            shard.is_symlink() or shard.exists(),
            f"{index} names {name}, which is missing; fetch it.",
        )
        _note(folder.inside(shard), folder, inputs, named=False)
        content = READERS[shard.suffix](shard)
        _require_agreement(
            index, name, content, {key for key, file in weight_map.items() if file == name}
        )
        tensors |= content
    return tensors


def _require_agreement(index: Path, shard: str, content: Content, listed: set[str]) -> None:
    """Raises `InputError` unless a shard holds exactly the tensors that the index lists for it."""
    flat = isinstance(content, dict) and all(
        isinstance(tensor, safetensors_io.Tensor) for tensor in content.values()
    )
    require(
        flat,
        f"{shard} of {index} is no plain table of tensors; convert the file that it was made from.",
    )
    differ = sorted(set(content) ^ listed)
    if differ:
        raise InputError(
            f"{index} and {shard} do not agree on {len(differ)} tensors ({', '.join(differ[:4])}), which "
            "are missing in one or stand in two shards; fetch both again."
        )
