"""`python -m rlvr_trainer` is the same as `rlvr-ops`."""

import sys

from rlvr_trainer.cli import main

if __name__ == "__main__":
    sys.exit(main())
