"""What a folder of official weights holds: its format, files, tensors and configuration.

THUDM/GLM and GLM-130B name the iteration in `latest` or `latest_checkpointed_iteration.txt` and
keep one file for each tensor-parallel rank in a folder of that name. Hugging Face folders hold
safetensors or .bin files, of which the first win; an index says which of several has a tensor.
"""

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from glmjax.interop import safetensors_files, torch_files
from glmjax.interop.json_files import MAX_BYTES, read_json
from glmjax.interop.tensors import Stored

Tensors = Mapping[str, Stored]

TRACKERS = ("latest", "latest_checkpointed_iteration.txt")
CONFIGS = ("config.json", "model_config.json")
CHECKSUMS = "SHA256SUMS"
JOURNAL = "written-so-far.txt"
"""What of a folder is whole while it is written; it is removed at the end."""
_HUGGING_FACE = {"model.safetensors": "model", "pytorch_model.bin": "pytorch_model"}
_READERS: dict[str, Callable[[Path], Tensors]] = {
    ".safetensors": safetensors_files.open_file,
    ".bin": torch_files.open_file,
    ".pt": torch_files.open_file,
}
_RANK_FILE = re.compile(r"mp_rank_(\d\d|[1-9]\d\d)_model_states\.pt")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")
_WRAPPED = "glm."
"""Before all names where `transformers` saved a glm-* model with a head."""
_MAX_PROBLEMS = 20


@dataclass(frozen=True)
class OfficialFolder:
    """The tensors of one official checkpoint.

    `ranks` has one dictionary for each tensor-parallel rank; a Hugging Face folder has one, over
    all its files. `config` is what config.json or model_config.json says, None without such a file.
    """

    path: Path
    kind: Literal["hugging face", "ranks"]
    files: tuple[Path, ...]
    ranks: tuple[Tensors, ...]
    iteration: int | str | None = None
    config_file: Path | None = None
    config: Mapping[str, Any] | None = None


def open_folder(path: str | Path) -> OfficialFolder | None:
    """The official checkpoint at a path, a folder or one of its files; None if it is no such thing.

    Only names, headers and configurations are read, and nothing but these names inside the folder:
    an index or a tracker file holds plain names, never a path. A file may itself be a symbolic
    link, as in the cache of Hugging Face: whoever owns the folder made it, not the text in it.

    Raises:
        FileNotFoundError: there is nothing at the path, or files that belong to the rest are missing.
        RuntimeError: .bin and .pt files need PyTorch 2.10.
        ValueError: the files are damaged or contradict each other.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}")
    for folder in (path, *path.parents[:2]):
        if (folder / JOURNAL).exists():
            raise ValueError(
                f"{folder} is the beginning of a checkpoint; the same glmjax convert completes it"
            )
    if path.is_file():
        if _RANK_FILE.fullmatch(path.name):
            return _open_ranks(path.parent.parent, path.parent)
        if path.suffix not in _READERS:
            return None
        return _hugging_face(path.parent, {path: _READERS[path.suffix](path)})
    iteration = _iteration(path)
    if iteration is not None:
        folder = path / iteration
        if not folder.is_dir():
            raise FileNotFoundError(f"{path} names iteration {iteration}, but {folder} is missing")
        return _open_ranks(path, folder)
    if any(_RANK_FILE.fullmatch(file.name) for file in path.iterdir()):
        return _open_ranks(path.parent, path)
    return _open_hugging_face(path)


def verify_sha256(file: Path, expected: str) -> None:
    """Raises ValueError if a file has another SHA-256 than the expected 64 hexadecimal digits."""
    with open(file, "rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != expected.lower():
        raise ValueError(f"{file} has SHA-256 {found}, not {expected.lower()}")


def expected_sha256(folder: Path) -> dict[Path, str]:
    """SHA-256 of files as the folder's SHA256SUMS lists them, in the format of `sha256sum`.

    Raises:
        ValueError: a line is malformed, or names a file outside the folder.
    """
    file = folder / CHECKSUMS
    if not file.is_file():
        return {}
    if file.stat().st_size > MAX_BYTES:
        raise ValueError(f"{file} has {file.stat().st_size:,} bytes, more than 100 MB")
    sums = {}
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        match = re.fullmatch(r"([0-9a-fA-F]{64}) [ *](?:\./)?(.+)", line)
        if match is None:
            raise ValueError(f"{file} has a line that is no SHA-256 and name: {line[:100]!r}")
        digest, name = match.groups()
        if not all(_PLAIN_NAME.fullmatch(part) for part in name.split("/")):
            raise ValueError(f"{file} names {name!r}, which is not a file in its folder")
        sums[folder / name] = digest
    return sums


def _iteration(folder: Path) -> str | None:
    """What the tracker files say, None if there is none."""
    found = {}
    for name in TRACKERS:
        file = folder / name
        if file.is_file():
            with open(file, "rb") as opened:
                text = opened.read(1000).decode("utf-8", "replace").strip()
            if not _PLAIN_NAME.fullmatch(text):
                raise ValueError(f"{file} holds {text[:100]!r}, not an iteration or release")
            found[text] = file.name
    if len(found) > 1:
        raise ValueError(
            f"{folder} has two iterations: "
            + " and ".join(f"{name} says {text}" for text, name in found.items())
        )
    return next(iter(found), None)


def _open_ranks(root: Path, folder: Path) -> OfficialFolder:
    files = {
        int(match[1]): file
        for file in folder.iterdir()
        if (match := _RANK_FILE.fullmatch(file.name))
    }
    missing = sorted(set(range(max(files, default=0) + 1)) - files.keys())
    if missing:
        names = ", ".join(f"mp_rank_{rank:02}_model_states.pt" for rank in missing[:_MAX_PROBLEMS])
        raise FileNotFoundError(f"{folder} lacks {names}")
    files = dict(sorted(files.items()))
    ranks = tuple(torch_files.open_file(file) for file in files.values())
    _check_ranks_agree(folder, ranks)
    tag = folder.name
    config_file = _find(CONFIGS, root, folder, root.parent)
    return OfficialFolder(
        path=folder, kind="ranks", files=tuple(files.values()), ranks=ranks,
        iteration=int(tag) if tag.isdecimal() else tag,
        config_file=config_file, config=read_json(config_file) if config_file else None,
    )  # fmt: skip


def _check_ranks_agree(folder: Path, ranks: tuple[Tensors, ...]) -> None:
    first, problems = ranks[0], []
    for number, rank in enumerate(ranks[1:], start=1):
        problems += [f"rank {number} lacks {name}" for name in first if name not in rank]
        for name, stored in rank.items():
            if name not in first:
                problems.append(f"only rank {number} has {name}")
            elif (stored.dtype, stored.shape) != (first[name].dtype, first[name].shape):
                problems.append(
                    f"{name} is {first[name].dtype} {list(first[name].shape)} in rank 0 "
                    f"and {stored.dtype} {list(stored.shape)} in rank {number}"
                )
    _report(f"the ranks in {folder} disagree", problems)


def _open_hugging_face(folder: Path) -> OfficialFolder | None:
    for name, stem in _HUGGING_FACE.items():
        single, index = folder / name, folder / f"{name}.index.json"
        if single.exists() or single.is_symlink():
            return _hugging_face(folder, {single: _READERS[single.suffix](single)})
        if index.is_file():
            return _hugging_face(folder, _open_index(index, stem))
        if _shards(folder, stem, single.suffix):
            raise FileNotFoundError(f"{folder} has parts of {name}, but {index.name} is missing")
    return None


def _hugging_face(folder: Path, tensors: Mapping[Path, Tensors]) -> OfficialFolder:
    config_file = _find(CONFIGS, folder)
    merged = {name: stored for part in tensors.values() for name, stored in part.items()}
    if all(name.startswith(_WRAPPED) for name in merged):
        merged = {name.removeprefix(_WRAPPED): stored for name, stored in merged.items()}
    return OfficialFolder(
        path=folder, kind="hugging face", files=tuple(tensors), ranks=(merged,),
        config_file=config_file, config=read_json(config_file) if config_file else None,
    )  # fmt: skip


def _shards(folder: Path, stem: str, suffix: str) -> set[str]:
    """Names of the files that an index beside them should name."""
    return {file.name for file in folder.glob(f"{stem}-*-of-*{suffix}")}


def _open_index(index: Path, stem: str) -> dict[Path, Tensors]:
    """The tensors of each file that an index names, after checking that each is where it says.

    Its total_size is not looked at: that of the official ChatGLM-6B is stale.
    """
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{index} has no weight_map from tensors to files")
    suffix = Path(index.name.removesuffix(".index.json")).suffix
    for name, place in places.items():
        if not (isinstance(place, str) and _PLAIN_NAME.fullmatch(place) and place.endswith(suffix)):
            raise ValueError(
                f"{index} puts {name!r} into {place!r:.100}, not a {suffix} file beside it"
            )
    files = {name: index.parent / name for name in sorted(set(places.values()))}
    missing = [name for name, file in files.items() if not file.exists()]
    if missing:
        raise FileNotFoundError(f"{index.parent} lacks {', '.join(missing[:_MAX_PROBLEMS])}")
    parts = {name: _READERS[suffix](file) for name, file in files.items()}
    problems = [
        f"it does not name {name}" for name in _shards(index.parent, stem, suffix) - set(files)
    ]
    problems += [
        f"{name!r} is not in {place}" for name, place in places.items() if name not in parts[place]
    ]
    problems += [
        f"{name} in {place} is not in the index"
        for place, part in parts.items() for name in part
        if places.get(name) != place
    ]  # fmt: skip
    _report(f"{index} does not fit its files", problems)
    return {files[name]: part for name, part in parts.items()}


def _find(names: tuple[str, ...], *folders: Path) -> Path | None:
    candidates = (folder / name for folder in folders for name in names)
    return next((file for file in candidates if file.is_file()), None)


def _report(what: str, problems: list[str]) -> None:
    if problems:
        shown = "; ".join(problems[:_MAX_PROBLEMS])
        more = len(problems) - _MAX_PROBLEMS
        raise ValueError(f"{what}: {shown}" + (f"; and {more} more" if more > 0 else ""))
