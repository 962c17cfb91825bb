"""`python -m mrg_r1.cli`."""

import sys

from mrg_r1.cli import main

if __name__ == "__main__":
    sys.exit(main())
