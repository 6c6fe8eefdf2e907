"""The layout of the package: imports point down, and the core needs few packages."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "glmjax"
FLOORS = {
    "version": 0, "config": 0, "presets": 0.5,
    "sharding": 1,
    "kernels": 2,
    "model": 3, "data": 3,
    "training": 4, "interop": 4.5,
    "inference": 5, "evaluation": 5, "planning": 5, "sweep": 5,
    "benchmarks": 6,
    "cli": 7, "__init__": 8, "__main__": 8,
}  # fmt: skip
FILES = sorted(PACKAGE.rglob("*.py"))
CORE = "import glmjax, glmjax.training.loss, glmjax.training.step, glmjax.training.checkpoint, glmjax.inference.generate"

OPTIONAL = [
    "grain",
    "tensorflow_datasets",
    "sentencepiece",
    "tokenizers",
    "tyro",
    "matplotlib",
    "plotext",
    "safetensors",
    "pyarrow",
    "torch",
    "tokamax",
    "libtpu",
]


def room(module: str) -> str:
    """The part of the package that a module belongs to: glmjax.data.blanks -> data."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports(file: Path) -> list[str]:
    modules = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative imports hide the floor"
            modules += [f"{node.module}.{alias.name}" for alias in node.names]
    return modules


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_point_down(file):
    here = file.relative_to(PACKAGE).with_suffix("").parts[0]
    for module in imports(file):
        if module.startswith("glmjax") and room(module) != here:
            assert FLOORS[room(module)] < FLOORS[here], f"{here} imports {module}"


@pytest.mark.parametrize("file", sorted((PACKAGE / "data").glob("*.py")), ids=lambda f: f.name)
def test_data_never_imports_jax(file):
    assert not [m for m in imports(file) if m.split(".")[0] in ("jax", "flax")]


def test_core_imports_without_the_extras():
    """The model, the training step and generation must import on a bare accelerator machine."""
    script = f"import sys\nfor name in {OPTIONAL!r}: sys.modules[name] = None\n{CORE}"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=PACKAGE.parent)


def test_program_without_the_extras_says_what_it_needs():
    script = (
        "import sys; sys.modules['tyro'] = None; from glmjax.__main__ import main; sys.exit(main())"
    )
    result = subprocess.run(
        [sys.executable, "-c", script],
        check=False,
        capture_output=True,
        text=True,
        cwd=PACKAGE.parent,
    )
    assert result.returncode == 1
    assert result.stderr.splitlines() == [
        'glmjax: the program needs more packages: pip install "glmjax[train]"'
    ]
