"""Runs notebooks from top to bottom and writes them with their outputs.

    python -m experiments.notebooks.render                 # all of them
    python -m experiments.notebooks.render ablation        # one

The sources are Python files in jupytext's percent format. Each runs in an empty folder of its own, with
nothing but the installed package, and `NAME.ipynb` is written beside its source.
"""

import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).parent
NAMES = ("blank_infilling", "ablation", "glm_130b_numbers", "plan_a_pod", "chatglm_6b")
SECONDS = 3600
"""After which a cell is given up."""


def read_source(name: str) -> NotebookNode:
    """The notebook of a source, without outputs; its cells are numbered, so that it is always the same."""
    notebook = jupytext.read(FOLDER / f"{name}.py")
    for number, cell in enumerate(notebook.cells):
        cell.id = f"{name}-{number}"
        cell.metadata = {}
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return notebook


def execute(notebook: NotebookNode, folder: Path, environment: Mapping[str, str]) -> None:
    """Runs all cells in a folder, in a process with that environment, and fills in their outputs.

    Raises:
        CellExecutionError: a cell failed.
    """
    client = NotebookClient(
        notebook,
        timeout=SECONDS,
        startup_timeout=SECONDS,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute(env=dict(environment))
    notebook.metadata.language_info = {"name": "python"}


def main(names: list[str]) -> int:
    for name in names or NAMES:
        notebook = read_source(name)
        with tempfile.TemporaryDirectory() as folder:
            execute(notebook, Path(folder), {**os.environ, "JAX_PLATFORMS": "cpu"})
        nbformat.write(notebook, FOLDER / f"{name}.ipynb")
        print(f"{name}.ipynb: {(FOLDER / f'{name}.ipynb').stat().st_size / 1e3:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
