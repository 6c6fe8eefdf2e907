"""`python -m glmjax` is the program `glmjax`."""

import sys

from glmjax.cli import main

if __name__ == "__main__":
    sys.exit(main())
