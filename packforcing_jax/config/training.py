"""How a model is trained, as frozen values: what is minimised, what moves how fast, where, and from what data."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from packforcing_jax.config import limits
from packforcing_jax.config.choices import CHOICES, require_choices
from packforcing_jax.config.networks import DiTConfig
from packforcing_jax.errors import require

# (networks, batch, key, experiment, train) -> (loss, what to log); Any: settings load without jax and its arrays
Loss: TypeAlias = Callable[..., tuple[Any, dict[str, Any]]]


@dataclass(frozen=True)
class OptimiserConfig:
    """How one group of parameters moves (Self-Forcing's AdamW by default).

    `muon` orthogonalises the updates of matrices, at `matrix_rate` times 0.2 sqrt(larger side), and moves the rest
    by Adam at `rate`. `clip` bounds the global norm of the group's gradient; 0 leaves it alone.
    """

    kind: str = "adamw"
    rate: float = 2e-6
    matrix_rate: float = 0.0
    betas: tuple[float, float] = (0.0, 0.999)
    decay: float = 0.01
    clip: float = 10.0
    warmup: int = 0
    cooldown: float = 0.0  # last share of the steps, down to 2 % of the rate
    delay: int = 0  # updates of the run before this group begins to move

    def __post_init__(self):
        require(
            self.kind in ("adamw", "muon"),
            f"optimiser kind={self.kind!r} is unknown; choose adamw or muon.",
        )


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; 0 is what the others leave. `data` and `fsdp` split the batch, `fsdp` the state too."""

    data: int = 0
    fsdp: int = 1
    tensor: int = 1  # heads and hidden channels
    context: int = 1  # tokens


@dataclass(frozen=True)
class DataConfig:
    """Where examples come from: a row of `data/sources.py`, its file or folder, only the first `limit` (0: all)."""

    kind: str = "stage"
    path: str = ""
    limit: int = 0


@dataclass(frozen=True)
class CoverConfig:
    """How far training reaches into what sampling will meet (the paper's five blocks see one packed one).

    Each step draws one size of sink and of recent (latent frames; empty: the cache's) and a clip length between
    `shortest` and `longest` blocks (0: the clip's). With probability `gap_share` everything before the recent block is
    moved up to `gap` frames further back. `top` packed blocks are attended by the cache's own selection; 0: all.
    `matching` weighs the loss that the last layer's affinity finds the blocks called back (selection gets no gradient
    otherwise).
    """

    sinks: tuple[int, ...] = ()
    recents: tuple[int, ...] = ()
    shortest: int = 0
    longest: int = 0
    gap: float = 0.0
    gap_share: float = 0.0
    top: int = 0
    matching: float = 0.0


@dataclass(frozen=True)
class DistilConfig:
    """Distribution matching (DMD) and its SiD variant, as in Self-Forcing except where said.

    `guidance` is the original's: clean + guidance (clean - unconditional), which is the usual form at guidance + 1;
    `plain` is the usual form. `score_shift` is the table by which score networks turn velocities into clean
    samples: 0 takes sigma = timestep / 1000, the original takes 8 while it noises with the shift of `train.shift`.
    `noised_context`: the clean pass reads the block with the noise that timestep 0 has in the table (the original's
    rollout; sampling adds none). `finished`: blocks are remembered as all steps leave them; the original remembers
    the prediction of the exit step. `gradient`: through packed keys computed again (`packed`), through nothing stored
    (`none`), or `leak`: the released code's, clean values with the gradient of the exit step.
    """

    critic_updates: int = 5  # per update of the generator
    guidance: float = 3.0
    form: str = "extra"
    score_shift: float = 0.0
    noised_context: bool = False
    finished: bool = True
    gradient: str = "packed"
    min_timestep: float = 20.0  # timesteps of the scores lie between
    max_timestep: float = 980.0
    scored: int = 0  # last blocks that are scored; 0: all
    alpha: float = 1.0  # SiD

    def __post_init__(self):
        require(
            self.form in ("extra", "plain"),
            f"train.distil.form={self.form!r} is unknown; choose extra or plain.",
        )
        require(
            self.gradient in ("packed", "none", "leak"),
            f"train.distil.gradient={self.gradient!r} is unknown; choose packed, none or leak.",
        )
        require(
            self.min_timestep < self.max_timestep,
            f"train.distil.min_timestep={self.min_timestep} must lie below "
            f"max_timestep={self.max_timestep}; change one.",
        )


@dataclass(frozen=True)
class Objective:
    """What a run minimises, with everything that training has to know of it.

    A loss is a function of (networks, batch, key, experiment, train) that gives (the loss, a dict of what to log).
    With a `critic`, that network is updated in every step and the generator in one out of
    `train.distil.critic_updates`.
    """

    name: str
    generator: Loss  # the loss by which the generator moves
    critic: Loss | None = None  # that of its critic
    own_clips: bool = False  # whether the generator learns on clips that it draws itself
    needs: tuple[str, ...] = ("latent",)  # of the data, besides text
    teacher: tuple[str, ...] = ()  # parts of a frozen teacher that it asks, such as "dit"
    average: bool = False  # whether it asks the generator's running average
    histories: tuple[str, ...] = CHOICES["train.history"]  # it can be trained behind; () for none

    @property
    def networks(self) -> tuple[str, ...]:
        """The networks that are trained."""
        return ("generator", "critic") if self.critic else ("generator",)


GROUPS: Mapping[
    str, limits.Limits
] = {  # fields of `TrainConfig` that are groups, and what they may hold
    "cover": limits.COVER,
    "distil": limits.DISTIL,
    "generator": limits.OPTIMISER,
    "compressor": limits.OPTIMISER,
    "critic": limits.OPTIMISER,
    "mesh": limits.MESH,
    "source": limits.DATA,
}


@dataclass(frozen=True)
class TrainConfig:
    """One stage of training.

    `objective` is a name of `training/objectives.py` or an `Objective` of one's own.
    `history` is what the noisy blocks of a causal objective see: the packed `memory` of the true blocks before them,
    all `clean` blocks before them (teacher forcing), or all `noisy` ones (diffusion forcing).
    `generator_from`, `teacher_from`, `critic_from`, `blend_from`: an earlier stage of the recipe or a model folder;
    "" draws the generator anew and starts the critic as the teacher.
    `teacher` are the sizes of a teacher that is larger or smaller than the generator (None: the same); a run reads them
    from the model folder. The critic has the generator's, as in Self-Forcing.
    `negative_prompt` is the text of a teacher's unconditional prediction, and what hidden text is replaced by; "" is no
    text (states of zero). The families guide with Wan's (`WAN_NEGATIVE_PROMPT`).
    `blend`: the model that is written lies this far from the average to the generator of `blend_from`, on the straight
    line between their weights (WiSE-FT, arXiv 2109.01903); it makes sense where one descends from the other.
    """

    objective: str | Objective = "forcing"
    history: str = "memory"
    steps: int = 3000
    batch: int = 8  # clips, over all devices
    accumulate: int = 1  # parts that a batch is computed in, one after the other
    trainable: tuple[str, ...] = ("dit", "compressor")  # parts of the generator that move
    generator_from: str = ""
    teacher_from: str = ""
    critic_from: str = ""
    teacher: DiTConfig | None = None
    shift: float = 5.0  # noise levels: uniform draws warped towards noise
    drop_text: float = 0.0  # probability that a clip's text is hidden, for guidance later
    grid: int = 48  # steps of the teacher's path, for trajectory and consistency
    ema: float = 0.99
    ema_from: int = 0  # generator updates before the average begins
    ema_grows: bool = True  # its memory, from 1/10 to `ema`; false: `ema` from the first update on
    blend_from: str = ""
    blend: float = 0.0  # share of the weights of blend_from in the model that is written
    negative_prompt: str = ""
    cover: CoverConfig = CoverConfig()
    distil: DistilConfig = DistilConfig()
    generator: OptimiserConfig = OptimiserConfig()
    compressor: OptimiserConfig = OptimiserConfig(rate=1e-4)
    critic: OptimiserConfig = OptimiserConfig(rate=4e-7)
    mesh: MeshConfig = MeshConfig()
    source: DataConfig = DataConfig()
    remat: str = "layers"
    save_every: int = 250
    keep: int = 2
    log_every: int = 1
    log: tuple[str, ...] = ("jsonl",)  # rows of training/logs.py
    preview_every: int = 0
    patience: int = 10  # updates in a row that are not finite until the run stops
    profile: tuple[int, int] = (0, 0)  # first and last step of the profiler's window

    def __post_init__(self):
        limits.require_within(limits.TRAIN, "train", self)
        for name, within in GROUPS.items():
            limits.require_within(within, f"train.{name}", getattr(self, name))
        require_choices("train", self)
        require(
            self.batch % self.accumulate == 0,
            f"train.batch={self.batch} is not a multiple of accumulate={self.accumulate}; change one.",
        )
        require(
            bool(self.blend_from) or not self.blend,
            f"train.blend={self.blend} needs a model to go towards; name it in train.blend_from.",
        )
