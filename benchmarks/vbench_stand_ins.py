"""Writes randomly initialised weights in the layout of VBench's cache, to try the bridge without the real ones.

Runs in VBench's own environment: `ENVIRONMENT/bin/python benchmarks/vbench_stand_ins.py CACHE`, where CACHE then holds
`vbench/` and `torch/`, 3.5 GB, and a file that marks them. No number made with them says anything about a video.
"""

import argparse
import os
import shutil
import sys
import typing
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent.parent / "packforcing_jax" / "evaluation"))
import vbench_driver

CLIP = {  # constructor arguments of clip.model.CLIP
    "ViT-B-32": (512, 224, 12, 768, 32, 77, 49408, 512, 8, 12),
    "ViT-L-14": (768, 224, 24, 1024, 14, 77, 49408, 768, 12, 12),
}
HUBCONF = '''"""A stand-in for DINO's hub file: the same names and shapes by timm, for trying the machinery only."""
import timm
import torch


def dino_vitb16(pretrained=True, **kwargs):
    model = timm.create_model(
        "vit_base_patch16_224", num_classes=0, dynamic_img_size=True, dynamic_img_pad=True
    )
    state = torch.hub.load_state_dict_from_url(
        "https://stand-in.invalid/dino_vitbase16_pretrain.pth", map_location="cpu"
    )
    model.load_state_dict(state, strict=True)
    return model.eval()
'''
MARK = "These weights are random: no number made with them says anything about a video.\n"


class Archive(torch.nn.Module):
    """A tree of empty modules that holds a state dict under its names, which is what CLIP's loader reads."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values


def archive(state: dict[str, torch.Tensor], path: Path) -> None:
    """Saves a state dict as a TorchScript archive."""
    root = Archive()
    for name, value in state.items():
        *folders, leaf = name.split(".")
        place = root
        for folder in folders:
            if not hasattr(place, folder):
                place.add_module(folder, Archive())
            place = getattr(place, folder)
        if value.is_floating_point():
            place.register_parameter(leaf, torch.nn.Parameter(value, requires_grad=False))
        else:
            place.register_buffer(leaf, value)
    torch.jit.save(torch.jit.trace(root, torch.zeros(1)), path)


def clip(name: str, path: Path) -> None:
    from clip.model import CLIP as Model
    from clip.model import convert_weights

    arguments = CLIP[name]
    model = Model(*arguments)
    convert_weights(model)
    sizes = dict(zip(("input_resolution", "context_length", "vocab_size"), (224, 77, 49408)))
    state = model.state_dict() | {key: torch.tensor(value) for key, value in sizes.items()}
    archive(state, path)


def dino(path: Path) -> None:
    import timm

    model = timm.create_model("vit_base_patch16_224", num_classes=0, dynamic_img_size=True)
    torch.save(model.state_dict(), path)


def musiq(path: Path) -> None:
    from pyiqa.archs.musiq_arch import MUSIQ

    torch.save(MUSIQ(pretrained=False).state_dict(), path)


def raft(path: Path) -> None:
    from easydict import EasyDict
    from vbench.third_party.RAFT.core.raft import RAFT

    model = RAFT(EasyDict(small=False, mixed_precision=False, alternate_corr=False))
    torch.save({f"module.{name}": value for name, value in model.state_dict().items()}, path)


def amt(path: Path) -> None:
    """The state dict is a `typing.OrderedDict`, as in the published file, which today's torch refuses unasked."""
    import vbench
    from omegaconf import OmegaConf
    from vbench.third_party.amt.utils.build_utils import build_from_cfg

    config = Path(vbench.__file__).parent / "third_party/amt/cfgs/AMT-S.yaml"
    model = build_from_cfg(OmegaConf.load(config).network)
    torch.save({"state_dict": typing.OrderedDict(model.state_dict())}, path)


def viclip(path: Path) -> None:
    """Three parameters are uninitialised memory in the official class: small normal numbers take their place."""
    from vbench.third_party.ViCLIP.viclip import ViCLIP

    model = ViCLIP(tokenizer=object(), pretrain=None)
    for name, value in model.state_dict().items():
        if name.endswith(("positional_embedding", "text_projection", "vision_encoder.proj")):
            torch.nn.init.normal_(value, std=0.02)
        assert value.isfinite().all(), name
    torch.save({"model": model.state_dict()}, path)


def head(path: Path) -> None:
    torch.save(torch.nn.Linear(768, 1).state_dict(), path)


FILES = {
    "vbench/raft_model/models/raft-things.pth": raft,
    "vbench/amt_model/amt-s.pth": amt,
    "vbench/pyiqa_model/musiq_spaq_ckpt-358bb6af.pth": musiq,
    "vbench/clip_model/ViT-B-32.pt": lambda path: clip("ViT-B-32", path),
    "vbench/clip_model/ViT-L-14.pt": lambda path: clip("ViT-L-14", path),
    "vbench/aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth": head,
    "vbench/ViCLIP/ViClip-InternVid-10M-FLT.pth": viclip,
    "torch/hub/checkpoints/dino_vitbase16_pretrain.pth": dino,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cache", type=Path)
    cache = parser.parse_args().cache
    os.environ |= {"VBENCH_CACHE_DIR": str(cache / "vbench"), "HF_HUB_OFFLINE": "1"}
    vbench_driver.forbid_network()
    vbench_driver.complete_torchvision()
    torch.manual_seed(0)
    words = vbench_driver.vocabulary()
    assert words is not None, "openai-clip is not installed"
    (cache / "vbench" / "ViCLIP").mkdir(parents=True, exist_ok=True)
    shutil.copy(
        words, cache / "vbench" / "ViCLIP"
    )  # the official class opens it when it is imported
    hub = cache / "vbench/dino_model/facebookresearch_dino_main"
    hub.mkdir(parents=True, exist_ok=True)
    (hub / "hubconf.py").write_text(HUBCONF)
    for name in ("vision_transformer.py", "utils.py"):
        (hub / name).write_text('"""Empty: the stand-in takes its network from timm."""\n')
    (cache / "vbench" / "STAND_INS").write_text(MARK)
    for name, make in FILES.items():
        path = cache / name
        path.parent.mkdir(parents=True, exist_ok=True)
        make(path)
        print(f"{path.stat().st_size:>13,} {name}", flush=True)


if __name__ == "__main__":
    main()
