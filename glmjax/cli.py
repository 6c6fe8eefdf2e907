"""The program `glmjax`: each command is a function whose arguments are its flags."""

import dataclasses
import functools
import importlib.util
import json
import logging
import os
import sys
import time
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
  plan EXPERIMENT    say whether it fits on TPUs that are not there, and how fast it would be
  infill TEXT ...    fill the [MASK], [sMASK] and [gMASK] blanks of texts
  inspect PATH       say what a checkpoint holds, of whatever format
  convert SRC DST    write a model in another format: ours, Hugging Face's, tensor-parallel ranks
  bench WHAT         measure speed: data, train, attention, convert, pods

`glmjax COMMAND --help` explains a command and gives examples.
"""

TRAIN_HELP = """Trains the model that an experiment file describes.

The file is Python with a function `experiment() -> glmjax.config.Experiment`; FILE:FUNCTION takes
another function of it. Flags override fields. Run the same command again to continue a run that was
stopped or killed.

examples:
  glmjax train experiments/quickstart.py
  glmjax train experiments/quickstart.py --train.run runs/books --data.path books/ --train.steps 2000
  glmjax train experiments/quickstart.py --data.tfds tiny_shakespeare --train.run runs/shakespeare
  glmjax train experiments/quickstart.py --mesh.fsdp 4 --json"""

PLAN_HELP = """Says whether an experiment fits on TPUs that are not there, and how fast it would be.

Compiles the real step for them, on this machine; needs pip install "glmjax[plan]", no TPU and no
data. Flags override fields of the experiment as in `glmjax train`. A mesh for another number of
devices is arranged anew unless you give one. Plans are kept in --data.cache. See docs/planning.md.

examples:
  glmjax plan experiments/glm_130b.py --topology v5p:8x8x16
  glmjax plan experiments/glm_130b.py --topology v5p:8x8x16 --slices 2 --json
  glmjax plan experiments/glm_130b.py --topology v6e:16x16 --mesh.fsdp 32 --mesh.tensor 8
  glmjax plan experiments/glm_130b.py --topology v4:8x8x16 --search
  glmjax plan experiments/glm_130b.py --chips 1024 --generation v5p
  glmjax plan experiments/glm_130b.py --topology v5p:2x2x2 --job decode --batch 32 --length 2048"""

INFILL_HELP = """Fills the blanks of texts with a trained model.

examples:
  glmjax infill --checkpoint runs/quickstart "The capital of France is [MASK]."
  glmjax infill --checkpoint runs/quickstart --temperature 0.8 --seed 1 "Return [MASK] of [MASK]."
  glmjax infill --checkpoint runs/quickstart "This function [gMASK]"
  glmjax infill --checkpoint glm-10b --tokenizer gpt2-vocab.json "Paris is [MASK]."
  glmjax infill --checkpoint runs/quickstart --json < texts.txt"""

INSPECT_HELP = """Says what a checkpoint holds: format, model, exact number of parameters, types, and every
tensor that is missing, unexpected or of the wrong shape. Weights are not read. Exit status 1 when
something is wrong with it.

examples:
  glmjax inspect chatglm-6b
  glmjax inspect glm-130b-sat --json
  glmjax inspect runs/quickstart
  glmjax inspect chatglm-6b --verify"""

CONVERT_HELP = """Writes a model in another format, a layer at a time; of the 257 GB of GLM-130B about six are in memory.

SRC is anything that glmjax opens: a folder of glmjax, of Hugging Face (safetensors or .bin) or of
tensor-parallel ranks (THUDM/GLM, GLM-130B), quantised or not. Bits stay as they are unless --dtype or
--quantize say otherwise. Until the copy is whole DST does not exist, only DST.unfinished; the same
command continues. PyTorch files need pip install "glmjax[torch]".

examples:
  glmjax convert chatglm-6b chatglm-6b-glmjax
  glmjax convert chatglm-6b chatglm-6b-int4 --quantize int4
  glmjax convert glm-130b-sat glm-130b-hf --to hf
  glmjax convert glm-130b-glmjax glm-130b-mp4 --to ranks --ranks 4
  glmjax convert chatglm-6b tuned --prefix ptuning/checkpoint-3000
  glmjax convert runs/books books-hf --to hf --dtype float16"""

BENCH_HELP = """Measures speed on this machine.

  data    rate of the input pipeline at length 2048, from a prepared corpus and on line
  train   a training step of 5M and 110M parameters, beside the same model in PyTorch if installed
  attention --gpu     milliseconds of all implementations on a GPU, beside FlexAttention; writes
                      experiments/results
  attention --static  cycles of the TPU kernels, compiled for chips that are not there, beside
                      splash attention; needs pip install "glmjax[tpu]", no TPU
  convert conversions and loading of synthetic models of full width, their host memory and the disk
          beside them; takes 35 GB of the current folder and 10 minutes, needs
          pip install "glmjax[interop,torch]", writes docs/checkpoints.md
  pods    the training step of GLM-130B, compiled for pods that are not there, beside MaxText's;
          half an hour, needs pip install "glmjax[plan]", writes docs/pods.md

examples:
  glmjax bench data
  glmjax bench train --json
  glmjax bench attention --static
  glmjax bench attention --static --chips v4 v5e v5p v6e
  glmjax bench attention --tune --chips v5p
  glmjax bench convert"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status. A mistake of the user's is one sentence on stderr."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    commands: dict[str, Callable[[list[str]], int]] = {
        "train": _train,
        "plan": _plan,
        "infill": _infill,
        "inspect": _inspect,
        "convert": _convert,
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
        return getattr(error, "exit_status", 1)
    except KeyboardInterrupt:
        return 130


def _report_unraisable(problem: Any) -> None:
    """Passes over the writes that end after their save has failed, which is reported by then."""
    if str(problem.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(problem)


def load_experiment(path: Path) -> Experiment:
    """The experiment that a Python file describes, or a function of it named by FILE:FUNCTION.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file does not define `experiment() -> Experiment`, or that function.
    """
    file, _, function = str(path).partition(":")
    path, function = Path(file), function or "experiment"
    if not path.is_file():
        raise FileNotFoundError(f"there is no experiment file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    make = getattr(module, function, None)
    if make is None or not isinstance(experiment := make(), Experiment):
        raise ValueError(f"{path} does not define {function}() -> glmjax.config.Experiment")
    return experiment


def _named_experiment(command: str, arguments: list[str]) -> tuple[Experiment, str, list[str]]:
    """The experiment that the first argument names, the program's name, and the other arguments."""
    if arguments and not arguments[0].startswith("-"):
        name, *rest = arguments
        return load_experiment(Path(name)), f"glmjax {command} {name}", rest
    if not {"-h", "--help"} & set(arguments):
        raise ValueError("name an experiment file, such as experiments/quickstart.py")
    return Experiment(), f"glmjax {command} EXPERIMENT", arguments


def _train(arguments: list[str]) -> int:
    began = time.time()
    as_json = "--json" in arguments
    arguments = [argument for argument in arguments if argument != "--json"]
    default, program, arguments = _named_experiment("train", arguments)
    experiment = tyro.cli(
        Experiment,
        default=default,
        args=arguments,
        prog=program,
        description=TRAIN_HELP,
        config=(tyro.conf.AvoidSubcommands,),
    )

    from glmjax.training.distributed import RESTART, joined
    from glmjax.training.loop import fit

    with joined(experiment.distributed) as job:
        summary = fit(experiment, began)
    is_main = job is None or job.process == 0
    if as_json and is_main:
        print(json.dumps(dataclasses.asdict(summary)))
    elif summary.signal is None and is_main:
        _show_results(experiment, dataclasses.asdict(summary), examples=job is None)
    if summary.signal is None:
        return 0
    if is_main:
        print(
            f"stopped by {summary.signal} and saved at step {summary.steps}; "
            "the same command continues",
            file=sys.stderr,
        )
    if job is not None:
        return RESTART
    return 130 if summary.signal == "SIGINT" else 0


@dataclass(frozen=True)
class PlanFlags:
    experiment: Annotated[Experiment, tyro.conf.arg(name="")]
    topology: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """The slice, such as v5p:8x8x16 or v6e:16x16; v4, v5e, v5p, v6e and tpu7x are known."""
    slices: int = 1
    """How many such slices; mesh axis data counts them, over the data center network."""
    chips: int | None = None
    """Instead of a topology: search on so many chips of a generation."""
    generation: str | None = None
    """Generation of those chips, such as v5p."""
    search: bool = False
    """Try meshes, microbatch sizes and remat policies for the fastest that fits."""
    compile: int = 4
    """search: how many candidates are compiled to the end."""
    job: Literal["train", "decode"] = "train"
    """train: an optimizer step. decode: a token of every row, as in serving."""
    batch: int = 32
    """decode: rows that are decoded together."""
    length: int = 2048
    """decode: tokens that the cache of a row holds."""
    json: bool = False
    """Print one JSON object instead of tables."""


def _plan(arguments: list[str]) -> int:
    import jax

    # Nothing is computed here, and libtpu belongs to the process that compiles.
    jax.config.update("jax_platforms", "cpu")
    logging.getLogger("glmjax").setLevel(logging.WARNING)
    from glmjax.planning import arrange, report
    from glmjax.planning.plan import plan, plan_to_json
    from glmjax.planning.programs import Serving
    from glmjax.planning.search import search
    from glmjax.planning.topologies import Topology, find_topology

    default, program, arguments = _named_experiment("plan", arguments)
    flags = tyro.cli(
        PlanFlags,
        default=PlanFlags(default),
        args=arguments,
        prog=program,
        description=PLAN_HELP,
        config=(tyro.conf.AvoidSubcommands,),
    )
    if flags.topology is not None and flags.chips is None and flags.generation is None:
        topology = Topology(flags.topology, flags.slices)
    elif flags.topology is None and flags.chips is not None and flags.generation is not None:
        topology = find_topology(flags.generation, flags.chips)
    else:
        raise ValueError("give a --topology, or --chips and a --generation")
    experiment, console = flags.experiment, Console()
    if not console.is_terminal:
        console.width = 100
    serving = Serving(flags.batch, flags.length)
    if flags.search or flags.chips is not None:
        if flags.job != "train":
            raise ValueError("--search is for training; give a --topology for --job decode")
        log = Console(stderr=True, highlight=False)
        tell = functools.partial(log.print, soft_wrap=True)
        found = search(experiment, topology, flags.compile, report=tell)
        experiment, made = found[0].experiment, found[0].plan
        if not flags.json:
            report.show_found(found, console)
    else:
        if experiment.mesh == default.mesh:
            experiment = arrange.arrange(experiment, topology, flags.job)
        with Console(stderr=True).status(f"compiling for {topology}, which may take minutes"):
            made = plan(experiment, topology, job=flags.job, serving=serving)
    command = " ".join([program.replace(" plan ", " train "), *arrange.flags(experiment, default)])
    if flags.json:
        print(json.dumps(plan_to_json(made) | {"command": command}))
    else:
        report.show(made, console, command if flags.job == "train" else None)
    return 0


def _show_results(experiment: Experiment, summary: dict[str, Any], examples: bool) -> None:
    """A table of the run's numbers, and a few held-out blanks filled by its newest checkpoint."""
    from glmjax.data.prepare import prepare
    from glmjax.inference.examples import fill_heldout
    from glmjax.training.model_folder import load_model

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
    if not examples:
        return

    config, params = load_model(run)
    corpora = prepare(experiment.data, experiment.objective, config.special_tokens)
    table = Table("held-out sentence", "truth", "filled", title="blanks filled greedily")
    for example in fill_heldout(config, params, corpora, count=6):
        table.add_row(*(_literal(text) for text in dataclasses.astuple(example)))
    console.print(table)
    print(f'try: glmjax infill --checkpoint {run} "Return the [MASK] of the array."')


def _literal(text: str) -> str:
    """Text on one line that rich prints as it is."""
    return " ".join(text.split()).replace("[", r"\[")


@dataclass(frozen=True)
class InfillFlags:
    texts: tyro.conf.Positional[tuple[str, ...]] = ()
    """Texts with blanks; without any, one from each line of standard input."""
    checkpoint: Annotated[str, tyro.conf.arg(metavar="DIR")] = "runs/quickstart"
    """A run folder, its checkpoints, a saved model or an official one, beside its vocabulary."""
    tokenizer: Annotated[str | None, tyro.conf.arg(metavar="PATH")] = None
    """The vocabulary, a file or folder, where it is not in or above the checkpoint."""
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
    from glmjax.inference.sampling import Sampling
    from glmjax.interop.load import load

    texts = list(flags.texts) or [line.rstrip("\n") for line in sys.stdin]
    config, params = load(flags.checkpoint)
    vocabulary = flags.tokenizer or _find_tokenizer(Path(flags.checkpoint))
    tokenizer = load_tokenizer(vocabulary, config.special_tokens)
    sampling = Sampling(flags.temperature, flags.top_k, flags.top_p, flags.seed)
    filled = infill_text(config, params, tokenizer, texts, flags.max_new_tokens, sampling)
    for text, result in zip(texts, filled, strict=True):
        print(json.dumps({"text": text, "filled": result}) if flags.json else result)
    return 0


def _find_tokenizer(checkpoint: Path) -> Path:
    """The folder of the vocabulary: the checkpoint, or the run in which it is."""
    from glmjax.data.vocabulary_files import find_vocabularies

    folders = [checkpoint.expanduser(), *checkpoint.expanduser().resolve().parents[:2]]
    return next((folder for folder in folders if find_vocabularies(folder)), folders[0])


@dataclass(frozen=True)
class InspectFlags:
    path: tyro.conf.Positional[str]
    """A folder, or one of its files."""
    verify: bool = False
    """Also compare the files with the SHA-256 that SHA256SUMS beside them lists."""
    json: bool = False
    """Print one JSON object instead of a table."""


def _inspect(arguments: list[str]) -> int:
    flags = tyro.cli(InspectFlags, args=arguments, prog="glmjax inspect", description=INSPECT_HELP)

    from glmjax.interop import inspection

    report = inspection.inspect(flags.path, flags.verify)
    if flags.json:
        print(json.dumps(dataclasses.asdict(report)))
    else:
        inspection.show(report, Console())
    return 1 if report.problems else 0


@dataclass(frozen=True)
class ConvertFlags:
    source: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="SRC")]]
    """The model."""
    target: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="DST")]]
    """The folder to write, which must not exist yet."""
    to: Literal["glmjax", "hf", "ranks"] = "glmjax"
    """glmjax: for training and inference here. hf: safetensors and config.json as on Hugging Face.
    ranks: a PyTorch file for each tensor-parallel rank, as THUDM/GLM and GLM-130B read them."""
    ranks: int = 1
    """ranks: how many."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the floats; without it they stay what they are."""
    quantize: Literal["int8", "int4", "float"] | None = None
    """Make integers of the kernels in the blocks, by the official rule; float: make floats of them."""
    prefix: str | None = None
    """A P-tuning v2 checkpoint, whose prefix becomes part of the model."""
    shard_gigabytes: float = 5.0
    """hf: size of a file."""
    verify: bool = False
    """First compare the files of SRC with the SHA-256 that SHA256SUMS beside them lists."""


def _convert(arguments: list[str]) -> int:
    flags = tyro.cli(ConvertFlags, args=arguments, prog="glmjax convert", description=CONVERT_HELP)

    import jax

    jax.config.update("jax_platforms", "cpu")  # nothing is computed, and accelerators may be busy
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    from glmjax.interop.convert import convert
    from glmjax.model.params import count_params

    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
        TimeRemainingColumn(),
    )  # fmt: skip
    bar = Progress(*columns, console=Console(stderr=True))
    task = bar.add_task(Path(flags.target).name, total=None)

    def progress(done: int, total: int) -> None:
        bar.start()
        bar.update(task, completed=done, total=total)

    try:
        config = convert(
            flags.source, flags.target, flags.to,
            ranks=flags.ranks, dtype=flags.dtype, quantize=flags.quantize, prefix=flags.prefix,
            shard_bytes=round(flags.shard_gigabytes * 1e9), verify=flags.verify, progress=progress,
        )  # fmt: skip
    finally:
        if bar.live.is_started:
            bar.stop()
    print(f"{flags.target}: {config.name}, {count_params(config):,} parameters, as {flags.to}")
    return 0


@dataclass(frozen=True)
class BenchFlags:
    what: tyro.conf.Positional[Literal["data", "train", "attention", "convert", "pods"]]
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
