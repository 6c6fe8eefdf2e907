"""Opening a model and its vocabulary, with a bar on the terminal and compiled programs kept."""

import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from glmjax.cli.quantize_flags import QuantizeFlags
from glmjax.config import GLMConfig, MeshConfig, replace
from glmjax.data.vocabularies import Tokenizer
from glmjax.model.params import Params


@dataclass(frozen=True)
class ModelFlags:
    """How `chat` and `infill` open a model."""

    tokenizer: Annotated[str | None, tyro.conf.arg(metavar="PATH")] = None
    """The vocabulary, a file or folder, where it is not in or above the checkpoint."""
    integers: Annotated[QuantizeFlags, tyro.conf.OmitArgPrefixes] = field(
        default_factory=QuantizeFlags
    )
    """What becomes integers while loading."""
    prefix: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """A P-tuning v2 checkpoint to put in front."""
    lora: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """A LoRA adapter of PEFT to add."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of activations and products; without it float32 on CPUs and bfloat16 elsewhere."""
    cache_dtype: Literal["float32", "bfloat16", "int8"] | None = None
    """Type of cached keys and values; without it bfloat16 in a chat, else that of --dtype."""
    tensor: int | None = None
    """So many devices share the heads and the width of every layer; without it one CPU, or as many of
    the accelerators as can."""


Model = Annotated[ModelFlags, tyro.conf.OmitArgPrefixes]


@contextmanager
def opened_model(
    checkpoint: str, flags: ModelFlags, check: Callable[[GLMConfig], None] = lambda config: None
) -> Iterator[tuple[GLMConfig, Params, Tokenizer]]:
    """A model laid out for decoding, and its vocabulary, which is looked for in and above the
    checkpoint if not named; under the mesh of the devices that share it. Both are checked before
    weights are read; `check` raises ValueError if the model does not serve.
    """
    import jax

    from glmjax.data.tokenizers import load_tokenizer
    from glmjax.interop.load import load
    from glmjax.interop.source import open_source

    _keep_programs()
    quantize = flags.integers.quantization()
    config = open_source(checkpoint, flags.prefix).config
    check(config)
    vocabulary = load_tokenizer(
        flags.tokenizer or _find_tokenizer(Path(checkpoint)), config.special_tokens
    )
    on_cpu = jax.default_backend() == "cpu"
    dtype = flags.dtype or ("float32" if on_cpu else "bfloat16")
    with _shared(config, flags.tensor, on_cpu):
        with _bar(checkpoint, config.num_layers) as progress:
            config, params = load(
                checkpoint, dtype=None if on_cpu else "bfloat16", quantize=quantize,
                prefix=flags.prefix, lora=flags.lora, for_decoding=True, progress=progress,
            )  # fmt: skip
        yield replace(config, dtype=dtype, cache_dtype=flags.cache_dtype), params, vocabulary


def _shared(config: GLMConfig, tensor: int | None, on_cpu: bool) -> AbstractContextManager[Any]:
    """The mesh of so many devices, unless it is one."""
    import jax

    from glmjax.sharding import make_mesh

    devices = jax.devices()
    sizes = config.kv_heads, config.ffn_size, config.vocab_size
    if tensor is None:
        tensor = 1 if on_cpu else math.gcd(len(devices), *sizes)
    if not 1 <= tensor <= len(devices):
        raise ValueError(f"--tensor {tensor} needs as many devices; there are {len(devices)}")
    if tensor == 1:
        return nullcontext()
    return jax.set_mesh(make_mesh(MeshConfig(tensor=tensor), devices[:tensor]))


def _keep_programs() -> None:
    """Keeps what is compiled for the next start, unless jax is told where or that it should not."""
    import jax

    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        jax.config.update("jax_compilation_cache_dir", str(home / "glmjax" / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


@contextmanager
def _bar(checkpoint: str, num_layers: int) -> Iterator[Callable[[tuple[str, int | None]], None]]:
    """A bar that counts layers as their parts are read; nothing where no one sees it."""
    columns = (
        TextColumn("loading {task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("layers"), TimeRemainingColumn(),
    )  # fmt: skip
    shown = sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not shown) as bar:
        task = bar.add_task(Path(checkpoint).name, total=num_layers)

        def progress(key: tuple[str, int | None]) -> None:
            if key[1] is not None:
                bar.update(task, completed=key[1] + 1)

        yield progress


def _find_tokenizer(checkpoint: Path) -> Path:
    """The folder of the vocabulary: the checkpoint, or the run in which it is."""
    from glmjax.data.vocabulary_files import find_vocabularies

    folders = [checkpoint.expanduser(), *checkpoint.expanduser().resolve().parents[:2]]
    return next((folder for folder in folders if find_vocabularies(folder)), folders[0])
