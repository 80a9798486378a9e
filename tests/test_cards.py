"""Every published checkpoint under its real names becomes the network and the settings that its authors sample with."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import convert_layouts
import numpy as np
import pytest
from convert_layouts import fsdp, peft, prefixed, put, put_json
from packforcing_jax.convert import recognition
from safetensors.numpy import load_file

from packforcing_jax.cli import main
from packforcing_jax.config import Experiment, cards, loading
from packforcing_jax.errors import InputError
from packforcing_jax.io import hub

FOUR = (1000, 750, 500, 250)
MEANT = 0
LEFT = 1
CRITIC = 2  # seeds of the network that is meant, of its twin, and of the critic
PACKER = {
    "pack_compressor.net.0.weight": (8, 4, 1, 3, 3),
    "pack_compressor.net.0.bias": (8,),
    "pack_compressor.net.2.weight": (6, 8, 1, 3, 3),
    "pack_compressor.net.2.bias": (6,),
    "pack_compressor.net.4.weight": (10, 6, 1, 3, 3),
    "pack_compressor.net.4.bias": (10,),
    "pack_compressor.net.6.weight": (30, 10, 1, 1, 1),
    "pack_compressor.net.6.bias": (30,),
}


def net(seed, dtype="float32", **sizes):
    return convert_layouts.dit(dtype, seed, layers=1, **sizes)


# What the authors' files hold


def averaged():
    """A file of DMD training: raw network, average and critic."""
    return {
        "generator": prefixed("model.", net(LEFT)),
        "generator_ema": prefixed("model.", net(MEANT)),
        "critic": prefixed("model.", net(CRITIC)),
    }


def raw_and_average():
    """The same where the raw network is meant; the average has the names of a sharded run."""
    return {
        "generator": prefixed("model.", net(MEANT)),
        "generator_ema": fsdp(net(LEFT)),
    }


def average():
    """A file saved once the average had begun, names as of a sharded run."""
    return {"generator_ema": fsdp(net(MEANT))}


def raw():
    return {"generator": prefixed("model.", net(MEANT))}


def raw_and_critic():
    return {
        "generator": prefixed("model.", net(MEANT)),
        "critic": prefixed("model.", net(CRITIC)),
    }


def half():
    return {"generator": prefixed("model.", net(MEANT, "bfloat16"))}


def with_packer():
    return {"generator": prefixed("model.", net(MEANT) | convert_layouts.random(PACKER))}


def plain():
    return net(MEANT)


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of the table: where the file lies, what it holds, which network is meant, and the settings."""

    file: str
    content: Callable[[], dict]
    network: str | None
    method: str
    steps: tuple[int, ...] = FOUR
    block: int = 3
    shift: float = 5.0
    warp: bool = True
    first_steps: tuple[int, ...] = ()
    samples: bool = True
    beside: tuple[str, ...] = ()

    @property
    def both(self) -> bool:
        """Whether raw network and average lie in the file."""
        return {"generator", "generator_ema"} <= self.content().keys()


def frames(file, content, network, **settings):
    return Line(file, content, network, "causal-forcing", block=1, **settings)


def start(file, method):
    return Line(file, raw, "generator", method, samples=False)


SF = "Self-Forcing/checkpoints/"
CF = "Causal-Forcing/"
LINES = {
    "self-forcing-dmd": Line(SF + "self_forcing_dmd.pt", averaged, "generator_ema", "self-forcing"),
    "self-forcing-sid": Line(SF + "self_forcing_sid.pt", averaged, "generator_ema", "self-forcing"),
    "self-forcing-ode-init": start(SF + "ode_init.pt", "self-forcing"),
    "causal-forcing-chunkwise": Line(
        CF + "chunkwise/causal_forcing.pt", raw_and_average, "generator", "causal-forcing"
    ),
    "causal-forcing-framewise": frames(
        CF + "framewise/causal_forcing.pt", average, "generator_ema"
    ),
    "causal-forcing-2step": frames(
        CF + "causal-forcing++/framewise-2step.pt",
        average,
        "generator_ema",
        steps=(1000, 500),
        first_steps=FOUR,
    ),
    "causal-forcing-1step": frames(
        CF + "causal-forcing++/framewise-1step.pt",
        averaged,
        "generator_ema",
        steps=(1000,),
        first_steps=FOUR,
    ),
    "causal-forcing-long": Line(
        CF + "chunkwise/longvideo.pt", average, "generator_ema", "rolling-forcing"
    ),
    "causal-forcing-ode": start(CF + "chunkwise/causal_ode.pt", "causal-forcing"),
    "causal-forcing-cd": start(CF + "chunkwise/causal_cd.pt", "causal-forcing"),
    "causal-forcing-ar": start(CF + "chunkwise/ar_diffusion.pt", "causal-forcing"),
    "rolling-forcing": Line(
        "RollingForcing/checkpoints/rolling_forcing_dmd.pt",
        averaged,
        "generator_ema",
        "rolling-forcing",
        steps=(1000, 800, 600, 400, 200),
    ),
    "longlive": Line(
        "LongLive-1.3B/models/longlive_base.pt", half, "generator", "longlive", beside=("lora.pt",)
    ),
    "causvid-3step": Line(
        "CausVid/autoregressive_checkpoint/model.pt",
        raw_and_critic,
        "generator",
        "causvid",
        steps=(1000, 757, 522),
        shift=8.0,
        warp=False,
    ),
    "causvid-4step": Line(
        "CausVid/autoregressive_checkpoint_warp_4step_cfg2/model.pt",
        raw_and_critic,
        "generator",
        "causvid",
        shift=8.0,
    ),
    "infinite-forcing": Line(
        "Infinite-Forcing/ema_model.pt", average, "generator_ema", "infinite-forcing"
    ),
    "reward-forcing": Line(
        "Reward-Forcing-T2V-1.3B/rewardforcing.pt", averaged, "generator_ema", "reward-forcing"
    ),
    "one-forcing": frames(
        "OneForcing/checkpoints/one_forcing.pt", raw_and_average, "generator", steps=(1000,)
    ),
    "packforcing-unofficial": Line(
        "runs/model.pt", with_packer, "generator", "packforcing-unofficial"
    ),
    "wan2.1-t2v-1.3b": Line(
        "Wan2.1-T2V-1.3B/diffusion_pytorch_model.safetensors",
        plain,
        None,
        "bidirectional",
        steps=tuple(range(1000, 0, -20)),
        samples=False,
    ),
    "wan2.1-t2v-14b": Line(
        "Wan2.1-T2V-14B/diffusion_pytorch_model.safetensors",
        plain,
        None,
        "bidirectional",
        steps=tuple(range(1000, 0, -20)),
        samples=False,
    ),
}
PUBLISHED = [name for name in LINES if name != "packforcing-unofficial"]


def written(folder: Path, name: str, renamed: str = "") -> list[Path]:
    """The files of a card, the transformer's first, under their own names or another."""
    line = LINES[name]
    suffix = Path(line.file).suffix
    path = folder / "somewhere" / f"{renamed}{suffix}" if renamed else folder / line.file
    given = [put(path, line.content())]
    for other in line.beside:
        pairs = convert_layouts.lora("bfloat16", modules=("blocks.0.self_attn.q", "blocks.0.ffn.2"))
        given.append(put(path.parent / other, {"generator_lora": peft(pairs), "step": 3}))
    return given


def convert(capsys, *words, heads=3):
    """(exit code, what it said on stderr) of `packforcing convert WORDS`."""
    capsys.readouterr()
    code = main.main(["convert", *map(str, words), "--set", f"dit.heads={heads}"])
    return code, capsys.readouterr().err


def expect_card(folder: Path, name: str):
    """The folder has the network and the settings of a card, and says so."""
    line = LINES[name]
    told = json.loads((folder / "config.json").read_text())
    manifest = json.loads((folder / "manifest.json").read_text())
    sample = told["sample"]
    assert (told["card"], told["method"]) == (name, line.method)
    assert (manifest["card"], manifest["method"]) == (name, line.method)
    assert manifest["network"] == line.network
    assert tuple(sample["steps"]) == line.steps
    assert tuple(sample["first_steps"]) == line.first_steps
    assert (sample["shift"], sample["warp"]) == (line.shift, line.warp)
    assert told["cache"]["block"] == line.block
    assert told["latent"] == [60, 104]
    expect_network(folder, MEANT, "bfloat16" if line.content is half else "float32")
    assert name in (folder / "README.md").read_text()


def expect_network(folder: Path, seed: int, dtype: str = "float32"):
    held = load_file(folder / "dit.safetensors")
    np.testing.assert_array_equal(held["patch/bias"], net(seed, dtype)["patch_embedding.bias"])


# Every line of the table


def test_the_table_has_every_card():
    assert set(LINES) == set(cards.cards())


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_file_is_recognised_by_its_folder_and_name(name, tmp_path, capsys):
    line = LINES[name]
    code, said = convert(capsys, *written(tmp_path, name), "--out", tmp_path / "model")
    assert code == 0, said
    expect_card(tmp_path / "model", name)
    assert f"{Path(line.file).name} is taken as card {name} by its name" in said
    if line.network:
        assert f"network {line.network} is taken, which the authors of {name} sample with" in said
        for other in line.content().keys() - {line.network}:
            assert other in said.partition("left out: ")[2]


@pytest.mark.parametrize("name", LINES)
def test_a_renamed_file_is_what_the_user_says(name, tmp_path, capsys):
    given = written(tmp_path, name, "model")
    code, said = convert(capsys, *given, "--card", name, "--out", tmp_path / "model")
    assert code == 0, said
    expect_card(tmp_path / "model", name)
    assert f"{given[0].name} is taken as card {name}, as --card says" in said
    assert json.loads((tmp_path / "model" / "manifest.json").read_text())["assumptions"] == [
        line.removeprefix("convert: ")
        for line in said.splitlines()
        if line.startswith("convert: ") and " tensors, " not in line
    ]


@pytest.mark.parametrize("name", LINES)
def test_a_renamed_file_without_a_card_is_not_guessed(name, tmp_path, capsys):
    given = written(tmp_path, name, "model")
    code, said = convert(capsys, *given, "--out", tmp_path / "model")
    if LINES[name].both:
        assert code == 2
        assert said.strip() == (
            "packforcing: model.pt holds both generator and generator_ema, and its name does not say which one its "
            "authors sample with; give --card NAME (`packforcing download --list` has them) or --network NAME."
        )
        assert not (tmp_path / "model").exists()
        return
    assert code == 0, said
    assert (
        f"convert: nothing says which published checkpoint {given[0].name} is: its settings are those of config "
        "wan_t2v_1_3b (steps 1000 750 500 250, shift 5, blocks of 3); give --card NAME if it is one "
        "(`packforcing download --list` has them), else --config or --set\n" in said
    )
    told = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (told["card"], told["method"]) == ("", "packforcing")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_card_of_another_checkpoint_is_refused(name, tmp_path, capsys):
    wrong = "rolling-forcing" if name != "rolling-forcing" else "self-forcing-dmd"
    given = written(tmp_path, name)
    code, said = convert(capsys, *given, "--card", wrong, "--out", tmp_path / "model")
    assert code == 2
    assert said.strip() == (
        f"packforcing: --card {wrong} contradicts {given[0].name}, which by its name is {name}; leave --card out, or "
        "rename the file if it is another."
    )
    assert not (tmp_path / "model").exists()


def networks_of(name):
    return set(LINES[name].content()) if LINES[name].network else set()


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        (name, wrong)
        for name in LINES
        if networks_of(name)
        for wrong in ("causvid-3step", "self-forcing-dmd", "wan2.1-t2v-1.3b")
        if LINES[wrong].network not in networks_of(name)
    ],
)
def test_a_card_whose_network_is_not_there_is_refused(name, wrong, tmp_path, capsys):
    given = written(tmp_path, name, "model")
    code, said = convert(capsys, *given, "--card", wrong, "--out", tmp_path / "model")
    assert code == 2
    wanted = LINES[wrong].network
    assert f"--card {wrong} contradicts model.pt: the card is " in said
    assert (f"network {wanted}" if wanted else "one network without a name") in said
    assert "give another --card, or --network " in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("name", LINES)
def test_what_cannot_be_sampled_block_by_block_says_why(name):
    if LINES[name].samples:
        cards.require_samples(name)
        return
    with pytest.raises(InputError, match=f"card {name} cannot be sampled block by block: it is"):
        cards.require_samples(name)


@pytest.mark.parametrize("name", LINES)
def test_a_card_is_the_one_of_its_file(name):
    card = cards.find(name)
    stem = name.replace("-", "_").replace(".", "_")
    experiment = loading.load_experiment(stem)
    assert experiment == card.experiment
    assert (experiment.name, experiment.card) == (stem, name)
    assert (card.name, card.method) == (name, LINES[name].method)
    assert (card.network or None) == LINES[name].network
    cache = experiment.cache
    assert cache.top == 0 or card.method in ("packforcing-unofficial", "bidirectional")
    assert experiment.clip % cache.block == 0


# Windows of the table, in latent frames

WINDOWS = {  # card -> sink, window in all
    "self-forcing-dmd": (0, 21),
    "self-forcing-sid": (0, 21),
    "causal-forcing-chunkwise": (0, 21),
    "causal-forcing-framewise": (0, 21),
    "causal-forcing-2step": (0, 21),
    "causal-forcing-1step": (0, 21),
    "causal-forcing-long": (3, 21),
    "rolling-forcing": (3, 21),
    "longlive": (3, 12),
    "causvid-3step": (0, 21),
    "causvid-4step": (0, 21),
    "infinite-forcing": (1, 6),
    "reward-forcing": (3, 9),
    "one-forcing": (0, 21),
    "packforcing-unofficial": (9, 18),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_sink_and_window_are_those_of_the_table(name):
    cache = cards.find(name).experiment.cache
    current = max(cache.window, cache.block)
    assert (cache.sink, cache.sink + cache.recent + current) == WINDOWS[name]


@pytest.mark.parametrize(
    ("name", "rows"), [("rolling-forcing", (15, 3)), ("causal-forcing-long", (12, 6))]
)
def test_a_rolling_window_is_a_block_for_each_step(name, rows):
    exp = cards.find(name).experiment
    assert (exp.cache.window, exp.cache.recent) == rows
    assert exp.cache.window == exp.cache.block * len(exp.sample.steps)


# Names


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("weights/self_forcing_dmd.pt", ["self-forcing-dmd"]),
        ("hub/models--gdhe17--Self-Forcing/snapshots/1f/checkpoints/ode_init.pt", ["self-forcing-ode-init"]),
        ("hub/models--SOTAMak1r--Infinite-Forcing/snapshots/1f/any.pt", ["infinite-forcing"]),
        ("infinite-forcing/any.pt", ["infinite-forcing"]),
        ("Infinite-Forcing/checkpoints/ode_init.pt", ["self-forcing-ode-init"]),
        ("Infinite-Forcing/checkpoints/mine.pt", []),
        ("checkpoints/chunkwise/causal_forcing.pt", ["causal-forcing-chunkwise"]),
        ("causal-forcing-framewise/causal_forcing.pt", ["causal-forcing-framewise"]),
        ("causal_forcing.pt", ["causal-forcing-chunkwise", "causal-forcing-framewise"]),
        ("x/causal_ode.pt", ["causal-forcing-ode"]),
        ("OneForcing/checkpoints/framewise/causal_ode.pt", []),
        ("autoregressive_checkpoint/model.pt", ["causvid-3step"]),
        ("CausVid/bidirectional_checkpoint1/model.pt", []),
        ("Wan2.1-T2V-1.3B/diffusion_pytorch_model.safetensors", ["wan2.1-t2v-1.3b"]),
        ("Wan2.1-T2V-1.3B/student.safetensors", []),
        ("Wan2.1-T2V-14B/diffusion_pytorch_model.safetensors.index.json", ["wan2.1-t2v-14b"]),
        (
            "Wan2.1-T2V-1.3B-Diffusers/transformer/diffusion_pytorch_model.safetensors.index.json",
            ["wan2.1-t2v-1.3b"],
        ),
        ("Wan2.1-Fun/transformer/diffusion_pytorch_model.safetensors", []),
        (
            "CausalForcing-Long-Wan2.1-T2V-1.3B-Diffusers/transformer/diffusion_pytorch_model.safetensors",
            ["causal-forcing-long"],
        ),
        ("self_forcing_sid_v2.pt", []),
        ("models/longlive_base.pt", ["longlive"]),
        ("models/lora.pt", []),
        ("model.pt", []),
        ("ema_model.pt", []),
    ],
)  # fmt: skip
def test_names_tell_or_say_nothing(path, names, tmp_path):
    assert sorted(card.name for card in recognition.by_path(tmp_path / path)) == names


@pytest.mark.parametrize("name", list(hub.sources()))
def test_what_is_fetched_is_recognised_where_it_is_put(name, tmp_path):
    source = hub.sources()[name]
    file = next(each for each in source.files[0].names if not each.endswith(".json"))
    path = tmp_path / "weights" / name / file.replace("/*", "/diffusion_pytorch_model*")
    assert [card.name for card in recognition.by_path(path)] == [source.card]


def test_an_unknown_card_gets_the_nearest():
    with pytest.raises(InputError, match="no card 'causvid-3stp'; did you mean causvid-3step?"):
        cards.find("causvid-3stp")


def test_of_weights_without_a_card_nothing_is_known():
    cards.require_samples("")
    cards.require_samples("of-another-version")


# One name, two checkpoints


def test_the_network_decides_between_two_of_a_name(tmp_path, capsys):
    path = put(tmp_path / "causal_forcing.pt", average())
    code, said = convert(capsys, path, "--out", tmp_path / "model")
    assert code == 0
    expect_card(tmp_path / "model", "causal-forcing-framewise")
    assert (
        "causal_forcing.pt is taken as card causal-forcing-framewise by its name and its network generator_ema "
        "(not causal-forcing-chunkwise); --card NAME says otherwise" in said
    )


def test_two_of_a_name_with_both_networks_are_asked_about(tmp_path, capsys):
    path = put(tmp_path / "causal_forcing.pt", raw_and_average())
    code, said = convert(capsys, path, "--out", tmp_path / "model")
    assert code == 2
    assert said.strip() == (
        "packforcing: causal_forcing.pt may be causal-forcing-chunkwise, causal-forcing-framewise by its name, which "
        "are sampled differently; give --card NAME."
    )
    assert (
        convert(capsys, path, "--card", "causal-forcing-chunkwise", "--out", tmp_path / "m")[0] == 0
    )
    expect_card(tmp_path / "m", "causal-forcing-chunkwise")


# What the user says has the last word


def settings(folder) -> Experiment:
    from packforcing_jax.io import model_folder

    return model_folder.opened(folder).experiment


def test_set_and_config_win_over_the_card(tmp_path, capsys):
    given = written(tmp_path, "causvid-3step")
    words = ("--set", "sample.steps=(1000, 500)", "--set", "cache.recent=9")
    assert convert(capsys, *given, "--out", tmp_path / "a", *words)[0] == 0
    assert settings(tmp_path / "a").sample.steps == (1000, 500)
    assert (settings(tmp_path / "a").sample.shift, settings(tmp_path / "a").cache.recent) == (
        8.0,
        9,
    )
    code, said = convert(capsys, *given, "--config", "wan_t2v_1_3b_paper", "--out", tmp_path / "b")
    exp = settings(tmp_path / "b")
    assert code == 0
    assert (exp.cache.block, exp.sample.shift, exp.method) == (4, 5.0, "packforcing")
    assert exp.card == "causvid-3step"
    assert (
        "the settings are those of --config wan_t2v_1_3b_paper, not of card causvid-3step" in said
    )


def test_a_network_asked_for_is_taken(tmp_path, capsys):
    given = written(tmp_path, "self-forcing-dmd")
    code, said = convert(capsys, *given, "--network", "generator", "--out", tmp_path / "model")
    assert code == 0
    expect_network(tmp_path / "model", LEFT)
    assert (
        "network generator is taken, as --network says; the authors of self-forcing-dmd sample network generator_ema"
        in said
    )
    assert json.loads((tmp_path / "model" / "manifest.json").read_text())["network"] == "generator"
    given = written(tmp_path, "self-forcing-dmd", "model")
    assert convert(capsys, *given, "--network", "generator", "--out", tmp_path / "again")[0] == 0
    expect_network(tmp_path / "again", LEFT)


def test_a_named_file_without_its_network_is_told(tmp_path, capsys):
    path = put(tmp_path / "self_forcing_dmd.pt", raw())
    code, said = convert(capsys, path, "--out", tmp_path / "model")
    assert code == 0
    assert settings(tmp_path / "model").card == "self-forcing-dmd"
    assert (
        "network generator is taken; self_forcing_dmd.pt holds no network generator_ema as self-forcing-dmd does"
        in said
    )


def test_one_network_without_a_name_may_be_any_card(tmp_path, capsys):
    path = put(tmp_path / "student.safetensors", net(MEANT))
    code, said = convert(
        capsys, path, "--card", "causal-forcing-2step", "--out", tmp_path / "model"
    )
    assert code == 0
    assert settings(tmp_path / "model").sample.first_steps == FOUR
    assert (
        "student.safetensors holds one network without a name, which is taken for the generator_ema of "
        "causal-forcing-2step" in said
    )


def test_what_is_not_confirmed_is_said(tmp_path, capsys):
    _, said = convert(capsys, *written(tmp_path, "infinite-forcing"), "--out", tmp_path / "a")
    assert (
        "not confirmed of card infinite-forcing: its network generator_ema; the name of its file"
        in said
    )
    _, said = convert(capsys, *written(tmp_path, "causal-forcing-ode"), "--out", tmp_path / "b")
    assert (
        "card causal-forcing-ode cannot be sampled block by block: it is an initialisation" in said
    )
    assert "not confirmed of card causal-forcing-ode: its network generator" in said


def test_the_unofficial_compressor_is_converted_with_its_network(tmp_path, capsys):
    given = written(tmp_path, "packforcing-unofficial")
    words = ("--card", "packforcing-unofficial", "--out", tmp_path / "model")
    code, said = convert(capsys, *given, *words)
    assert code == 0, said
    assert json.loads((tmp_path / "model" / "manifest.json").read_text())["ignored"] == []
    theirs = convert_layouts.random(PACKER)
    ours = load_file(tmp_path / "model" / "compressor.safetensors")
    assert len(ours) == len(PACKER)
    for i in range(3):
        right = np.transpose(theirs[f"pack_compressor.net.{2 * i}.weight"], (2, 3, 4, 1, 0))
        np.testing.assert_array_equal(ours[f"convs/{i}/kernel"], right)
        bias = theirs[f"pack_compressor.net.{2 * i}.bias"]
        np.testing.assert_array_equal(ours[f"convs/{i}/bias"], bias)
    last = theirs["pack_compressor.net.6.weight"][:, :, 0, 0, 0].T
    np.testing.assert_array_equal(ours["out/kernel"], last)
    np.testing.assert_array_equal(ours["out/bias"], theirs["pack_compressor.net.6.bias"])
    settings = json.loads((tmp_path / "model" / "config.json").read_text())["compressor"]
    assert settings["channels"] == [8, 6, 10]
    assert (settings["strided_kernel"], settings["adaptive_pool"]) == (3, True)
    assert (settings["branches"], settings["keys"]) == ("hr", "unmodulated")


# LoRA


def test_a_checkpoint_with_a_lora_needs_it(tmp_path, capsys):
    base, _ = written(tmp_path, "longlive")
    for words in ((), ("--card", "longlive")):
        code, said = convert(capsys, base, *words, "--out", tmp_path / "model")
        assert code == 2
        assert said.strip() == (
            "packforcing: card longlive is models/longlive_base.pt with the LoRA models/lora.pt, which is not among "
            "the sources; give it too, or --config longlive to convert the network alone."
        )
    code, said = convert(capsys, base, "--config", "longlive", "--out", tmp_path / "model")
    assert code == 0
    assert (
        "the LoRA of card longlive is not among the sources: the network alone is converted" in said
    )
    expect_card(tmp_path / "model", "longlive")


def test_the_lora_is_added_at_the_strength_of_the_card(tmp_path, capsys, monkeypatch):
    name = "longlive"
    assert (cards.find(name).lora or cards.Lora("", 1, 0.0)).scale == 1.0
    strong = dataclasses.replace(cards.find(name), lora=cards.Lora("models/lora.pt", 256, 512.0))
    monkeypatch.setattr(cards, "cards", lambda: {name: strong})
    monkeypatch.setattr(recognition, "cards", lambda: {name: strong})
    pairs = convert_layouts.lora(modules=("blocks.0.self_attn.q",))
    base = put(tmp_path / "longlive_base.pt", raw())
    lora = put(tmp_path / "lora.pt", peft(pairs))
    assert convert(capsys, base, lora, "--out", tmp_path / "model")[0] == 0
    merged = convert_layouts.merged(net(MEANT), pairs, 2.0)["blocks.0.self_attn.q.weight"]
    held = load_file(tmp_path / "model" / "dit.safetensors")
    np.testing.assert_allclose(held["blocks/attn/q/kernel"][0].T, merged, rtol=1e-5, atol=1e-5)


# Sizes


@pytest.mark.parametrize(
    ("card", "sizes", "sentence"),
    [
        ("self-forcing-dmd", (5120, 40, 13824), "5120 wide with 40 layers, card self-forcing-dmd 1536 with 30"),
        ("wan2.1-t2v-14b", (1536, 30, 8960), "1536 wide with 30 layers, card wan2.1-t2v-14b 5120 with 40"),
        ("causvid-3step", (1536, 20, 8960), "1536 wide with 20 layers, card causvid-3step 1536 with 30"),
    ],
)  # fmt: skip
def test_a_network_of_another_released_size_is_refused(card, sizes, sentence, tmp_path, capsys):
    path = put(tmp_path / "model.pt", raw_and_average())
    dim, layers, ffn = sizes
    told = {"dim": dim, "num_layers": layers, "ffn_dim": ffn, "num_heads": dim // 128}
    put_json(tmp_path / "config.json", convert_layouts.SIZES | told)
    words = ("--card", card, "--network", "generator", "--out", tmp_path / "model")
    code, said = convert(capsys, path, *words, heads=dim // 128)
    assert code == 2
    assert f"model.pt is {sentence}; give the --card that it is, or --config FILE." in said


def test_a_network_of_no_released_size_is_told(tmp_path, capsys):
    _, said = convert(capsys, *written(tmp_path, "self-forcing-dmd"), "--out", tmp_path / "model")
    assert (
        "self_forcing_dmd.pt is 30 wide with 1 layers, card self-forcing-dmd 1536 with 30: the sizes are the file's, "
        "all else is the card's" in said
    )


# Beside other sources


def wan(tmp_path):
    folder = tmp_path / "Wan2.1-T2V-1.3B"
    put(folder / "diffusion_pytorch_model.safetensors", net(LEFT))
    put_json(folder / "config.json", convert_layouts.SIZES | {"num_layers": 1})
    return folder


def test_a_student_beside_wan_is_the_student(tmp_path, capsys):
    given = written(tmp_path, "rolling-forcing")
    assert convert(capsys, wan(tmp_path), *given, "--out", tmp_path / "model")[0] == 0
    expect_card(tmp_path / "model", "rolling-forcing")


def test_a_folder_named_instead_of_its_file(tmp_path, capsys):
    given = written(tmp_path, "causvid-4step")
    assert convert(capsys, given[0].parent, "--out", tmp_path / "model")[0] == 0
    expect_card(tmp_path / "model", "causvid-4step")


def test_a_model_folder_keeps_its_card(tmp_path, capsys):
    given = written(tmp_path, "causvid-4step")
    assert convert(capsys, *given, "--out", tmp_path / "model")[0] == 0
    assert convert(capsys, tmp_path / "model", "--out", tmp_path / "again")[0] == 0
    assert settings(tmp_path / "again").card == "causvid-4step"
    assert settings(tmp_path / "again").sample == settings(tmp_path / "model").sample
    code, said = convert(
        capsys, tmp_path / "model", "--card", "causvid-3step", "--out", tmp_path / "b"
    )
    assert code == 2
    assert "which was made of card causvid-4step; leave --card out." in said


def test_a_students_settings_are_not_those_of_wan_whose_parts_it_takes(tmp_path, capsys):
    assert convert(capsys, wan(tmp_path), "--out", tmp_path / "wan")[0] == 0
    assert settings(tmp_path / "wan").method == "bidirectional"
    student = put(tmp_path / "student.pt", average())
    code, said = convert(capsys, tmp_path / "wan", student, "--out", tmp_path / "model")
    exp = settings(tmp_path / "model")
    assert code == 0
    assert (exp.card, exp.method, exp.sample.steps) == ("", "packforcing", FOUR)
    assert "nothing says which published checkpoint student.pt is" in said
    known = written(tmp_path, "self-forcing-sid")
    assert convert(capsys, tmp_path / "wan", *known, "--out", tmp_path / "sid")[0] == 0
    expect_card(tmp_path / "sid", "self-forcing-sid")


def test_a_card_needs_a_transformer(tmp_path, capsys):
    path = put(tmp_path / "Wan2.1_VAE.pth", convert_layouts.vae())
    code, said = convert(capsys, path, "--card", "causvid-3step", "--out", tmp_path / "model")
    assert code == 2
    assert said.strip() == (
        "packforcing: --card causvid-3step is a transformer and the sources hold none; give "
        "autoregressive_checkpoint/model.pt too."
    )


def test_an_unknown_card_is_refused(tmp_path, capsys):
    given = written(tmp_path, "longlive")
    code, said = convert(capsys, *given, "--card", "long-live", "--out", tmp_path / "model")
    assert (code, said.strip()) == (2, "packforcing: no card 'long-live'; did you mean longlive?")
