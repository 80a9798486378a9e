"""Networks of PyTorch libraries with random weights, and what the comparisons with them share.

Nothing here imports torch before a test runs: the folder can be collected without it.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np

from packforcing_jax import pytrees
from packforcing_jax.verify import kinds

SLIGHT = 0.02  # relative change of every number of a tensor that a comparison has to notice


def randomized(module, seed, **gains):
    """`module` for inference with every parameter drawn anew, none left at 0 or 1.

    Matrices and kernels keep the size of what passes through, vectors spread around 0 and scales of norms around 1.
    A gain multiplies the parameters whose names its pattern finds (`__` stands for a dot).
    """
    import torch

    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.named_parameters():
            noise = torch.empty_like(value).normal_(generator=draw)
            value.copy_(_spread(name, noise))
            for pattern, gain in gains.items():
                if re.search(pattern.replace("__", r"\."), name):
                    value.mul_(gain)
    return module.eval()


def _spread(name, noise):
    """Standard normal `noise` as a parameter of this name."""
    if name.endswith("gamma") or re.search(r"norm\w*\.weight$", name):
        return 1 + 0.3 * noise
    if noise.ndim < 2 or re.search(r"bias|table|shared|embed_tokens", name):
        return 0.5 * noise
    return noise * noise[0].numel() ** -0.5


def arrays(module):
    """The parameters of a torch module by name."""
    return {name: value.numpy().copy() for name, value in module.state_dict().items()}


def called(function, *args):
    """What a function of tensors makes of arrays, as an array."""
    import torch

    with torch.inference_mode():
        return function(*(torch.from_numpy(np.array(value)) for value in args)).numpy()


def error(ours, theirs):
    """max|ours - theirs| / max|theirs|; infinite where shapes differ or a value is not finite."""
    return kinds.difference(np.asarray(ours), np.asarray(theirs))


def unnoticed(model, run, expected, *, tolerance, under=""):
    """The paths, from `under` on, of parameters whose slight change leaves `run(model)` within tolerance."""
    flat = pytrees.flatten(model)
    rng = np.random.default_rng(0)
    passed = []
    paths = [path for path in flat if path.startswith(under)]
    assert paths, f"no parameter under {under}"
    for path in paths:
        factor = jnp.asarray(1 + SLIGHT * rng.standard_normal(flat[path].shape), flat[path].dtype)
        if (
            error(run(pytrees.fill(model, flat | {path: flat[path] * factor})), expected)
            <= tolerance
        ):
            passed.append(path)
    return passed


def jit(function, **options):
    """`jax.jit` that compiles fast: the networks are tiny."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0}, **options)
