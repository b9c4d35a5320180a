"""`python -m gpu_fsm`: the same as `gpu-fsm`."""

import sys

from gpu_fsm.cli import main

if __name__ == "__main__":
    sys.exit(main())
