"""The compressor's weights in the layout of torch, under names of their own or those of PackForcing-Unofficial.

No original of the former was ever published.
"""

import dataclasses
from collections.abc import Mapping

from packforcing_jax.convert import rules
from packforcing_jax.convert.rules import Rule

from packforcing_jax.config import CompressorConfig
from packforcing_jax.config.networks import UNOFFICIAL_COMPRESSOR

NET = "pack_compressor.net"  # of PackForcing-Unofficial: convolutions and SiLU by turns, the last of 1x1x1
POINTWISE = "o i 1 1 1 -> i o"
LAST = 2 * len(UNOFFICIAL_COMPRESSOR.strides)
UNOFFICIAL = (
    *(
        rule
        for i in range(len(UNOFFICIAL_COMPRESSOR.strides))
        for rule in (
            Rule(rf"pack_compressor\.net\.{2 * i}\.weight", f"convs/{i}/kernel", rules.conv3d),
            Rule(rf"pack_compressor\.net\.{2 * i}\.bias", f"convs/{i}/bias"),
        )
    ),
    Rule(rf"pack_compressor\.net\.{LAST}\.weight", "out/kernel", POINTWISE),
    Rule(rf"pack_compressor\.net\.{LAST}\.bias", "out/bias"),
)
COMPRESSOR = (
    Rule(r"compressor\.convs\.(\d+)\.weight", r"convs/\1/kernel", rules.conv3d),
    Rule(r"compressor\.convs\.(\d+)\.bias", r"convs/\1/bias"),
    Rule(r"compressor\.out\.weight", "out/kernel", rules.linear),
    Rule(r"compressor\.out\.bias", "out/bias"),
    *UNOFFICIAL,
)
STRIDED = (3, 4, 4)  # kernel along time, rows and columns where the stride is 2


def config_from_shapes(
    shapes: Mapping[str, rules.Shape], template: CompressorConfig
) -> CompressorConfig:
    """The compressor that tensors of these shapes belong to; what they do not say is the template's."""
    if any(name.startswith(NET) for name in shapes):
        kernels = [shapes.get(f"{NET}.{i}.weight", ()) for i in range(0, LAST, 2)]
        channels = tuple(shape[0] for shape in kernels if shape)
        return dataclasses.replace(UNOFFICIAL_COMPRESSOR, channels=channels)
    kernels = []
    while len(shape := shapes.get(f"compressor.convs.{len(kernels)}.weight", ())) == 5:
        kernels.append(shape)
    strides = tuple(
        tuple(2 if size == strided else 1 for size, strided in zip(shape[2:], STRIDED, strict=True))
        for shape in kernels
    )
    return dataclasses.replace(
        template,
        channels=tuple(shape[0] for shape in kernels),
        strides=strides,
        branches="both" if template.branches == "lr" else template.branches,
    )
