"""LoRA adapters (Hu et al. 2021) in the format of PEFT, added to a model's kernels while it is read.

A folder holds adapter_config.json and the factors A [r, inputs] and B [outputs, r] of official
matrices W, which become W + s B A. The scale s is lora_alpha / r, or lora_alpha / sqrt(r) for
rank-stabilised adapters (Kalajdzievski 2023). Source: huggingface/peft `tuners/lora/`.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from glmjax.interop import layout, safetensors_files, torch_files
from glmjax.interop.json_files import read_json
from glmjax.interop.names import family_of
from glmjax.interop.official import FLOATS
from glmjax.interop.places import Place, Places, find_places, tensor_shapes
from glmjax.interop.source import Source
from glmjax.interop.tensors import Stored, is_finite, one_line
from glmjax.interop.transform import Quantize, transform
from glmjax.model.parts import Part

CONFIG = "adapter_config.json"
_READERS = {
    "adapter_model.safetensors": safetensors_files.open_file,
    "adapter_model.bin": torch_files.open_file,
}
_FACTOR = re.compile(r"(?:base_model\.model\.)?(?:glm\.)?(.+)\.lora_([AB])\.weight")
"""PEFT wraps the model, and transformers wraps THUDM/GLM in one with a head."""

_KEEPS_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
"""First values of the factors beside which the weights of the model stay what they were."""
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode",
    "peft_version", "lora_dropout", "layers_pattern", "megatron_core",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size",
    "runtime_config", "ensure_weight_tying", "merge_weights", "peft_type", "init_lora_weights",
}  # fmt: skip
"""Settings that do not change what the factors mean. What is neither here nor in `Settings` has to be
off, so that what a newer PEFT invents is refused and not ignored."""


@dataclass(frozen=True)
class Settings:
    """What adapter_config.json says about the factors, in the words of PEFT."""

    r: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    """r of the modules of these names, whole or behind a dot."""
    alpha_pattern: Mapping[str, float]
    target_modules: tuple[str, ...]
    """Last parts of the names of modules that have factors; (): those that the file has."""
    layers_to_transform: tuple[int, ...] | None
    """None: all."""

    def rank(self, module: str) -> int:
        return _find(self.rank_pattern, module, self.r)

    def scale(self, module: str) -> float:
        rank = self.rank(module)
        alpha = _find(self.alpha_pattern, module, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def targets(self, modules: Iterable[str]) -> list[str]:
        """Those of the modules that should have factors."""
        return [
            module for module in modules
            if any(f".{module}".endswith(f".{name}") for name in self.target_modules)
            and (
                self.layers_to_transform is None
                or any(f".{n}." in module for n in self.layers_to_transform)
            )
        ]  # fmt: skip


class Factors(NamedTuple):
    """What is added to an official matrix: scale B A."""

    a: Stored
    b: Stored
    scale: float

    def rows(self, first: int, count: int) -> np.ndarray:
        """Some rows of it in float32."""
        b = self.b.read()[first:][:count].astype(np.float32)
        return (np.float32(self.scale) * b) @ self.a.read().astype(np.float32)


def merge(source: Source, path: str | Path, quantize: Quantize | None = None) -> Source:
    """The model with the adapter in a folder added to its kernels, part by part as they are read.

    W + s B A is computed in float32 and rounded to the type of W. With `quantize` = "float" kernels
    of a quantised model are made floats first.

    Raises:
        FileNotFoundError: the folder lacks the configuration or the tensors.
        RuntimeError: a .bin file needs PyTorch 2.10.
        ValueError: the model is quantised; the adapter is no LoRA or has settings that are not known
            here; or lists every missing, unexpected, wrongly shaped and wrongly typed tensor.
    """
    path = Path(path).expanduser()
    if source.config.quantization is not None:
        if quantize != "float":
            raise ValueError(
                f"{source.path} is quantised, and an adapter is added to floats: load the float16 "
                'weights and quantise those, or make floats of these with quantize="float"'
            )
        config, parts = transform(source.config, source.parts, None, "float")
        source = replace(source, config=config, parts=parts)
    places = find_places(source.config, source.family or family_of(source.config))
    adapter = read_adapter(path, places)
    parts = dict(source.parts)
    for key, found in places.items():
        changes = [(place, adapter[place.tensor]) for place in found if place.tensor in adapter]
        if changes:
            parts[key] = _changed(parts[key], changes)
    return replace(source, parts=parts)


def read_adapter(folder: Path, places: Places) -> dict[str, Factors]:
    """The factors of an adapter, by the official name of the matrix that they change.

    Raises:
        FileNotFoundError, RuntimeError, ValueError: as `merge`.
    """
    settings = read_settings(folder / CONFIG)
    file = next((folder / name for name in _READERS if (folder / name).is_file()), None)
    if file is None:
        raise FileNotFoundError(f"{folder} has no {' or '.join(_READERS)}")
    shapes, names = tensor_shapes(places), _kernels(places)
    modules = {name.removesuffix(".weight"): shapes[name] for name in names}
    held: dict[str, dict[str, Stored]] = {module: {} for module in settings.targets(modules)}
    problems = []
    for name, stored in _READERS[file.name](file).items():
        match = _FACTOR.fullmatch(name)
        if match is None or match[1] not in modules:
            problems.append(f"unexpected: {name} {list(stored.shape)}")
        else:
            held.setdefault(match[1], {})[match[2]] = stored
    if not (held or problems):
        raise ValueError(f"{file} holds no factors of an adapter")
    for module, factors in held.items():
        problems += _problems(module, modules[module], settings.rank(module), factors)
    if problems:
        lines = "\n  ".join(problems)
        raise ValueError(f"the adapter in {folder} does not fit the model:\n  {lines}")
    return {
        f"{module}.weight": Factors(factors["A"], factors["B"], settings.scale(module))
        for module, factors in held.items()
    }


def read_settings(file: Path) -> Settings:
    """The settings in an adapter_config.json.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the adapter is no LoRA, has settings that are not known here, or wrong ones.
    """
    fields = read_json(file)
    if fields.get("peft_type") != "LORA":
        raise ValueError(f"{file} has peft_type {_text(fields.get('peft_type'))}, not 'LORA'")
    known = _HARMLESS | {field.name for field in dataclasses.fields(Settings)} | {"exclude_modules"}
    refused = {
        name: value for name, value in fields.items()
        if name not in known and value not in (None, False, "none", [], {})
    }  # fmt: skip
    if fields.get("init_lora_weights") not in _KEEPS_BASE:
        refused["init_lora_weights"] = fields["init_lora_weights"]
    if refused:
        settings = ", ".join(f"{one_line(name)} = {_text(x)}" for name, x in refused.items())
        raise ValueError(f"{file} has settings that glmjax cannot merge: {settings}")
    patterns = {name: fields.get(name) or {} for name in ("rank_pattern", "alpha_pattern")}
    layers = fields.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    targets = fields.get("target_modules")
    if not isinstance(targets, list) or fields.get("exclude_modules"):
        targets = []  # A text is a regular expression, or all-linear.
    wrong = {
        "r": not _positive(fields.get("r"), int),
        "lora_alpha": not _positive(fields.get("lora_alpha"), int | float),
        "rank_pattern": not _is_pattern(patterns["rank_pattern"], int),
        "alpha_pattern": not _is_pattern(patterns["alpha_pattern"], int | float),
        "target_modules": not all(isinstance(name, str) for name in targets),
        "layers_to_transform": layers is not None and not (
            isinstance(layers, list) and all(isinstance(n, int) for n in layers)
        ),
    }  # fmt: skip
    if any(wrong.values()):
        settings = ", ".join(f"{name} = {_text(fields.get(name))}" for name in wrong if wrong[name])
        raise ValueError(f"{file} has settings that mean nothing: {settings}")
    return Settings(
        fields["r"], fields["lora_alpha"], bool(fields.get("use_rslora")), **patterns,
        target_modules=tuple(targets),
        layers_to_transform=None if layers is None else tuple(layers),
    )  # fmt: skip


def _text(value: object) -> str:
    return one_line(repr(value))


def _positive(value: object, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and value > 0


def _is_pattern(pattern: object, kind: Any) -> bool:
    """Whether it maps names to numbers. PEFT takes the names for regular expressions; here their dots
    and a leading ^ alone are."""
    return isinstance(pattern, dict) and all(
        re.fullmatch(r"\^?[\w.\\]+", name) and _positive(value, kind)
        for name, value in pattern.items()
    )


def _find(pattern: Mapping[str, Any], module: str, otherwise: Any) -> Any:
    """The value of the first name that is the module's, whole or, without a ^, behind a dot."""
    for name, value in pattern.items():
        plain = name.replace("\\.", ".")
        if module == plain.removeprefix("^") or module.endswith(f".{plain}"):
            return value
    return otherwise


def _kernels(places: Places) -> list[str]:
    """Official names of the matrices of the blocks."""
    return [
        place.tensor
        for (name, _), found in places.items() if re.fullmatch(r"blocks\..+\.kernel", name)
        for place in found
    ]  # fmt: skip


def _problems(
    module: str, shape: tuple[int, ...], rank: int, factors: Mapping[str, Stored]
) -> Iterator[str]:
    outputs, inputs = shape
    for letter, wanted in (("A", [rank, inputs]), ("B", [outputs, rank])):
        name = f"{module}.lora_{letter}.weight"
        if letter not in factors:
            yield f"missing: {name} {wanted}"
            continue
        factor = factors[letter]
        if list(factor.shape) != wanted:
            yield f"wrong shape: {name} {list(factor.shape)}, expected {wanted}"
        if factor.dtype.name not in FLOATS:
            yield f"wrong type: {name} {factor.dtype}, expected {' or '.join(FLOATS)}"
        elif not is_finite(factor.read()):
            yield f"NaN or infinity: {name}"


def _changed(part: Part, changes: Sequence[tuple[Place, Factors]]) -> Part:
    """The part with what is added to each of its places."""

    def read() -> np.ndarray:
        kernel = part.read().astype(np.float32)
        for place, factors in changes:
            rows = factors.rows(place.first_row, place.shape[0])
            kernel[place.entry] += layout.from_official(
                place.layout, place.spec.axes, place.spec.shape, rows
            )
        with np.errstate(over="ignore"):
            changed = kernel.astype(part.dtype)
        if not is_finite(changed):
            names = " and ".join(place.tensor for place, _ in changes)
            raise ValueError(f"{names} with the adapter is larger than {part.dtype} can be")
        return changed

    return part._replace(read=read)
