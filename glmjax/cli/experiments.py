"""Experiment files: Python with a function that returns an Experiment."""

import importlib.util
from pathlib import Path
from types import ModuleType

from glmjax.config import Experiment


def load_experiment(path: Path) -> Experiment:
    """The experiment that a Python file describes, or a function of it named by FILE:FUNCTION.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file does not define `experiment() -> Experiment`, or that function.
    """
    file, _, function = str(path).partition(":")
    path, function = Path(file), function or "experiment"
    make = getattr(load_module(path, "experiment"), function, None)
    if make is None or not isinstance(experiment := make(), Experiment):
        raise ValueError(f"{path} does not define {function}() -> glmjax.config.Experiment")
    return experiment


def load_module(path: Path, kind: str) -> ModuleType:
    """A Python file, run as a module; `kind` is what it describes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a Python file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no {kind} file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def named_experiment(command: str, arguments: list[str]) -> tuple[Experiment, str, list[str]]:
    """The experiment that the first argument names, the program's name, and the other arguments."""
    if arguments and not arguments[0].startswith("-"):
        name, *rest = arguments
        return load_experiment(Path(name)), f"glmjax {command} {name}", rest
    if not {"-h", "--help"} & set(arguments):
        raise ValueError("name an experiment file, such as experiments/quickstart.py")
    return Experiment(), f"glmjax {command} EXPERIMENT", arguments
