"""A study on paper: its YAML file read, and the runs that it asks for. Nothing is trained here.

A file has the sections data, teacher, transfer, student, loss and training, each a mapping or a list of mappings, and
says how many seeds. What a section may say is in `rkd.fields`; here settings become bundles, and every run has a key.
Book: A.5, "Running a study".
"""

import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rkd.acceleration import PRECISIONS
from rkd.fields import FIELDS, Field, Settings, check_known, expand, value_of
from rkd.sources import optional

SECTIONS = tuple(FIELDS)


class SpecError(ValueError):
    """A study's file asks for something that does not exist; says where and what is accepted."""


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
        precision: "float32", "float64", or "bf16", which is float32 with bfloat16 in convolutions and products.
        curves: whether accuracies are taken after every epoch, not the last only.
        budget: seconds of an execution after which it stops; None is no limit.
    """

    name: str
    source: str
    bundles: tuple[Bundle, ...]
    precision: str
    curves: bool
    budget: float | None

    @property
    def digest(self) -> str:
        """SHA-256 of the file's text, hexadecimal."""
        return hashlib.sha256(self.source.encode()).hexdigest()


def run_key(settings: Settings, precision: str) -> str:
    """Sixteen hexadecimal digits that name a run: equal settings, equal key."""
    return _digest({**settings, "precision": precision})


def bundle_key(keys: Sequence[str]) -> str:
    """The same for a bundle: from the keys of its runs, in order."""
    return _digest(list(keys))


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
        "budget": Field(float, None, none=True),
    }
    if not isinstance(content, dict):
        raise ValueError(f"a study must be a mapping with the keys {', '.join([*top, *SECTIONS])}")
    check_known("", content, [*top, *SECTIONS])
    general = {key: value_of(key, content.get(key, field.default), field) for key, field in top.items()}
    if general["precision"] not in PRECISIONS:
        raise ValueError(f"precision: must be one of {', '.join(PRECISIONS)}, got {general['precision']!r}")
    if general["bundle"] < 1:
        raise ValueError(f"bundle: must be at least 1 student, got {general['bundle']}")
    if general["budget"] is not None and not 0 < general["budget"] < math.inf:
        raise ValueError(f"budget: must be a positive number of seconds, got {general['budget']}")
    seeds = _seeds(general["seeds"])
    expanded = {section: _distinct(expand(section, content.get(section, {}))) for section in SECTIONS}
    bundles: list[Bundle] = []
    for values in itertools.product(*(expanded[s] for s in SECTIONS if s != "loss")):
        settings = dict(zip((s for s in SECTIONS if s != "loss"), values, strict=True))
        _check_together(settings)
        bundles += _split(settings, expanded["loss"], seeds, general["bundle"])
    return Study(general["name"], source, tuple(bundles), general["precision"], general["curves"], general["budget"])


def _split(settings: Settings, losses: list[Settings], seeds: list[int], most: int) -> Iterator[Bundle]:
    """Bundles of at most `most` students, all losses of a seed together where they fit."""
    width = min(len(losses), most)
    for first in range(0, len(losses), width):
        part = tuple(losses[first : first + width])
        height = max(1, most // len(part))
        for seed in range(0, len(seeds), height):
            yield Bundle(settings, part, tuple(seeds[seed : seed + height]))


def _seeds(value: Any) -> list[int]:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return list(range(value))
    integers = isinstance(value, list) and all(isinstance(v, int) and not isinstance(v, bool) for v in value)
    if not integers or not value or len(set(value)) < len(value) or min(value) < 0:
        raise ValueError(f"seeds: must be how many, at least 1, or a list of different numbers from 0, got {value!r}")
    return list(value)


def _check_together(settings: Settings) -> None:
    if settings["transfer"]["generated"]:
        if settings["data"]["name"] != "mnist1d":
            raise ValueError(f"transfer.generated: only mnist1d has a generator, got {settings['data']['name']!r}")
        if settings["transfer"]["size"] is None:
            raise ValueError("transfer.size: is required where transfer.generated is true")


def _distinct(settings: Iterable[Settings]) -> list[Settings]:
    return list({_digest(setting): setting for setting in settings}.values())


def _digest(value: Any) -> str:
    def plain(x: Any) -> Any:
        if isinstance(x, dict):
            return {key: plain(entry) for key, entry in x.items()}
        return repr(x) if isinstance(x, float) and not math.isfinite(x) else x

    return hashlib.sha256(json.dumps(plain(value), sort_keys=True).encode()).hexdigest()[:16]
