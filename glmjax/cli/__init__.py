"""The program `glmjax`: each command is a module here, whose `main` takes its arguments."""

import importlib
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

HELP = """usage: glmjax COMMAND ...

The GLM family in JAX. Commands:

  train EXPERIMENT   train a model; the same command again continues the run
  plan EXPERIMENT    say whether it fits on TPUs that are not there, and how fast it would be
  infill TEXT ...    fill the [MASK], [sMASK] and [gMASK] blanks of texts
  chat               talk with ChatGLM-6B, or have another model continue texts
  inspect PATH       say what a checkpoint holds, of whatever format
  convert SRC DST    write a model in another format: ours, Hugging Face's, tensor-parallel ranks
  sweep FILE         train everything a sweep file describes, and write what came out
  runs [FOLDER ...]  list runs: how far, which losses, finished or diverged
  compare RUN RUN    show how runs differ: settings, results, curves over each other
  bench WHAT         measure speed: data, train, attention, convert, decode, pods

`glmjax COMMAND --help` explains a command and gives examples.
"""

COMMANDS = (
    "train",
    "plan",
    "infill",
    "chat",
    "inspect",
    "convert",
    "sweep",
    "runs",
    "compare",
    "bench",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status. A mistake of the user's is one sentence on stderr."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP)
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"glmjax: there is no command {name!r}; see glmjax --help", file=sys.stderr)
        return 2
    # On a terminal rich keeps messages clear of the progress bar; in a file it would wrap them.
    handler: logging.Handler = logging.StreamHandler()
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.logging import RichHandler

        handler = RichHandler(console=Console(stderr=True), show_time=False, show_path=False)
    # An import may have set up logging already, as absl does.
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler], force=True)
    logging.getLogger("glmjax").setLevel(logging.INFO)
    sys.unraisablehook = _report_unraisable
    try:
        return importlib.import_module(f"glmjax.cli.{name}").main(rest)
    except (ValueError, OSError, RuntimeError, ModuleNotFoundError) as error:
        if os.environ.get("GLMJAX_TRACEBACK"):
            raise
        print(f"glmjax {name}: {error}", file=sys.stderr)
        return getattr(error, "exit_status", 1)
    except KeyboardInterrupt:
        return 130


def _report_unraisable(problem: Any) -> None:
    """Passes over the writes that end after their save has failed, which is reported by then."""
    if str(problem.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(problem)
