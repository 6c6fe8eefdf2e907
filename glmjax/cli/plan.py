"""The command `glmjax plan`."""

import functools
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from glmjax.cli.experiments import named_experiment
from glmjax.cli.quantize_flags import QuantizeFlags
from glmjax.config import DataConfig, Experiment, MeshConfig, ObjectiveConfig, replace
from glmjax.presets import get_config, list_configs

HELP = """Says whether an experiment fits on TPUs that are not there, and how fast it would be.

Compiles the real step for them, on this machine; needs pip install "glmjax[plan]", no TPU and no
data. Flags override fields of the experiment as in `glmjax train`. A mesh for another number of
devices is arranged anew unless you give one. Plans are kept in --data.cache. See docs/planning.md.

For serving, --job decode, the name of a published model will do in place of an experiment. What is
compiled then is a token of every row, and the feeding of a prompt beside them.

examples:
  glmjax plan experiments/glm_130b.py --topology v5p:8x8x16
  glmjax plan experiments/glm_130b.py --topology v5p:8x8x16 --slices 2 --json
  glmjax plan experiments/glm_130b.py --topology v6e:16x16 --mesh.fsdp 32 --mesh.tensor 8
  glmjax plan experiments/glm_130b.py --topology v4:8x8x16 --search
  glmjax plan experiments/glm_130b.py --chips 1024 --generation v5p
  glmjax plan experiments/glm_130b.py --topology v5p:2x2x2 --job decode --batch 32 --length 2048
  glmjax plan chatglm-6b --topology v5e:1x1 --job decode --quantize int4 --batch 1 --length 2048
  glmjax plan glm-130b --topology v6e:2x4 --job decode --quantize int4 --model.cache-dtype int8"""


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
    """train: an optimizer step. decode: serving."""
    batch: int = 32
    """decode: rows that are decoded together."""
    length: int = 2048
    """decode: tokens that the cache of a row holds."""
    prompt: int | None = None
    """decode: tokens of the longest prompt, of those of the cache; all unless given."""
    integers: Annotated[QuantizeFlags, tyro.conf.OmitArgPrefixes] = field(
        default_factory=QuantizeFlags
    )
    json: bool = False
    """Print one JSON object instead of tables."""


def main(arguments: list[str]) -> int:
    import jax

    # Nothing is computed here, and libtpu belongs to the process that compiles.
    jax.config.update("jax_platforms", "cpu")
    logging.getLogger("glmjax").setLevel(logging.WARNING)
    from glmjax.planning import arrange, report
    from glmjax.planning.plan import plan, plan_to_json
    from glmjax.planning.programs import Serving
    from glmjax.planning.search import search
    from glmjax.planning.topologies import Topology, find_topology

    name = arguments[0] if arguments else ""
    is_model = name in list_configs() and not Path(name).exists()
    if is_model:
        default, program, arguments = _serve(name), f"glmjax plan {name}", arguments[1:]
    else:
        default, program, arguments = named_experiment("plan", arguments)
    flags = tyro.cli(
        PlanFlags,
        default=PlanFlags(default),
        args=arguments,
        prog=program,
        description=HELP,
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
    serving = Serving(flags.batch, flags.length, flags.prompt)
    quantization = flags.integers.quantization()
    if flags.job == "train" and (is_model or quantization is not None):
        raise ValueError(
            "the name of a model and --quantize are for --job decode; to train name an experiment"
        )
    if quantization is not None:
        quantization = None if quantization == "float" else quantization
        experiment = replace(experiment, **{"model.quantization": quantization})
    prefill = None
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
            if flags.job == "decode":
                prefill = plan(experiment, topology, job="prefill", serving=serving)
    command = " ".join([program.replace(" plan ", " train "), *arrange.flags(experiment, default)])
    if flags.json:
        values = plan_to_json(made) | {"command": command}
        if prefill is not None:
            values |= {"fits": made.fits and prefill.fits, "prefill": plan_to_json(prefill)}
        print(json.dumps(values))
    else:
        report.show(made, console, command if flags.job == "train" else None, prefill)
    return 0


def _serve(name: str) -> Experiment:
    """A published model in bfloat16, in an experiment that is not to be trained."""
    model = get_config(name, dtype="bfloat16")
    return Experiment(
        model=model,
        objective=ObjectiveConfig(positions="1d" if model.positions_1d else "2d"),
        data=DataConfig(sequence_length=model.max_positions),
        mesh=MeshConfig(data=1),
    )
