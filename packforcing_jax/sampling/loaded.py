"""What sessions and folders of states need of a model that was read; `Pipeline` is one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from packforcing_jax.io import model_folder, text_encoder
from packforcing_jax.methods.method import Method
from packforcing_jax.networks import codec, text, tokenizer
from packforcing_jax.sampling import block_step, player

TextEncoder: TypeAlias = text.UMT5
Tokenizer: TypeAlias = tokenizer.Tokenizer


@dataclass(frozen=True)
class Origin:
    """The folder that networks were read from: true of a pipeline as long as it holds these very networks."""

    model: model_folder.Opened
    nets: block_step.Nets
    vae: codec.Codec

    def of(self, nets: block_step.Nets, vae: codec.Codec) -> bool:
        """Whether these networks are those of the folder."""
        return self.nets is nets and self.vae is vae


class Loaded(player.Model, Protocol):
    """A model with its method, and with what reads prompts."""

    @property
    def text(self) -> text_encoder.Encoder: ...
    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def method(self) -> Method: ...
    @property
    def origin(self) -> Origin | None: ...
    def check(self, prompts: Sequence[str]) -> None:
        """Raises `InputError` for prompts that the method cannot follow, and for words that are not known."""
        ...

    def text_kv(self, prompts: Sequence[str]) -> Any:
        """Text keys and values per layer of one prompt per video."""
        ...
