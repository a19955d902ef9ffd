"""What every stage's configuration shares: options with bounds, made from loose values, and their
key."""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

from model_lib.errors import UserError

LARGEST = 2**63 - 1
"""Largest whole number: that of a seed."""
Precision = Literal["auto", "bfloat16", "float16", "float32"]
"""Number formats of weights and training."""


def require(condition: bool, message: str) -> None:
    """Raise `UserError` with the message unless the condition holds."""
    if not condition:
        raise UserError(message)


def _as_kind(name: str, value: Any, kind: Any) -> Any:
    """Return `value` as the option's type: JSON and pipelines know no difference between 5 and
    5.0."""
    kinds = get_args(kind) or (kind,)
    if get_origin(kind) is Literal:
        require(value in kinds, f"{name}: {value!r} is not one of {', '.join(map(str, kinds))}")
        return value
    kinds = tuple(get_origin(k) or k for k in kinds) if get_origin(kind) is not tuple else (tuple,)
    if isinstance(value, list) and tuple in kinds:
        return tuple(value)
    if isinstance(value, float) and value.is_integer() and int in kinds:
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool) and float in kinds:
        require(abs(value) <= LARGEST, f"{name}: {value!r:.60} is not a number to work with")
        return float(value)
    wanted = " or ".join(k.__name__ for k in kinds if k is not type(None))
    require(type(value) in kinds, f"{name}: {value!r} is not {wanted}")
    return value


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """What all configurations share: numbers are checked by `minimum`, and each can be made from
    loose options."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, minimum = getattr(self, field.name), field.metadata.get("minimum")
            require(
                value != "" and not (isinstance(value, tuple) and "" in value),
                f"{field.name}: is empty",
            )
            if isinstance(value, float):
                require(math.isfinite(value), f"{field.name}: {value} is not a number to work with")
            if minimum is not None and value is not None:
                require(value >= minimum, f"{field.name}: {value} is not at least {minimum}")
            if isinstance(value, int):
                require(value <= LARGEST, f"{field.name}: {value} is not at most {LARGEST}")

    @classmethod
    def from_options(cls, **options: Any) -> Self:
        """Make a configuration from a mapping, a pipeline's candidate for example; `UserError` on
        unknown names."""
        kinds = get_type_hints(cls)
        for name, value in options.items():
            require(
                name in kinds,
                f"{cls.__name__}: unknown option {name!r}; one of {', '.join(sorted(kinds))}",
            )
            options[name] = _as_kind(name, value, kinds[name])
        try:
            return cls(**options)
        except TypeError as error:
            raise UserError(f"{cls.__name__}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def key(self, *more: str) -> str:
        """Return 16 hex digits that change when the options which shape the result, or `more`,
        change."""
        shaping = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.metadata.get("shapes", True)
        }
        return hashlib.sha256(json.dumps([shaping, *more], sort_keys=True).encode()).hexdigest()[
            :16
        ]


def option(
    default: Any = dataclasses.MISSING, *, minimum: float | None = None, shapes: bool = True
) -> Any:
    """Declare a field with a lower bound; `shapes=False` for one that changes where or how fast,
    not what."""
    return dataclasses.field(default=default, metadata={"minimum": minimum, "shapes": shapes})


def as_arguments(config: StageConfig) -> list[str]:
    """Return the command line that makes this configuration, without the options that have their
    defaults."""
    arguments = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value is None or value == field.default:
            continue
        if isinstance(value, bool):
            arguments.append(f"--{field.name}" if value else f"--no-{field.name}")
        else:
            arguments.append(f"--{field.name}={value}")
    return arguments
