"""Where the official files of MNIST, Fashion-MNIST and CIFAR come from, and reading them. Nothing downloads unasked.

`find` reads what is on this machine, `fetch` puts it there. The pickled archives of CIFAR are never read: unpickling
runs whatever code the file holds.
Explained in the book: section 2.2, "Experiments".
"""

import gzip
import importlib
import math
import os
import struct
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

KEYS = ("x_train", "y_train", "x_test", "y_test")
Arrays = dict[str, NDArray[Any]]


class CorruptDataError(ValueError):
    """A file of a data set is damaged or is not what its name says."""


class FetchError(OSError):
    """No mirror gave the file that was asked for."""


@dataclass(frozen=True)
class Source:
    """The official files of one data set.

    Attributes:
        mirrors: addresses of folders, tried in turn.
        files: name and MD5 of what a mirror has: IDX files (images and labels of train, of test) or CIFAR's archive.
        shape: of one image, (height, width) or (height, width, channels).
        classes: labels are 0 … classes − 1.
        archive_folder, train, test: CIFAR only, the folder inside the archive and its members of either part.
        system_folder: where a Linux distribution's package puts the files.
    """

    name: str
    mirrors: tuple[str, ...]
    files: dict[str, str]
    shape: tuple[int, ...]
    classes: int
    archive_folder: str = ""
    train: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    system_folder: str = ""


_TORONTO = ("https://www.cs.toronto.edu/~kriz/", "https://cave.cs.toronto.edu/kriz/")
_ALL = (
    Source(
        name="mnist",
        mirrors=(
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
        ),
        files={
            "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
            "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
            "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
        },
        shape=(28, 28),
        classes=10,
    ),
    Source(
        name="fashion_mnist",
        mirrors=(
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        ),
        files={
            "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
            "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
            "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
        },
        shape=(28, 28),
        classes=10,
        system_folder="/usr/share/datasets/fashion-mnist",  # Debian's package dataset-fashion-mnist
    ),
    Source(
        name="cifar10",
        mirrors=_TORONTO,
        files={"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"},
        shape=(32, 32, 3),
        classes=10,
        archive_folder="cifar-10-batches-bin",
        train=tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        test=("test_batch.bin",),
    ),
    Source(
        name="cifar100",
        mirrors=_TORONTO,
        files={"cifar-100-binary.tar.gz": "03b5dce01913d631647c71ecec9e9cb8"},
        shape=(32, 32, 3),
        classes=100,
        archive_folder="cifar-100-binary",
        train=("train.bin",),
        test=("test.bin",),
    ),
)
SOURCES = {source.name: source for source in _ALL}


def find(name: str) -> Arrays:
    """Read a data set from this machine. Looks, in this order, into

    1. the folder in the environment variable RKD_DATA_DIR and its sub-folder `name`, for `name`.npz and CIFAR's archive
       or the folder in it; in the sub-folder also for IDX files, gzipped or not, and CIFAR's bare .bin files (not in
       the folder itself: MNIST and Fashion-MNIST name their files alike);
    2. the folder of a Linux distribution's package (Fashion-MNIST: Debian's dataset-fashion-mnist);
    3. the cache that `fetch` fills.

    Args:
        name: a key of `SOURCES`.

    Returns:
        x_train, x_test: images, uint8 of shape (N, 28, 28) or (N, 32, 32, 3), any N > 0; y_train, y_test: int64 of
        shape (N,), for CIFAR-100 the fine labels. In the order of the files.

    Raises:
        ValueError: no such name.
        CorruptDataError: a file was found and cannot be used.
        FileNotFoundError: nothing was found.
    """
    source, looked = _source(name), []
    for folder, shared in _folders(source):
        if (archive := folder / f"{name}.npz").is_file():
            return _read_npz(source, archive)
        read = _read_cifar if source.archive_folder else _read_idx_files
        if arrays := read(source, folder, shared):
            return arrays
        lacking = [file for file in source.files if not _variant(folder / file)]
        partly = not shared and 0 < len(lacking) < len(source.files)
        looked.append(f"{folder}" + (f" (incomplete, lacks {', '.join(lacking)})" if partly else ""))
    unset = "" if os.environ.get("RKD_DATA_DIR") else " (RKD_DATA_DIR is not set)"
    raise FileNotFoundError(
        f"no files of {name} in {', '.join(looked)}{unset}. Either run `rkd data fetch {name}`, or set RKD_DATA_DIR to"
        f" a folder that holds {name}.npz (arrays {', '.join(KEYS)}) or {name}/ with {', '.join(source.files)}"
    )


def fetch(name: str) -> Path:
    """Download a data set's official files into the cache, checked by their MD5. Files already there are kept.

    A file takes its place in one move, after its check; a failed or interrupted download leaves none that `find` takes.

    Args:
        name: a key of `SOURCES`.

    Returns:
        The folder `name` in the cache, which now holds the files.

    Raises:
        ValueError: no such name.
        FetchError: every mirror failed, or answered with something else than the file.
        ImportError: pooch is not installed, or tqdm while standard error is a terminal.
    """
    source, folder = _source(name), cache_folder() / name
    pooch = optional("pooch")
    terminal = sys.stderr.isatty()
    if terminal:
        optional("tqdm")
    downloader = pooch.HTTPDownloader(progressbar=terminal, chunk_size=2**16, timeout=30)
    failed = (ValueError, optional("requests").RequestException)
    for file, md5 in source.files.items():
        reasons = []
        for mirror in source.mirrors:
            try:
                pooch.retrieve(mirror + file, f"md5:{md5}", fname=file, path=folder, downloader=downloader)
            except failed as error:
                reasons.append(f"\n  {mirror}{file}: {error}")
            else:
                break
        else:
            raise FetchError(
                f"cannot fetch {file} of {name}, expected a file with MD5 {md5}:{''.join(reasons)}\nCheck the network"
                f" and run `rkd data fetch {name}` again, or put the file into {name}/ in the folder RKD_DATA_DIR"
            )
    return folder


def optional(module: str) -> Any:
    """Import a module that only experiments need.

    Raises:
        ImportError: it is not installed; says how to.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{module} cannot be imported ({error}): pip install 'rkd[study]'") from error


def _source(name: str) -> Source:
    if name not in SOURCES:
        raise ValueError(f"name must be one of {', '.join(SOURCES)}, got {name!r}")
    return SOURCES[name]


def cache_folder() -> Path:
    """Where fetched files and trained teachers are kept: RKD_CACHE_DIR, else the user's cache of this platform."""
    return Path(os.environ.get("RKD_CACHE_DIR") or optional("platformdirs").user_cache_path("rkd"))


def _folders(source: Source) -> Iterator[tuple[Path, bool]]:
    """The folders to look into, each with whether other data sets may share it."""
    if data := os.environ.get("RKD_DATA_DIR"):
        yield Path(data), True
        yield Path(data) / source.name, False
    if source.system_folder:
        yield Path(source.system_folder), False
    yield cache_folder() / source.name, False


def _variant(path: Path) -> Path | None:
    """The gzipped file or its plain twin, if one is there."""
    return next((p for p in (path, path.with_suffix("")) if p.is_file()), None)


def _corrupt(source: Source, place: str | Path, expected: str, found: object) -> CorruptDataError:
    return CorruptDataError(
        f"{place}: expected {expected}, found {found}. Delete the file and run `rkd data fetch {source.name}`, or put"
        " a good copy in its place"
    )


def _checked(source: Source, place: str | Path, x: NDArray[Any], y: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Images and their labels, as int64, once they are known to fit the source and each other."""
    if x.dtype != np.uint8 or x.shape[1:] != source.shape or not len(x):
        shape = ", ".join(map(str, ("N", *source.shape)))
        raise _corrupt(source, place, f"images of type uint8 and shape ({shape})", f"{x.dtype} {x.shape}")
    if y.dtype.kind not in "iu" or y.shape != x.shape[:1]:
        raise _corrupt(source, place, f"{len(x)} integer labels, one an image", f"{y.dtype} {y.shape}")
    if y.min() < 0 or y.max() >= source.classes:
        raise _corrupt(source, place, f"labels from 0 to {source.classes - 1}", f"{y.min()} to {y.max()}")
    return x, y.astype(np.int64)


def _read_npz(source: Source, path: Path) -> Arrays:
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


def _read_idx_files(source: Source, folder: Path, shared: bool) -> Arrays | None:
    paths = [path for file in source.files if (path := _variant(folder / file))]
    if shared or len(paths) < len(source.files):
        return None
    parts: list[NDArray[Any]] = []
    for images, labels in (paths[:2], paths[2:]):
        parts += _checked(source, images, _read_idx(source, images, 3), _read_idx(source, labels, 1))
    return dict(zip(KEYS, parts, strict=True))


def _read_idx(source: Source, path: Path, axes: int) -> NDArray[np.uint8]:
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


def _read_cifar(source: Source, folder: Path, shared: bool) -> Arrays | None:
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


def _untar(source: Source, path: Path) -> dict[str, bytes]:
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


def _records(source: Source, place: Path, raw: bytes) -> tuple[NDArray[Any], NDArray[Any]]:
    """CIFAR's records: the label (CIFAR-100: the coarse, then the fine one), then the red, green and blue planes."""
    labels, pixels = (2 if source.classes == 100 else 1), math.prod(source.shape)
    if not raw or len(raw) % (labels + pixels):
        raise _corrupt(source, place, f"one or more records of {labels + pixels} bytes", f"{len(raw)} bytes")
    rows = np.frombuffer(raw, np.uint8).reshape(-1, labels + pixels)
    images = rows[:, labels:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return _checked(source, place, images, rows[:, labels - 1])
