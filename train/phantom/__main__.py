"""`python -m train.phantom`: see `train.phantom.cohort`."""

import sys

from runtime.core import console

from .cohort import main

if __name__ == "__main__":
    sys.exit(console.run(main))
