"""A session: told block by block, branched, taken back, saved and gone on from.

.venv/bin/python examples/session.py
"""

import tempfile

from packforcing_jax import Pipeline

DISC = "in scene one a red disc walks slowly before the moss curtain"
GUEST = f"{DISC} with guest coral"


def main() -> None:
    """Makes ten blocks in all and prints where each session stands."""
    pipeline = Pipeline.from_pretrained()
    session = pipeline.session(seed=7)
    block = session.next(DISC)
    print(block.index, block.frames.shape, block.latent.shape)
    for block in session.run(DISC, seconds=1.5):
        print(block.index, block.latent_hash[:8])
    branch = session.fork()
    print("with a guest", branch.next(GUEST).latent_hash[:8])
    print("without one ", session.next(DISC).latent_hash[:8])
    session.rewind(to_block=4)
    print("the same    ", session.next(GUEST).latent_hash[:8])
    with tempfile.TemporaryDirectory() as folder:
        session.save(f"{folder}/state")
        again = pipeline.restore(f"{folder}/state")
    print(again.position, again.next(DISC).latent_hash == session.next(DISC).latent_hash)


if __name__ == "__main__":
    main()
