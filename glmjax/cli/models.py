"""Opening a model and its vocabulary, with a bar on the terminal and compiled programs kept."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from glmjax.config import GLMConfig
from glmjax.data.vocabularies import Tokenizer
from glmjax.model.params import Params


def open_model(
    checkpoint: str,
    tokenizer: str | None,
    check: Callable[[GLMConfig], None] = lambda config: None,
    **options: Any,
) -> tuple[GLMConfig, Params, Tokenizer]:
    """A model laid out for decoding, and its vocabulary, which is looked for in and above the
    checkpoint if not named. Both are checked before weights are read.

    `options` are those of `glmjax.load`; `check` raises ValueError if the model does not serve.
    """
    from glmjax.data.tokenizers import load_tokenizer
    from glmjax.interop.load import load
    from glmjax.interop.source import open_source

    _keep_programs()
    config = open_source(checkpoint, options.get("prefix")).config
    check(config)
    vocabulary = load_tokenizer(
        tokenizer or _find_tokenizer(Path(checkpoint)), config.special_tokens
    )
    with _bar(checkpoint, config.num_layers) as progress:
        config, params = load(checkpoint, for_decoding=True, progress=progress, **options)
    return config, params, vocabulary


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
