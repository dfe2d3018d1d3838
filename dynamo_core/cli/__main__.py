"""`python -m dynamo_core.cli`: how one role starts another, whatever is on the PATH."""

import sys

from dynamo_core.cli import main

if __name__ == "__main__":
    sys.exit(main())
