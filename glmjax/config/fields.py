"""What all configurations have in common: changed copies, JSON, and checks of single fields."""

import dataclasses
import difflib
import re
from typing import Any, TypeVar, get_args, get_type_hints

Config = TypeVar("Config")


def replace(config: Config, **changes: Any) -> Config:
    """A copy of a configuration with some fields changed; dots reach into nested ones.

    `replace(experiment, **{"train.steps": 10})` is what `--train.steps 10` does.

    Raises:
        ValueError: a field is unknown; the nearest known one is named.
    """
    nested: dict[str, dict[str, Any]] = {}
    for path, value in changes.items():
        head, _, rest = path.partition(".")
        names = [f.name for f in dataclasses.fields(config)]  # type: ignore[arg-type]
        if head not in names:
            near = difflib.get_close_matches(head, names, n=1, cutoff=0)[0]
            raise ValueError(
                f"{type(config).__name__} has no field {head!r}; the nearest is {near!r}"
            )
        if rest:
            nested.setdefault(head, {})[rest] = value
        else:
            nested[head] = {"": value}
    values = {
        head: inner[""] if "" in inner else replace(getattr(config, head), **inner)
        for head, inner in nested.items()
    }
    return dataclasses.replace(config, **values)  # type: ignore[type-var]


def config_to_json(config: Any) -> dict[str, Any]:
    """A configuration as nested dictionaries, ready for `json.dumps`."""
    return dataclasses.asdict(config)


def config_from_json(kind: type[Config], values: dict[str, Any]) -> Config:
    """The configuration that `config_to_json` wrote; fields it lacks take their defaults.

    Raises:
        ValueError: a field is unknown, or one without a default is missing.
    """
    hints = get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ValueError(f"{kind.__name__} has no field {', '.join(map(repr, unknown))}")
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    required = [f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING]
    missing = sorted(set(required) - set(values))
    if missing:
        raise ValueError(f"{kind.__name__} lacks the field {', '.join(map(repr, missing))}")

    def parse(hint: Any, value: Any) -> Any:
        nested: Any = next(filter(dataclasses.is_dataclass, (hint, *get_args(hint))), None)
        if nested is not None and value is not None:
            return config_from_json(nested, value)
        return _as_tuple(value)

    return kind(**{name: parse(hints[name], value) for name, value in values.items()})


def _as_tuple(value: Any) -> Any:
    """JSON has lists where configurations, which are hashed, have tuples."""
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value


def parse_range(text: str, name: str) -> tuple[int, int]:
    """Reads "FIRST:LAST" as two step numbers, both included.

    Raises:
        ValueError: not of that form, or LAST is before FIRST.
    """
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None or int(match[1]) > int(match[2]):
        raise ValueError(f"{name} takes FIRST:LAST with FIRST <= LAST, got {text!r}")
    return int(match[1]), int(match[2])


def require_positive(config: Any, name: str, prefix: str = "") -> None:
    """Raises ValueError if a field is not above 0; the prefix stands before its name."""
    value = getattr(config, name)
    if not value > 0:
        raise ValueError(f"{prefix}{name} must be positive, got {value}")
