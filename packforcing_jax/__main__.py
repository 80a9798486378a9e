"""`python -m packforcing_jax`: the same program as `packforcing`."""

import sys

from packforcing_jax.cli import main

if __name__ == "__main__":
    sys.exit(main.main())
