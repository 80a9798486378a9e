"""Which form of weights loads faster straight into sharded arrays: our safetensors file, or an Orbax checkpoint.

    python -m benchmarks.load_weights --room /tmp/room            # needs twice --gigabytes of disk there

Both hold the same arrays, of the transformer's shapes. They are read in turn, each into arrays whose second axis is
spread over the devices, and compared value by value once. Files are warm: both were just written.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax

DEVICES = 4
WIDTH = 1536
INNER = 8960


def shapes(gigabytes: float) -> dict[str, tuple[int, ...]]:
    """The large arrays of a transformer with as many layers as make up the size in float32."""
    layer = {f"attn/{x}/kernel": (WIDTH, WIDTH) for x in "qkvo"}
    layer |= {
        "ffn_in/kernel": (WIDTH, INNER),
        "ffn_out/kernel": (INNER, WIDTH),
        "norm/scale": (WIDTH,),
    }
    each = 4 * sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in layer.values())
    count = max(1, round(gigabytes * 1e9 / each))
    return {name: (count, *shape) for name, shape in layer.items()}


def write(folder: Path, gigabytes: float) -> None:
    """Both forms of the same random arrays."""
    import numpy as np
    import orbax.checkpoint as orbax

    from packforcing_jax.io import safetensors_io

    rng = np.random.default_rng(0)
    arrays = {
        name: rng.standard_normal(shape, np.float32) for name, shape in shapes(gigabytes).items()
    }
    with safetensors_io.Writer(
        folder / "weights.safetensors", {n: (x.shape, x.dtype) for n, x in arrays.items()}, {}
    ) as file:
        for name, array in arrays.items():
            file.put(name, array)
    with orbax.StandardCheckpointer() as disk:
        disk.save(folder / "orbax", arrays)


def readers(folder: Path) -> dict[str, Callable[[], dict[str, jax.Array]]]:
    """A function for each form that gives all arrays, sharded."""
    import numpy as np
    import orbax.checkpoint as orbax
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    from packforcing_jax.io import model_folder, safetensors_io

    mesh = jax.make_mesh((len(jax.devices()),), ("fsdp",), axis_types=(AxisType.Auto,))
    tensors = safetensors_io.opened(folder / "weights.safetensors")
    shardings = {name: NamedSharding(mesh, PartitionSpec(None, "fsdp")) for name in tensors}
    forms = {
        name: jax.ShapeDtypeStruct(tensor.shape, np.float32) for name, tensor in tensors.items()
    }
    wanted = {
        name: jax.ShapeDtypeStruct(form.shape, form.dtype, sharding=shardings[name])
        for name, form in forms.items()
    }

    def from_orbax():
        with orbax.StandardCheckpointer() as disk:
            return disk.restore(folder / "orbax", wanted)

    return {
        "safetensors": lambda: model_folder.placed(
            forms,
            safetensors_io.opened(folder / "weights.safetensors"),
            dtype="float32",
            source="weights",
            shardings=shardings,
        ),
        "orbax": from_orbax,
    }


def measure(folder: Path, turns: int) -> dict[str, list[float]]:
    """Seconds of each turn by form, taken in turn."""
    import numpy as np

    read = readers(folder)
    seconds = {}
    first = {name: load() for name, load in read.items()}
    for name, array in first["orbax"].items():
        np.testing.assert_array_equal(first["safetensors"][name], array, err_msg=name)
    del first
    for _ in range(turns):
        for name, load in read.items():
            start = time.perf_counter()
            jax.block_until_ready(load())
            seconds.setdefault(name, []).append(time.perf_counter() - start)
    return seconds


def main() -> int:
    """Prints how many times longer Orbax takes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--room", default=None, metavar="DIR", help="folder for the files (default: the system's)"
    )
    parser.add_argument(
        "--gigabytes", type=float, default=1.0, help="size of the weights (default: 1)"
    )
    parser.add_argument("--turns", type=int, default=9, help="of each form (default: 9)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    with tempfile.TemporaryDirectory(dir=args.room) as room:
        write(Path(room), args.gigabytes)
        seconds = measure(Path(room), args.turns)
    ratios = [
        slow / fast for slow, fast in zip(seconds["orbax"], seconds["safetensors"], strict=True)
    ]
    low, _, high = statistics.quantiles(ratios, n=4)
    result = {
        "gigabytes": args.gigabytes,
        "devices": DEVICES,
        "turns": args.turns,
        "machine": platform.processor(),
        "jax": jax.__version__,
        "orbax over safetensors": round(statistics.median(ratios), 2),
        "quartiles": [round(low, 2), round(high, 2)],
    }
    print(
        json.dumps(result)
        if args.json
        else "\n".join(f"{name}: {value}" for name, value in result.items())
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
