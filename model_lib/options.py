"""What every stage's configuration shares: options with bounds, parsed from JSON, and their key."""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any, Literal, Self

from model_lib.errors import UserError
from model_lib.io.validation import parse

LARGEST = 2**63 - 1
"""Largest whole number: that of a seed."""
Precision = Literal["auto", "bfloat16", "float16", "float32"]
"""Number formats of weights and training."""
CaptionPrecision = Literal["auto", "bfloat16", "float16", "float32", "float8"]
"""Number formats of a model that captions; float8: bfloat16, the vision tower's products in
float8."""


def require(condition: bool, message: str) -> None:
    """Raise `UserError` with the message unless the condition holds."""
    if not condition:
        raise UserError(message)


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """Base of all configurations: checks each number against its `minimum`.

    A field may be a configuration itself, with a default. On the command line and in JSON its
    options stand beside the others, so their names differ.
    """

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
    def from_options(cls, /, **options: Any) -> Self:
        """Return the configuration of a JSON object, for example a pipeline's candidate.

        Raises:
            UserError: a name is unknown, or a value has another type. Whole floats are integers,
                since Kubeflow Pipelines sends every number as a float.
        """
        defaults = _defaults(cls)
        known = ", ".join(sorted(defaults))
        for name in options:
            require(name in defaults, f"{cls.__name__}: unknown option {name!r}; one of {known}")
        values = {name: _whole(value) for name, value in options.items()}
        for field in dataclasses.fields(cls):
            if isinstance(field.default, StageConfig):
                nested = field.default.to_dict()
                nested |= {name: values.pop(name) for name in nested if name in values}
                values[field.name] = nested
        try:
            return parse(cls, values)
        except ValueError as error:
            raise UserError(f"{cls.__name__}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Return the options, those of a nested configuration beside its own."""
        return _flatten({f.name: getattr(self, f.name) for f in dataclasses.fields(self)})

    def shaping(self) -> dict[str, Any]:
        """Return the options that shape the result."""
        fields = dataclasses.fields(self)
        names = [field.name for field in fields if field.metadata.get("shapes", True)]
        return _flatten({name: getattr(self, name) for name in names})

    def key(self, *more: str) -> str:
        """Return 16 hex digits of the options that shape the result, and of `more`."""
        document = json.dumps([self.shaping(), *more], sort_keys=True)
        return hashlib.sha256(document.encode()).hexdigest()[:16]


def _flatten(values: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= value.to_dict() if isinstance(value, StageConfig) else {name: value}
    return flat


def _defaults(cls: type[StageConfig]) -> dict[str, Any]:
    return _flatten({field.name: field.default for field in dataclasses.fields(cls)})


def _whole(value: Any) -> Any:
    whole = isinstance(value, float) and value.is_integer() and abs(value) <= LARGEST
    return int(value) if whole else value


def option(
    default: Any = dataclasses.MISSING, *, minimum: float | None = None, shapes: bool = True
) -> Any:
    """Declare a field with a lower bound; `shapes=False` if it does not change the result."""
    return dataclasses.field(default=default, metadata={"minimum": minimum, "shapes": shapes})


def as_arguments(config: StageConfig) -> list[str]:
    """Return the command line of a configuration, without options that have their default."""
    arguments, defaults = [], _defaults(type(config))
    for name, value in config.to_dict().items():
        if value is None or value == defaults[name]:
            continue
        if isinstance(defaults[name], bool):
            arguments.append(f"--{name}" if value else f"--no-{name}")
        else:
            arguments.append(f"--{name}={value}")
    return arguments
