"""The command `glmjax convert`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from glmjax.cli.quantize_flags import QuantizeFlags

HELP = """Writes a model in another format, a layer at a time; of the 257 GB of GLM-130B about six are in memory.

SRC is anything that glmjax opens: a folder of glmjax, of Hugging Face (safetensors or .bin) or of
tensor-parallel ranks (THUDM/GLM, GLM-130B), quantised or not. Bits stay as they are unless --dtype or
--quantize say otherwise. Until the copy is whole DST does not exist, only DST.unfinished; the same
command continues. PyTorch files need pip install "glmjax[torch]".

examples:
  glmjax convert chatglm-6b chatglm-6b-glmjax
  glmjax convert chatglm-6b chatglm-6b-int4 --quantize int4
  glmjax convert chatglm-6b small --quantize int4 --scheme zeropoint --group-size 128
  glmjax convert glm-130b-sat glm-130b-hf --to hf
  glmjax convert glm-130b-glmjax glm-130b-mp4 --to ranks --ranks 4
  glmjax convert chatglm-6b tuned --prefix ptuning/checkpoint-3000
  glmjax convert chatglm-6b advisor --lora advisor-lora --quantize int4
  glmjax convert runs/books books-hf --to hf --dtype float16"""


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
    integers: Annotated[QuantizeFlags, tyro.conf.OmitArgPrefixes] = field(
        default_factory=QuantizeFlags
    )
    prefix: str | None = None
    """A P-tuning v2 checkpoint, whose prefix becomes part of the model."""
    lora: str | None = None
    """A folder with a LoRA adapter of PEFT, which is added to the kernels before --quantize."""
    shard_gigabytes: float = 5.0
    """hf: size of a file."""
    verify: bool = False
    """First compare the files of SRC with the SHA-256 that SHA256SUMS beside them lists."""


def main(arguments: list[str]) -> int:
    flags = tyro.cli(ConvertFlags, args=arguments, prog="glmjax convert", description=HELP)

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
            ranks=flags.ranks, dtype=flags.dtype, quantize=flags.integers.quantization(),
            prefix=flags.prefix, lora=flags.lora,
            shard_bytes=round(flags.shard_gigabytes * 1e9),
            verify=flags.verify, progress=progress,
        )  # fmt: skip
    finally:
        if bar.live.is_started:
            bar.stop()
    print(f"{flags.target}: {config.name}, {count_params(config):,} parameters, as {flags.to}")
    return 0
