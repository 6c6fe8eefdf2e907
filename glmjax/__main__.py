"""The program `glmjax`, also as `python -m glmjax`."""

import importlib.util
import sys


def main() -> int:
    """Runs the command line, whose packages the library alone does without."""
    if importlib.util.find_spec("tyro") is None:
        print(
            'glmjax: the program needs more packages: pip install "glmjax[train]"', file=sys.stderr
        )
        return 1

    from glmjax import cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
