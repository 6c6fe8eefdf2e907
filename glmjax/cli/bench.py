"""The command `glmjax bench`."""

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import tyro

HELP = """Measures speed on this machine.

  data    rate of the input pipeline at length 2048, from a prepared corpus and on line
  train   a training step of 5M and 110M parameters, beside the same model in PyTorch if installed
  attention --gpu     milliseconds of all implementations on a GPU, beside FlexAttention; writes
                      experiments/results
  attention --static  cycles of the TPU kernels, compiled for chips that are not there, beside
                      splash attention; needs pip install "glmjax[tpu]", no TPU
  convert conversions and loading of synthetic models of full width, their host memory and the disk
          beside them; takes 35 GB of the current folder and 10 minutes, needs
          pip install "glmjax[interop,torch]", writes docs/checkpoints.md
  decode  tokens a second with float32, int8 and int4 weights of full width in 4 layers, beside
          `transformers` and PyTorch's own int8 and int4 if installed; takes 17 GB of memory;
          on a GPU or TPU bfloat16, int8 and int4
  serving memory of ChatGLM-6B and GLM-130B as they are served, compiled for TPUs and a GPU that are
          not there; half an hour, needs pip install "glmjax[plan,gpu]", writes docs/inference.md
  pods    the training step of GLM-130B, compiled for pods that are not there, beside MaxText's;
          half an hour, needs pip install "glmjax[plan]", writes docs/pods.md

examples:
  glmjax bench data
  glmjax bench train --json
  glmjax bench attention --static
  glmjax bench attention --static --chips v4 v5e v5p v6e
  glmjax bench attention --tune --chips v5p
  glmjax bench convert
  glmjax bench decode --write
  glmjax bench decode --model glm-130b --layers 70 --kinds int4"""


@dataclass(frozen=True)
class BenchFlags:
    what: tyro.conf.Positional[
        Literal["data", "train", "attention", "convert", "decode", "serving", "pods"]
    ]
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
    model: str = "chatglm-6b"
    """decode: the preset whose width the model has."""
    layers: int = 4
    """decode: how many layers it has."""
    rows: int = 1
    """decode: texts that are continued together."""
    kinds: tuple[Literal["float32", "bfloat16", "int8", "int4"], ...] = ()
    """decode: weights of the blocks; by default all that make sense on the device."""
    write: bool = False
    """decode: keep the results in experiments/results, and those of a CPU in docs/inference.md."""


def main(arguments: list[str]) -> int:
    flags = tyro.cli(BenchFlags, args=arguments, prog="glmjax bench", description=HELP)
    if flags.what == "attention":
        results, show = _bench_attention(flags)
    elif flags.what == "decode":
        from glmjax.benchmarks import decode

        results = decode.run(
            flags.model, flags.layers, flags.rows, kinds=flags.kinds, write=flags.write
        )
        show = decode.show
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
