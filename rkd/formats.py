"""Reading the official files of MNIST, Fashion-MNIST and CIFAR, and NumPy archives of the same arrays.

What is read is checked against the `Format` of its data set, and every damage is named with what was expected. CIFAR's
pickled archives are never read: unpickling runs whatever code the file holds.
Explained in the book: section 2.2, "Experiments".
"""

import gzip
import math
import struct
import tarfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

KEYS = ("x_train", "y_train", "x_test", "y_test")
Arrays = dict[str, NDArray[Any]]


class CorruptDataError(ValueError):
    """A file of a data set is damaged or is not what its name says."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """What the official files of one data set are called and hold.

    Attributes:
        files: name and MD5 of the files: IDX files (images and labels of train, of test) or CIFAR's archive.
        shape: of one image, (height, width) or (height, width, channels).
        classes: labels are 0 … classes − 1.
        archive_folder, train, test: CIFAR only, the folder inside the archive and its members of either part.
    """

    name: str
    files: dict[str, str]
    shape: tuple[int, ...]
    classes: int
    archive_folder: str = ""
    train: tuple[str, ...] = ()
    test: tuple[str, ...] = ()


def read(source: Format, folder: Path, shared: bool) -> Arrays | None:
    """The data set in a folder: `name`.npz, else the official files.

    Args:
        source: what to look for.
        folder: where to; it need not exist.
        shared: whether other data sets may share the folder. IDX files and CIFAR's bare .bin files are then not looked
            at, since data sets name theirs alike; CIFAR's archive or the folder in it is.

    Returns:
        The arrays named in `KEYS`, as `rkd.sources.find` gives them; None where the folder has no complete set.

    Raises:
        CorruptDataError: a file is there and cannot be used.
    """
    if (archive := folder / f"{source.name}.npz").is_file():
        return _read_npz(source, archive)
    return (_read_cifar if source.archive_folder else _read_idx_files)(source, folder, shared)


def variant(path: Path) -> Path | None:
    """The gzipped file or its plain twin, if one is there."""
    return next((p for p in (path, path.with_suffix("")) if p.is_file()), None)


def _corrupt(source: Format, place: str | Path, expected: str, found: object) -> CorruptDataError:
    return CorruptDataError(
        f"{place}: expected {expected}, found {found}. Delete the file and run `rkd data fetch {source.name}`, or put"
        " a good copy in its place"
    )


def _checked(source: Format, place: str | Path, x: NDArray[Any], y: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Images and their labels, as int64, once they are known to fit the source and each other."""
    if x.dtype != np.uint8 or x.shape[1:] != source.shape or not len(x):
        shape = ", ".join(map(str, ("N", *source.shape)))
        raise _corrupt(source, place, f"images of type uint8 and shape ({shape})", f"{x.dtype} {x.shape}")
    if y.dtype.kind not in "iu" or y.shape != x.shape[:1]:
        raise _corrupt(source, place, f"{len(x)} integer labels, one an image", f"{y.dtype} {y.shape}")
    if y.min() < 0 or y.max() >= source.classes:
        raise _corrupt(source, place, f"labels from 0 to {source.classes - 1}", f"{y.min()} to {y.max()}")
    return x, y.astype(np.int64)


def _read_npz(source: Format, path: Path) -> Arrays:
    broken = (ValueError, EOFError, OSError, RuntimeError, zipfile.BadZipFile, zlib.error)
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            raise _corrupt(source, path, "a NumPy .npz archive", "another or a truncated file")
        file.seek(0)
        try:
            with np.load(file, allow_pickle=False) as archive:
                arrays = {key: archive[key] for key in KEYS if key in archive}
        except broken as error:
            raise _corrupt(
                source, path, f"plain arrays {', '.join(KEYS)}", f"{type(error).__name__}: {error}"
            ) from error
    if lacking := [key for key in KEYS if key not in arrays]:
        raise _corrupt(source, path, f"arrays {', '.join(KEYS)}", f"no {', '.join(lacking)}")
    train = _checked(source, path, arrays["x_train"], arrays["y_train"])
    test = _checked(source, path, arrays["x_test"], arrays["y_test"])
    return dict(zip(KEYS, (*train, *test), strict=True))


def _read_idx_files(source: Format, folder: Path, shared: bool) -> Arrays | None:
    paths = [path for file in source.files if (path := variant(folder / file))]
    if shared or len(paths) < len(source.files):
        return None
    parts: list[NDArray[Any]] = []
    for images, labels in (paths[:2], paths[2:]):
        parts += _checked(source, images, _read_idx(source, images, 3), _read_idx(source, labels, 1))
    return dict(zip(KEYS, parts, strict=True))


def _read_idx(source: Format, path: Path, axes: int) -> NDArray[np.uint8]:
    """One IDX file of unsigned bytes: 0, 0, 8, number of axes; the big-endian length of each axis; the data."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise _corrupt(source, path, "a complete gzip file", f"{type(error).__name__}: {error}") from error
    magic, start = bytes((0, 0, 8, axes)), 4 + 4 * axes
    if raw[:4] != magic or len(raw) < start:
        raise _corrupt(
            source, path, f"an IDX file that starts with {magic.hex(' ')}", raw[:start].hex(" ") or "nothing"
        )
    shape = struct.unpack(f">{axes}I", raw[4:start])
    if len(raw) != start + math.prod(shape):
        raise _corrupt(source, path, f"{start + math.prod(shape)} bytes for shape {shape}", f"{len(raw)} bytes")
    return np.frombuffer(bytearray(raw), np.uint8, offset=start).reshape(shape)


def _read_cifar(source: Format, folder: Path, shared: bool) -> Arrays | None:
    members = (*source.train, *source.test)
    unpacked = [folder / source.archive_folder, *([] if shared else [folder])]
    complete = [place for place in unpacked if all((place / member).is_file() for member in members)]
    if (place := folder / next(iter(source.files))).is_file():
        blobs = _untar(source, place)
    elif complete:
        place = complete[0]
        blobs = {member: (place / member).read_bytes() for member in members}
    else:
        return None
    parts: list[NDArray[Any]] = []
    for names in (source.train, source.test):
        images, labels = zip(*(_records(source, place / name, blobs[name]) for name in names), strict=True)
        parts += [np.concatenate(images), np.concatenate(labels)]
    return dict(zip(KEYS, parts, strict=True))


def _untar(source: Format, path: Path) -> dict[str, bytes]:
    """The members of a .tar.gz that hold data, read in one pass; nothing is extracted to disk."""
    wanted = {f"{source.archive_folder}/{member}": member for member in (*source.train, *source.test)}
    blobs = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                if member.isfile() and member.name in wanted and (stream := archive.extractfile(member)):
                    blobs[wanted[member.name]] = stream.read()
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise _corrupt(source, path, "a complete .tar.gz archive", f"{type(error).__name__}: {error}") from error
    if lacking := [name for name, member in wanted.items() if member not in blobs]:
        raise _corrupt(source, path, f"members {', '.join(wanted)}", f"no {', '.join(lacking)}")
    return blobs


def _records(source: Format, place: Path, raw: bytes) -> tuple[NDArray[Any], NDArray[Any]]:
    """CIFAR's records: the label (CIFAR-100: the coarse, then the fine one), then the red, green and blue planes."""
    labels, pixels = (2 if source.classes == 100 else 1), math.prod(source.shape)
    if not raw or len(raw) % (labels + pixels):
        raise _corrupt(source, place, f"one or more records of {labels + pixels} bytes", f"{len(raw)} bytes")
    rows = np.frombuffer(raw, np.uint8).reshape(-1, labels + pixels)
    images = rows[:, labels:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return _checked(source, place, images, rows[:, labels - 1])
