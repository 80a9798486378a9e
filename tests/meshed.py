"""A tiny training on several meshes of fake devices, or as one of several processes: prints the losses as JSON.

python tests/meshed.py '{"objective": "dmd", "steps": 3, "meshes": [[1, 1, 1, 1], [1, 2, 2, 2]]}'

`"teacher": {"dim": 48, "layers": 3}` changes sizes of the teacher; `"compile": true` compiles a step on each mesh in
place of training, and prints what the compiler says of its arguments beside what `plan` says.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import quick

for name in [each for each in os.environ if "proxy" in each.lower()]:
    del os.environ[name]  # processes that look for each other would ask it

SEED = 3
BATCH = 8


def child(devices=8, **wanted):
    """A process of its own that trains as `wanted` says."""
    given = json.dumps({"devices": devices, **wanted})
    there = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    return subprocess.Popen(
        [sys.executable, __file__, given],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=there
        | {
            "PYTHONPATH": str(Path(__file__).parent.parent),
            "XLA_FLAGS": quick.FLAGS,
            "TF_CPP_MIN_LOG_LEVEL": "2",
        },
    )


def told(process, patience=900):
    """The metrics of every step, by sizes of the mesh."""
    said, complaints = process.communicate(timeout=patience)
    assert process.returncode == 0, complaints[-3000:]
    return {tuple(mesh): steps for mesh, steps in json.loads(said.splitlines()[-1])}


def apart(one, other):
    """The largest relative difference of any loss of two trainings."""
    names = [name for name in one[0] if name.rpartition("/")[2] == "loss"]
    return max(
        abs(a[name] - b[name]) / abs(a[name])
        for a, b in zip(one, other, strict=True)
        for name in names
    )


def settings(wanted, sizes):
    """Four heads, so that tensor and context have something to divide; rates at which 20 steps make a difference."""
    import tiny

    from packforcing_jax.config import training
    from packforcing_jax.training import rollout

    moves = training.OptimiserConfig(rate=1e-3, betas=(0.9, 0.99))
    train = training.TrainConfig(
        objective=wanted["objective"],
        batch=BATCH,
        steps=20,
        accumulate=1,
        shift=3.0,
        grid=7,
        generator=moves,
        compressor=moves,
        critic=moves,
        distil=training.DistilConfig(critic_updates=1, form="plain", guidance=2.0),
        source=training.DataConfig(kind="records"),
        mesh=training.MeshConfig(*sizes),
    )
    heads = dataclasses.replace(tiny.EXP.dit, dim=24, heads=4, rope_pairs=(1, 1, 1))
    exp = rollout.for_training(dataclasses.replace(tiny.EXP, dit=heads), blocks=5, sink=3)
    other = wanted.get("teacher")
    own = None if other is None else dataclasses.replace(heads, rope_pairs=None, **other)
    return exp, dataclasses.replace(train, teacher=own)


def examples(exp, step):
    """The raw batch of a step, all rows."""
    import numpy as np

    from packforcing_jax.data import sources

    draw = np.random.default_rng((SEED, step))
    blocks = exp.blocks
    shapes = {
        "latent": (exp.clip, *exp.latent, exp.dit.in_channels),
        "low_res": (blocks, *sources.low_res_shape(exp)),
        "states": (exp.dit.text_len - 1, exp.dit.text_dim),
    }
    return {
        name: draw.normal(size=(BATCH, *shape)).astype(np.float32) for name, shape in shapes.items()
    }


def trained(wanted, sizes):
    """The metrics of every step on one mesh of the first devices."""
    import math

    import jax
    import numpy as np

    from packforcing_jax.data import sources
    from packforcing_jax.networks import mesh
    from packforcing_jax.training import runs

    exp, train = settings(wanted, sizes)
    program = runs.Program()
    grid = mesh.make(train.mesh, jax.devices()[: math.prod(sizes)])
    mesh.check(exp, train, grid)
    rows = BATCH // jax.process_count()
    mine = slice(jax.process_index() * rows, (jax.process_index() + 1) * rows)
    with jax.set_mesh(grid):
        form = runs.abstract(exp, train, program, SEED, grid)
        frozen = teacher(exp, train, grid)
        state = runs.born(exp, train, program, SEED, form, grid)
        update = runs.compiled(exp, train, program, form, grid)
        history = []
        for step in range(wanted["steps"]):
            raw = sources.global_batch(
                grid, {name: rows[mine] for name, rows in examples(exp, step).items()}
            )
            state, metrics = update(
                state, frozen, raw, np.uint32(SEED), program.movers(train, step), exp
            )
            history.append({name: np.asarray(value).tolist() for name, value in metrics.items()})
    return history


def teacher(exp, train, grid):
    """A frozen transformer of other weights, lying where the rules say."""
    import jax

    from packforcing_jax import pytrees
    from packforcing_jax.networks import mesh
    from packforcing_jax.training import batches, teachers

    places = mesh.shardings(teachers.shapes(exp, train), grid)
    if not places:
        return {}
    own = dataclasses.replace(exp, dit=teachers.sizes(exp, train))

    def drawn():
        flat = pytrees.flatten(batches.new_model(own, jax.random.key(SEED + 1), reads=False))
        return {path: flat[path] for path in places}

    return {"teacher": jax.jit(drawn, out_shardings=places)()}


def compiled(wanted, sizes):
    """Bytes that a compiled update of the generator is given on each device: (as XLA says, as `plan` says)."""
    import math

    import jax
    import jax.numpy as jnp
    import numpy as np

    from packforcing_jax.networks import mesh
    from packforcing_jax.plan import training_budget
    from packforcing_jax.training import runs

    exp, train = settings(wanted, sizes)
    grid = mesh.make(train.mesh, jax.devices()[: math.prod(sizes)])
    made = training_budget.setup(exp, train, grid)
    states = jax.ShapeDtypeStruct(
        (BATCH, exp.dit.text_len - 1, exp.dit.text_dim),
        jnp.float32,
        sharding=mesh.batch_sharding(grid),
    )
    with jax.set_mesh(grid):
        step = runs.compiled(made.exp, train, runs.Program(), made.state, grid)
        lowered = step.lower(
            made.state, made.frozen, {"states": states}, np.uint32(0), ("generator",), made.exp
        )
        found = lowered.compile().memory_analysis().argument_size_in_bytes
    beside = training_budget.device_bytes(states) + 4  # the seed
    return found - beside, training_budget.held(made)["training/held"]


def main(wanted):
    """Trains on every mesh that is asked for, in turn; `process` 0 of several prints."""
    import jax

    jax.config.update("jax_default_matmul_precision", "highest")
    jax.config.update("jax_num_cpu_devices", wanted["devices"])
    if "coordinator" in wanted:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(wanted["coordinator"], wanted["processes"], wanted["process"])
    sys.path.insert(0, str(Path(__file__).parent))
    measure = compiled if wanted.get("compile") else trained
    found = [(sizes, measure(wanted, sizes)) for sizes in wanted["meshes"]]
    print(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
