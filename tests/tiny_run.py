"""A training run of seconds: glm-tiny on made-up words. A plugin of the tests, for its fixtures."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from glmjax import cli
from glmjax.config import (
    DataConfig,
    Experiment,
    OptimizerConfig,
    TrainConfig,
    config_to_json,
)
from glmjax.presets import get_config

SYLLABLES = ("ka", "lo", "mir", "ten", "su", "ar", "vel", "no", "dri", "pha")
REPOSITORY = Path(__file__).parents[1]


def write_text(folder: Path) -> None:
    """40 files of 40 lines, each of eight words out of 200."""
    rng = random.Random(0)
    words = ["".join(rng.choices(SYLLABLES, k=rng.randint(1, 3))) for _ in range(200)]
    folder.mkdir()
    for i in range(40):
        lines = [" ".join(rng.choices(words, k=8)) + "." for _ in range(40)]
        (folder / f"{i}.txt").write_text("\n".join(lines))


def make_experiment(folder: Path) -> Experiment:
    """60 steps on the text of a folder, with a line every 5 and a checkpoint every 10 steps."""
    return Experiment(
        model=get_config(
            "glm-tiny", embedding_dropout=0.1, attention_dropout=0.0, hidden_dropout=0.0
        ),
        data=DataConfig(
            path=(str(folder / "text"),),
            cache=str(folder / "cache"),
            vocab_size=512,
            sequence_length=64,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup=10, decay=60, beta2=0.95),
        train=TrainConfig(
            run=str(folder / "run"),
            steps=60,
            batch_size=8,
            log_every=5,
            evaluate_every=20,
            evaluate_batches=4,
            checkpoint_every=10,
        ),
    )


def write_experiment(path: Path, experiment: Experiment) -> Path:
    """An experiment file for the command line."""
    path.write_text(
        "import json\n\nfrom glmjax.config import Experiment, config_from_json\n\n"
        f"VALUES = {json.dumps(config_to_json(experiment))!r}\n\n\n"
        "def experiment() -> Experiment:\n"
        "    return config_from_json(Experiment, json.loads(VALUES))\n"
    )
    return path


def environment(devices: int = 8, **variables: str) -> dict[str, str]:
    """The environment of a process that runs like the tests do."""
    return {
        **os.environ,
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "PYTHONPATH": str(REPOSITORY),
        **variables,
    }


def glmjax(*arguments: object, stdin: str = "", **variables: str) -> subprocess.CompletedProcess:
    """Runs the program in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "glmjax", *map(str, arguments)],
        input=stdin, capture_output=True, text=True, check=False, env=environment(**variables),
    )  # fmt: skip


def run_main(capsys, *arguments: object) -> tuple[int, str, str]:
    """Runs the program in this process: exit status, standard output and standard error."""
    hook = sys.unraisablehook  # which the program sets for its whole process
    try:
        status = cli.main([str(argument) for argument in arguments])
    except SystemExit as error:  # how tyro ends
        status = error.code
    finally:
        sys.unraisablehook = hook
    out, err = capsys.readouterr()
    return status, out, err


@pytest.fixture(scope="session")
def compiled_programs(tmp_path_factory):
    """A folder in which jax keeps what it compiles, for tests that train the same model again."""
    folder = tmp_path_factory.mktemp("compiled")
    compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    yield folder
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def tiny_experiment(tmp_path_factory, compiled_programs):
    """A short run on a little text, which is not trained yet."""
    folder = tmp_path_factory.mktemp("tiny")
    write_text(folder / "text")
    return make_experiment(folder)


@pytest.fixture(scope="session")
def tiny_summary(tiny_experiment):
    """The summary of that run, trained once; tests leave its folder as it is."""
    from glmjax.training.loop import fit

    return fit(tiny_experiment)
