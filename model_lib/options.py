"""What every stage's configuration shares: options with bounds, parsed from JSON, and their key."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from model_lib.errors import UserError

LARGEST = 2**63 - 1
"""Largest whole number: that of a seed."""
Precision = Literal["auto", "bfloat16", "float16", "float32"]
"""Number formats of weights and training."""


def require(condition: bool, message: str) -> None:
    """Raise `UserError` with the message unless the condition holds."""
    if not condition:
        raise UserError(message)


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """Base of all configurations: checks each number against its `minimum`."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, minimum = getattr(self, field.name), field.metadata.get("minimum")
            empty = value == "" or (isinstance(value, tuple) and "" in value)
            require(not empty, f"{field.name}: is empty")
            if isinstance(value, float):
                require(math.isfinite(value), f"{field.name}: {value} is not a finite number")
            if minimum is not None and value is not None:
                require(value >= minimum, f"{field.name}: {value} is not at least {minimum}")
            if isinstance(value, int):
                require(value <= LARGEST, f"{field.name}: {value} is not at most {LARGEST}")

    @classmethod
    def from_options(cls, **options: Any) -> Self:
        """Return the configuration of a JSON object, for example a pipeline's candidate.

        Raises:
            UserError: a name is unknown, or a value has another type. Whole floats are integers,
                since Kubeflow Pipelines sends every number as a float.
        """
        from model_lib.io.validation import parse  # needs pyarrow, which the command line does not

        names = [field.name for field in dataclasses.fields(cls)]
        options = nest_options(cls, {name: _whole(value) for name, value in options.items()})
        for name in options:
            known = ", ".join(sorted(option_names(cls)))
            require(name in names, f"{cls.__name__}: unknown option {name!r}; one of {known}")
        try:
            return parse(cls, options)
        except ValueError as error:
            raise UserError(f"{cls.__name__}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def key(self, *more: str) -> str:
        """Return 16 hex digits of the options that shape the result, and of `more`."""
        options = self.to_dict()
        shaping = {
            field.name: options[field.name]
            for field in dataclasses.fields(self)
            if field.metadata.get("shapes", True)
        }
        document = json.dumps([shaping, *more], sort_keys=True)
        return hashlib.sha256(document.encode()).hexdigest()[:16]


def _whole(value: Any) -> Any:
    whole = isinstance(value, float) and value.is_integer() and abs(value) <= LARGEST
    return int(value) if whole else value


def option(
    default: Any = dataclasses.MISSING, *, minimum: float | None = None, shapes: bool = True
) -> Any:
    """Declare a field with a lower bound; `shapes=False` if it does not change the result."""
    return dataclasses.field(default=default, metadata={"minimum": minimum, "shapes": shapes})


def option_names(cls: type[StageConfig]) -> list[str]:
    """Return the names of a configuration's options, with those of a nested one beside its own."""
    names: list[str] = []
    for field in dataclasses.fields(cls):
        default: Any = field.default
        is_nested = isinstance(default, StageConfig)
        names += option_names(type(default)) if is_nested else [field.name]
    return names


def nest_options(cls: type[StageConfig], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options, of which those of a nested configuration may be given flat, as the fields.

    What is not given of a nested configuration is as in the field's default.
    """
    fields = dict(options)
    for field in dataclasses.fields(cls):
        default: Any = field.default
        nested = fields.get(field.name, {})
        if isinstance(default, StageConfig) and isinstance(nested, dict):
            flat = {n: fields.pop(n) for n in option_names(type(default)) if n in fields}
            fields[field.name] = {**default.to_dict(), **nested, **flat}
    return fields


def as_arguments(config: StageConfig, defaults: StageConfig | None = None) -> list[str]:
    """Return the command line of a configuration, without options that have their default.

    Args:
        config: the configuration.
        defaults: of a nested configuration, if they are not its class's.
    """
    arguments: list[str] = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        default: Any = field.default if defaults is None else getattr(defaults, field.name)
        if value is None or value == default:
            continue
        if isinstance(value, StageConfig):
            arguments += as_arguments(value, default)
        elif isinstance(field.default, bool):
            arguments.append(f"--{field.name}" if value else f"--no-{field.name}")
        else:
            arguments.append(f"--{field.name}={value}")
    return arguments
