"""The compressor's weights in the layout of torch, under names of their own: no original of it was ever published."""

import dataclasses
from collections.abc import Mapping

from packforcing_jax.convert import rules
from packforcing_jax.convert.rules import Rule

from packforcing_jax.config import CompressorConfig

COMPRESSOR = (
    Rule(r"compressor\.convs\.(\d+)\.weight", r"convs/\1/kernel", rules.conv3d),
    Rule(r"compressor\.convs\.(\d+)\.bias", r"convs/\1/bias"),
    Rule(r"compressor\.out\.weight", "out/kernel", rules.linear),
    Rule(r"compressor\.out\.bias", "out/bias"),
)
STRIDED = (3, 4, 4)  # kernel along time, rows and columns where the stride is 2


def config_from_shapes(
    shapes: Mapping[str, rules.Shape], template: CompressorConfig
) -> CompressorConfig:
    """The compressor that tensors of these shapes belong to; what they do not say is the template's."""
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
