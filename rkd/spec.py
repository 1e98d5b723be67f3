"""A study on paper: what its YAML file may say, and the runs that it asks for. Nothing is trained here.

A file has the sections data, teacher, transfer, student, loss and training, each a mapping or a list of mappings, and
says how many seeds. Inside a mapping a list where one value is expected is an axis: the study runs every combination.
Explained in the book: A.5, "Running a study".
"""

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rkd.data import NAMES
from rkd.models import MODELS, options_of
from rkd.objectives import Student
from rkd.sources import optional
from rkd.training import Schedule

SECTIONS = ("data", "teacher", "transfer", "student", "loss", "training")
PRECISIONS = ("float32", "float64")
Settings = dict[str, Any]


class SpecError(ValueError):
    """A study's file asks for something that does not exist; says where and what is accepted."""


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


@dataclass(frozen=True)
class Bundle:
    """Students that are trained together: one setting of every section but the loss, C losses, K seeds."""

    settings: Settings
    losses: tuple[Settings, ...]
    seeds: tuple[int, ...]

    def runs(self) -> Iterator[tuple[int, int, Settings]]:
        """(k, c, all settings of the run) for seed k and loss c."""
        for (k, seed), (c, loss) in itertools.product(enumerate(self.seeds), enumerate(self.losses)):
            yield k, c, {**self.settings, "loss": loss, "seed": seed}

    def __len__(self) -> int:
        return len(self.losses) * len(self.seeds)


@dataclass(frozen=True)
class Study:
    """A validated file.

    Attributes:
        name: of the study.
        source: the text of the file.
        bundles: all that is to be run, in order; the same for the same file everywhere.
        precision: "float32" or "float64".
        curves: whether accuracies are taken after every epoch, not the last only.
    """

    name: str
    source: str
    bundles: tuple[Bundle, ...]
    precision: str
    curves: bool

    @property
    def digest(self) -> str:
        """SHA-256 of the file's text, hexadecimal."""
        return hashlib.sha256(self.source.encode()).hexdigest()


def run_key(settings: Settings, precision: str) -> str:
    """Sixteen hexadecimal digits that name a run: equal settings, equal key."""
    return _digest({**settings, "precision": precision})


def teacher_key(settings: Settings, precision: str) -> str:
    """The same for a teacher: its own settings and the data's."""
    return _digest({"data": settings["data"], "teacher": settings["teacher"], "precision": precision})


def flatten(settings: Settings) -> Settings:
    """{"loss": {"alpha": 1}} as {"loss.alpha": 1}: the columns of a table. Lists become text, 64-32."""
    flat: Settings = {}
    for section, values in settings.items():
        for key, value in values.items() if isinstance(values, dict) else [(None, values)]:
            text = "-".join(map(str, value)) if isinstance(value, list) else value
            flat[section if key is None else f"{section}.{key}"] = text
    return flat


def read_study(path: str | Path) -> Study:
    """The study in a YAML file.

    Raises:
        SpecError: the file cannot be read, or holds an unknown key, a wrong type, an empty axis or an impossible value;
            the message names the file, the key and what is accepted.
        ImportError: PyYAML is missing.
    """
    yaml = optional("yaml")
    try:
        source = Path(path).read_text(encoding="utf-8")
        content = yaml.safe_load(source)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SpecError(f"{path}: cannot be read as YAML: {error}") from error
    try:
        return _study(content, source, Path(path).stem)
    except ValueError as error:
        raise SpecError(f"{path}: {error}") from error


def _study(content: Any, source: str, stem: str) -> Study:
    top = {
        "name": Field(str, stem),
        "seeds": Field(object, ...),
        "precision": Field(str, "float32"),
        "curves": Field(bool, True),
        "bundle": Field(int, 512),
    }
    if not isinstance(content, dict):
        raise ValueError(f"a study must be a mapping with the keys {', '.join([*top, *SECTIONS])}")
    _known("", content, [*top, *SECTIONS])
    general = {key: _value(key, content.get(key, field.default), field) for key, field in top.items()}
    if general["precision"] not in PRECISIONS:
        raise ValueError(f"precision: must be one of {', '.join(PRECISIONS)}, got {general['precision']!r}")
    if general["bundle"] < 1:
        raise ValueError(f"bundle: must be at least 1 student, got {general['bundle']}")
    seeds = _seeds(general["seeds"])
    expanded = {section: list(_section(section, content.get(section, {}))) for section in SECTIONS}
    bundles: list[Bundle] = []
    for values in itertools.product(*(expanded[s] for s in SECTIONS if s != "loss")):
        settings = dict(zip((s for s in SECTIONS if s != "loss"), values, strict=True))
        _check_together(settings)
        bundles += _split(settings, expanded["loss"], seeds, general["bundle"])
    return Study(general["name"], source, tuple(bundles), general["precision"], general["curves"])


def _split(settings: Settings, losses: list[Settings], seeds: list[int], most: int) -> Iterator[Bundle]:
    """Bundles of at most `most` students, all losses of a seed together where they fit."""
    width = min(len(losses), most)
    for first in range(0, len(losses), width):
        part = tuple(losses[first : first + width])
        height = max(1, most // len(part))
        for seed in range(0, len(seeds), height):
            yield Bundle(settings, part, tuple(seeds[seed : seed + height]))


def _section(section: str, content: Any) -> Iterator[Settings]:
    """Every setting of a section, in the order of the file, each once."""
    mappings = content if isinstance(content, list) else [content]
    if not mappings or not all(isinstance(mapping, dict) for mapping in mappings):
        raise ValueError(f"{section}: must be a mapping or a list of mappings, got {content!r}")
    seen = set()
    for mapping in mappings:
        fields = _fields(section, mapping)
        _known(section, mapping, list(fields))
        axes = [_axis(f"{section}.{key}", mapping.get(key, field.default), field) for key, field in fields.items()]
        for values in itertools.product(*axes):
            setting = dict(zip(fields, values, strict=True))
            _check_alone(section, setting, mapping)
            if setting.get("steps") is not None:
                setting["epochs"] = None
            if section == "loss":
                used = ("loss", "learning_rate", *_USED[setting["loss"]])
                setting = {key: value if key in used else None for key, value in setting.items()}
            if (key := _digest(setting)) not in seen:
                seen.add(key)
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
    return [_value(place, entry, field) for entry in (value if axis else [value])]


def _value(place: str, value: Any, field: Field) -> Any:
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


def _known(section: str, mapping: Settings, accepted: list[str]) -> None:
    for key in mapping:
        if key not in accepted:
            place = f"{section}.{key}" if section else str(key)
            raise ValueError(f"{place}: unknown key; accepted are {', '.join(accepted)}")


def _seeds(value: Any) -> list[int]:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return list(range(value))
    integers = isinstance(value, list) and all(isinstance(v, int) and not isinstance(v, bool) for v in value)
    if not integers or not value or len(set(value)) < len(value) or min(value) < 0:
        raise ValueError(f"seeds: must be how many, at least 1, or a list of different numbers from 0, got {value!r}")
    return list(value)


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


def _check_together(settings: Settings) -> None:
    if settings["transfer"]["generated"]:
        if settings["data"]["name"] != "mnist1d":
            raise ValueError(f"transfer.generated: only mnist1d has a generator, got {settings['data']['name']!r}")
        if settings["transfer"]["size"] is None:
            raise ValueError("transfer.size: is required where transfer.generated is true")


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


def _digest(value: Any) -> str:
    def plain(x: Any) -> Any:
        if isinstance(x, dict):
            return {key: plain(entry) for key, entry in x.items()}
        return repr(x) if isinstance(x, float) and not math.isfinite(x) else x

    return hashlib.sha256(json.dumps(plain(value), sort_keys=True).encode()).hexdigest()[:16]
