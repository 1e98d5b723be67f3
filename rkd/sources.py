"""Where the official files of MNIST, Fashion-MNIST and CIFAR are: here, or on a mirror. Nothing downloads unasked.

`find` reads what is on this machine, by `rkd.formats`; `fetch` puts it there.
Explained in the book: section 2.2, "Experiments".
"""

import importlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rkd.formats import KEYS, Arrays, Format, read, variant
from rkd.formats import CorruptDataError as CorruptDataError


class FetchError(OSError):
    """No mirror gave the file that was asked for."""


@dataclass(frozen=True, kw_only=True)
class Source(Format):
    """Where the official files of one data set are.

    Attributes:
        mirrors: addresses of folders, tried in turn.
        system_folder: where a Linux distribution's package puts the files.
    """

    mirrors: tuple[str, ...]
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
        if arrays := read(source, folder, shared):
            return arrays
        lacking = [file for file in source.files if not variant(folder / file)]
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


def optional(module: str, extra: str = "study") -> Any:
    """Import a module of one of the package's extras.

    Raises:
        ImportError: it is not installed; says how to.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{module} cannot be imported ({error}): pip install 'rkd[{extra}]'") from error


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
