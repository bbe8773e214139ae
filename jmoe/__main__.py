"""`python -m jmoe` is the command `jmoe`."""

import sys

from jmoe.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
