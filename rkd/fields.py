"""What the sections of a study's file may say: their keys, types and defaults, axes, and which values are possible.

Inside a section a list where one value is expected is an axis: `expand` gives every combination.
Book: A.5, "Running a study".
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from rkd.data import NAMES
from rkd.models import MODELS, options_of
from rkd.objectives import Student
from rkd.training import Schedule

Settings = dict[str, Any]


class Field(NamedTuple):
    """One key of a section: its type (int, float, str, bool or list, of integers), and its default or `...`."""

    type: type
    default: Any
    none: bool = False


_KINDS = {"int": int, "float": float, "str": str}
_SCHEDULE = {f.name: Field(_KINDS[f.type.__name__], f.default) for f in dataclasses.fields(Schedule)}  # type: ignore[union-attr]
_DAMAGE = {"label_noise": Field(float, 0.0), "without": Field(list, [])}
FIELDS: dict[str, dict[str, Field]] = {
    "data": {"name": Field(str, ...), "validation": Field(int, None, none=True)},
    "teacher": {"model": Field(str, ...), "seed": Field(int, 0), **_SCHEDULE, **_DAMAGE},
    "transfer": {"size": Field(int, None, none=True), "generated": Field(bool, False), **_DAMAGE},
    "student": {"model": Field(str, ...)},
    "loss": {
        "loss": Field(str, "renyi"),
        "alpha": Field(float, 1.0),
        "temperature": Field(float, 4.0),
        "beta": Field(float, 0.9),
        "scale": Field(object, "T2"),
        "mixture": Field(float, 0.5),
        "learning_rate": Field(float, None, none=True),
    },
    "training": {**_SCHEDULE, "steps": Field(int, None, none=True)},
}
"""The keys of each section. Teacher and student also take the options of their model (`rkd.models.options_of`)."""


_SOFT = ("temperature", "beta", "scale")
_USED = {
    "renyi": ("alpha", *_SOFT),
    "kl": _SOFT,
    "reverse_kl": _SOFT,
    "js": ("mixture", *_SOFT),
    "ttm": _SOFT,
    "mse": ("beta", "scale"),
    "hard": (),
}
"""What each loss makes use of; the rest is empty in the table, and two cells that differ in it alone are one."""


def expand(section: str, content: Any) -> Iterator[Settings]:
    """Every setting that a section of a file asks for, in its order; what a loss does not use is None.

    Raises:
        ValueError: an unknown key, a wrong type, an empty axis or an impossible value; names the key.
    """
    mappings = content if isinstance(content, list) else [content]
    if not mappings or not all(isinstance(mapping, dict) for mapping in mappings):
        raise ValueError(f"{section}: must be a mapping or a list of mappings, got {content!r}")
    for mapping in mappings:
        fields = _fields(section, mapping)
        check_known(section, mapping, list(fields))
        axes = [_axis(f"{section}.{key}", mapping.get(key, field.default), field) for key, field in fields.items()]
        for values in itertools.product(*axes):
            setting = dict(zip(fields, values, strict=True))
            _check_alone(section, setting, mapping)
            if setting.get("steps") is not None:
                setting["epochs"] = None
            if section == "loss":
                used = ("loss", "learning_rate", *_USED[setting["loss"]])
                setting = {key: value if key in used else None for key, value in setting.items()}
            yield setting


def _fields(section: str, mapping: Settings) -> dict[str, Field]:
    fields = FIELDS[section]
    if section in ("teacher", "student") and mapping.get("model") is not None:
        if mapping["model"] not in MODELS:
            raise ValueError(f"{section}.model: must be one of {', '.join(MODELS)}, got {mapping['model']!r}")
        options = options_of(mapping["model"])
        fields = fields | {
            name: Field(
                list if name == "hidden" else option.annotation,
                ... if option.default is option.empty else option.default,
            )
            for name, option in options.items()
        }
    return fields


def _axis(place: str, value: Any, field: Field) -> list[Any]:
    axis = isinstance(value, list) and (field.type is not list or any(isinstance(entry, list) for entry in value))
    if axis and not value:
        raise ValueError(f"{place}: must hold at least one value, got an empty list")
    return [value_of(place, entry, field) for entry in (value if axis else [value])]


def value_of(place: str, value: Any, field: Field) -> Any:
    """The value at `place` in a file, an integer as a float where the field is one.

    Raises:
        ValueError: it is required and missing, or of another type.
    """
    if value is ...:
        raise ValueError(f"{place}: is required")
    if (value is None and field.none) or field.type is object:
        return value
    if field.type is list:
        holds = isinstance(value, list) and all(isinstance(v, int) and not isinstance(v, bool) for v in value)
        kind = "a list of integers"
    elif field.type is float:
        holds, kind = isinstance(value, int | float) and not isinstance(value, bool), "a number"
    else:
        holds = isinstance(value, field.type) and (field.type is bool or not isinstance(value, bool))
        kind = {int: "an integer", str: "text", bool: "true or false"}[field.type]
    if not holds:
        raise ValueError(f"{place}: must be {kind}, got {value!r}")
    return float(value) if field.type is float else value


def check_known(section: str, mapping: Settings, accepted: list[str]) -> None:
    """Raises ValueError for the first key that is not among the accepted ones."""
    for key in mapping:
        if key not in accepted:
            place = f"{section}.{key}" if section else str(key)
            raise ValueError(f"{place}: unknown key; accepted are {', '.join(accepted)}")


def _check_alone(section: str, setting: Settings, mapping: Settings) -> None:
    """Raises where the values of one section, `mapping` in the file, are impossible."""

    def check(key: str, holds: bool, accepted: str) -> None:
        if not holds:
            raise ValueError(f"{section}.{key}: must be {accepted}, got {setting[key]!r}")

    for key in ("size", "steps"):
        if setting.get(key) is not None:
            check(key, setting[key] >= 1, "at least 1")
    try:
        if section == "loss":
            student_of(setting)
        if section in ("teacher", "training"):
            schedule_of(setting)
    except ValueError as error:
        raise ValueError(f"{section}.{error}") from error
    if section == "data":
        check("name", setting["name"] in NAMES, f"one of {', '.join(NAMES)}")
    if "label_noise" in setting:
        check("label_noise", 0 <= setting["label_noise"] <= 1, "in [0, 1]")
    if "seed" in setting:
        check("seed", setting["seed"] >= 0, "at least 0")
    if setting.get("steps") is not None and "epochs" in mapping:
        raise ValueError("training.steps: must not be given together with training.epochs")
    if section == "student":
        check("model", not setting.get("dropout"), "a network without dropout")


def student_of(loss: Settings) -> Student:
    """The loss section as `rkd.objectives.Student`."""
    scale = loss["scale"]
    if isinstance(scale, bool) or not isinstance(scale, str | int | float | None):
        raise ValueError(f"scale must be 'T2', 'T2/alpha' or a positive number, got {scale!r}")
    used = {key: value for key, value in loss.items() if value is not None}
    return Student(**(used | {"beta": 0.0} if loss["loss"] == "hard" else used))


def schedule_of(section: Settings, samples: int = 1) -> Schedule:
    """The schedule in a teacher or training section; where it says steps, the least epochs that have as many."""
    values = {key: section[key] for key in _SCHEDULE}
    if section.get("steps") is not None:
        values["epochs"] = math.ceil(section["steps"] / math.ceil(samples / section["batch_size"]))
    return Schedule(**values)
