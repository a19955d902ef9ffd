"""What every stage's configuration shares: options with bounds, parsed from JSON, and their key."""

import dataclasses
import hashlib
import json
import math
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

        names = sorted(field.name for field in dataclasses.fields(cls))
        for name in options:
            known = ", ".join(names)
            require(name in names, f"{cls.__name__}: unknown option {name!r}; one of {known}")
        try:
            return parse(cls, {name: _whole(value) for name, value in options.items()})
        except ValueError as error:
            raise UserError(f"{cls.__name__}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def key(self, *more: str) -> str:
        """Return 16 hex digits of the options that shape the result, and of `more`."""
        shaping = {
            field.name: getattr(self, field.name)
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


def as_arguments(config: StageConfig) -> list[str]:
    """Return the command line of a configuration, without options that have their default."""
    arguments = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value is None or value == field.default:
            continue
        if isinstance(field.default, bool):
            arguments.append(f"--{field.name}" if value else f"--no-{field.name}")
        else:
            arguments.append(f"--{field.name}={value}")
    return arguments
