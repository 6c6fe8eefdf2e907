"""The program `glmjax`: each command is a function whose arguments are its flags."""

import dataclasses
import importlib.util
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from glmjax.config import Experiment

HELP = """usage: glmjax COMMAND ...

The GLM family in JAX. Commands:

  train EXPERIMENT   train a model; the same command again continues the run
  infill TEXT ...    fill the [MASK], [sMASK] and [gMASK] blanks of texts
  bench WHAT         measure speed: data, train, attention

`glmjax COMMAND --help` explains a command and gives examples.
"""

TRAIN_HELP = """Trains the model that an experiment file describes.

The file is Python with a function `experiment() -> glmjax.config.Experiment`; flags override its
fields. Run the same command again to continue a run that was stopped or killed.

examples:
  glmjax train experiments/quickstart.py
  glmjax train experiments/quickstart.py --train.run runs/books --data.path books/ --train.steps 2000
  glmjax train experiments/quickstart.py --data.tfds tiny_shakespeare --train.run runs/shakespeare
  glmjax train experiments/quickstart.py --mesh.fsdp 4 --json"""

INFILL_HELP = """Fills the blanks of texts with a trained model.

examples:
  glmjax infill --checkpoint runs/quickstart "The capital of France is [MASK]."
  glmjax infill --checkpoint runs/quickstart --temperature 0.8 --seed 1 "Return [MASK] of [MASK]."
  glmjax infill --checkpoint runs/quickstart "This function [gMASK]"
  glmjax infill --checkpoint runs/quickstart --json < texts.txt"""

BENCH_HELP = """Measures speed on this machine.

  data    rate of the input pipeline at length 2048, from a prepared corpus and on line
  train   a training step of 5M and 110M parameters, beside the same model in PyTorch if installed
  attention --gpu     milliseconds of all implementations on a GPU, beside FlexAttention; writes
                      experiments/results
  attention --static  cycles of the TPU kernels, compiled for chips that are not there, beside
                      splash attention; needs pip install "glmjax[tpu]", no TPU

examples:
  glmjax bench data
  glmjax bench train --json
  glmjax bench attention --static
  glmjax bench attention --static --chips v4 v5e v5p v6e
  glmjax bench attention --tune --chips v5p"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status. A mistake of the user's is one sentence on stderr."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    commands: dict[str, Callable[[list[str]], int]] = {
        "train": _train,
        "infill": _infill,
        "bench": _bench,
    }
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP)
        return 0
    name, *rest = arguments
    if name not in commands:
        print(f"glmjax: there is no command {name!r}; see glmjax --help", file=sys.stderr)
        return 2
    # On a terminal rich keeps messages clear of the progress bar; in a file it would wrap them.
    handler: logging.Handler = logging.StreamHandler()
    if sys.stderr.isatty():
        handler = RichHandler(console=Console(stderr=True), show_time=False, show_path=False)
    # An import may have set up logging already, as absl does.
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler], force=True)
    logging.getLogger("glmjax").setLevel(logging.INFO)
    sys.unraisablehook = _report_unraisable
    try:
        return commands[name](rest)
    except (ValueError, OSError, RuntimeError, ModuleNotFoundError) as error:
        if os.environ.get("GLMJAX_TRACEBACK"):
            raise
        print(f"glmjax {name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _report_unraisable(problem: Any) -> None:
    """Passes over the writes that end after their save has failed, which is reported by then."""
    if str(problem.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(problem)


def load_experiment(path: Path) -> Experiment:
    """The experiment that a Python file describes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file does not define `experiment() -> Experiment`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no experiment file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    make = getattr(module, "experiment", None)
    if make is None or not isinstance(experiment := make(), Experiment):
        raise ValueError(f"{path} does not define experiment() -> glmjax.config.Experiment")
    return experiment


def _train(arguments: list[str]) -> int:
    as_json = "--json" in arguments
    arguments = [argument for argument in arguments if argument != "--json"]
    default, program = Experiment(), "glmjax train EXPERIMENT"
    if arguments and not arguments[0].startswith("-"):
        default, program = load_experiment(Path(arguments[0])), f"glmjax train {arguments[0]}"
    elif not {"-h", "--help"} & set(arguments):
        raise ValueError("name an experiment file, such as experiments/quickstart.py")
    experiment = tyro.cli(
        Experiment,
        default=default,
        args=arguments[1:] if arguments and not arguments[0].startswith("-") else arguments,
        prog=program,
        description=TRAIN_HELP,
        config=(tyro.conf.AvoidSubcommands,),
    )

    from glmjax.training.loop import fit

    summary = fit(experiment)
    if as_json:
        print(json.dumps(dataclasses.asdict(summary)))
    elif summary.signal is None:
        _show_results(experiment, dataclasses.asdict(summary))
    if summary.signal is not None:
        print(
            f"stopped by {summary.signal} and saved at step {summary.steps}; "
            "the same command continues",
            file=sys.stderr,
        )
    return 130 if summary.signal == "SIGINT" else 0


def _show_results(experiment: Experiment, summary: dict[str, Any]) -> None:
    """A table of the run's numbers and a few held-out blanks filled by its newest checkpoint."""
    from glmjax.data.prepare import prepare
    from glmjax.inference.examples import fill_heldout
    from glmjax.training.checkpoint import load_model

    run = Path(experiment.train.run)
    console = Console()
    table = Table(title=str(run), show_header=False)
    gain = summary["unigram_loss"] - summary["heldout_loss"]
    for name, value in (
        ("parameters", f"{summary['parameters']:,}"),
        ("steps", f"{summary['steps']:,}"),
        ("tokens", f"{summary['tokens']:,}"),
        ("tokens per second", f"{summary['tokens_per_second']:,.0f}"),
        ("seconds", f"{summary['seconds']:.0f}"),
        ("held-out loss (nats per target)", f"{summary['heldout_loss']:.3f}"),
        ("unigram baseline", f"{summary['unigram_loss']:.3f}"),
        ("uniform baseline", f"{summary['uniform_loss']:.3f}"),
        ("below unigram by", f"{gain:.3f}"),
        ("loss curve", str(run / "loss.png")),
    ):
        table.add_row(name, value)
    console.print(table)

    config, params = load_model(run)
    corpora = prepare(experiment.data, experiment.objective)
    examples = Table("held-out sentence", "truth", "filled", title="blanks filled greedily")
    for example in fill_heldout(config, params, corpora, count=6):
        examples.add_row(*(_literal(text) for text in dataclasses.astuple(example)))
    console.print(examples)
    print(f'try: glmjax infill --checkpoint {run} "Return the [MASK] of the array."')


def _literal(text: str) -> str:
    """Text on one line that rich prints as it is."""
    return " ".join(text.split()).replace("[", r"\[")


@dataclass(frozen=True)
class InfillFlags:
    texts: tyro.conf.Positional[tuple[str, ...]] = ()
    """Texts with blanks; without any, one from each line of standard input."""
    checkpoint: Annotated[str, tyro.conf.arg(metavar="DIR")] = "runs/quickstart"
    """A run folder, its checkpoints, or a saved model beside its tokenizer.model."""
    max_new_tokens: int = 32
    """Longest filling of one blank, in tokens."""
    temperature: float = 0.0
    """0 takes the most probable token."""
    top_k: int = 0
    """Draw among so many most probable tokens; 0: all."""
    top_p: float = 1.0
    """Draw among the fewest tokens whose probabilities reach this sum."""
    seed: int = 0
    """The same seed and text give the same filling."""
    json: bool = False
    """One JSON object for each text."""


def _infill(arguments: list[str]) -> int:
    flags = tyro.cli(InfillFlags, args=arguments, prog="glmjax infill", description=INFILL_HELP)

    from glmjax.data.tokenizers import load_tokenizer
    from glmjax.inference.infill import infill_text
    from glmjax.inference.load import load
    from glmjax.inference.sampling import Sampling

    texts = list(flags.texts) or [line.rstrip("\n") for line in sys.stdin]
    config, params = load(flags.checkpoint)
    tokenizer = load_tokenizer(_find_tokenizer(Path(flags.checkpoint)))
    sampling = Sampling(flags.temperature, flags.top_k, flags.top_p, flags.seed)
    filled = infill_text(config, params, tokenizer, texts, flags.max_new_tokens, sampling)
    for text, result in zip(texts, filled, strict=True):
        print(json.dumps({"text": text, "filled": result}) if flags.json else result)
    return 0


def _find_tokenizer(checkpoint: Path) -> Path:
    """tokenizer.model of a run, for any folder inside the run."""
    for folder in (checkpoint, *checkpoint.resolve().parents[:2]):
        if (folder / "tokenizer.model").exists():
            return folder / "tokenizer.model"
    raise FileNotFoundError(f"there is no tokenizer.model in or above {checkpoint}")


@dataclass(frozen=True)
class BenchFlags:
    what: tyro.conf.Positional[Literal["data", "train", "attention"]]
    """What to measure."""
    json: bool = False
    """Print one JSON object instead of a table."""
    gpu: bool = False
    """attention: time it on the GPU of this machine."""
    static: bool = False
    """attention: count the cycles of compiled TPU kernels."""
    tune: bool = False
    """attention: look for the tile sizes with the fewest cycles and keep them."""
    chips: tuple[Literal["v4", "v5e", "v5p", "v6e"], ...] = ("v5p", "v6e")
    """attention: the TPU generations to compile for."""


def _bench(arguments: list[str]) -> int:
    flags = tyro.cli(BenchFlags, args=arguments, prog="glmjax bench", description=BENCH_HELP)
    if flags.what == "attention":
        results, show = _bench_attention(flags)
    else:
        module = importlib.import_module(f"glmjax.benchmarks.{flags.what}")
        results, show = module.run(), module.show
    if flags.json:
        print(json.dumps(results))
    else:
        show(results)
    return 0


def _bench_attention(flags: BenchFlags) -> tuple[dict[str, Any], Callable[[dict[str, Any]], None]]:
    if flags.gpu + flags.static + flags.tune != 1:
        raise ValueError("say what to do with attention: --gpu, --static or --tune")
    if flags.gpu:
        from glmjax.benchmarks import attention_gpu

        results = attention_gpu.run()
        attention_gpu.save(results)
        return results, attention_gpu.show
    if flags.tune:
        from glmjax.benchmarks import attention_tiles

        return attention_tiles.run(flags.chips), attention_tiles.show
    from glmjax.benchmarks import attention_static

    return attention_static.run(flags.chips), attention_static.show
