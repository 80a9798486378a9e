"""How far windows of undrifting videos lie from their first one, which is where the bounds of the guard come from.

    python -m benchmarks.drift --seeds 8 --frames 480

Each seed is one video of the model that ships under one prompt, a sentence of the Stage world drawn by the seed. Prints
JSON: for each figure of `sampling.drift`, the most that any window of any video differs from its first window.
"""

import argparse
import json

from packforcing_jax.io import compilation_cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--frames", type=int, default=480)
    parser.add_argument("--weights", default=None)
    args = parser.parse_args()
    compilation_cache.use()

    from packforcing_jax.io import video
    from packforcing_jax.sampling import drift
    from packforcing_jax.sampling.pipeline import Pipeline
    from packforcing_jax.stage import stories

    model = Pipeline.from_pretrained(args.weights)
    exp = model.experiment
    window = drift.BLOCKS * exp.cache.block * exp.codec.time_factor
    nothing = drift.Bounds(float("-inf"), float("-inf"), float("-inf"))  # so that all is told
    most: dict[str, float] = {}
    for seed in range(args.first, args.first + args.seeds):
        prompt = stories.default_timeline(seed, 1)[0]
        blocks = args.frames // (exp.cache.block * exp.codec.time_factor)
        guard = drift.Guard(window)
        own: dict[str, float] = {}
        for block in model.stream([prompt] * blocks, seed=seed):
            guard, told = drift.watch(guard, video.to_uint8(block.frames), prompt, nothing)
            for each in told:
                own[each.what] = round(max(own.get(each.what, each.value), each.value), 4)
        print(json.dumps({"seed": seed, "prompt": prompt, **own}), flush=True)
        most = {name: max(most.get(name, value), value) for name, value in own.items()}
    print(json.dumps({"videos": args.seeds, "frames": args.frames, "window": window, "most": most}))


if __name__ == "__main__":
    main()
