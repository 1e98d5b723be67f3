"""`rkd.formats`: official files made small, every kind of damage. `rkd.sources`: a server that misbehaves."""

import dataclasses
import gzip
import hashlib
import io
import os
import socket
import sys
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import platformdirs
import pytest

from rkd import sources
from rkd.sources import KEYS, SOURCES, CorruptDataError, FetchError, fetch, find

IDX = tuple(SOURCES["mnist"].files)
CIFAR = {"cifar10": (1, 10), "cifar100": (2, 100)}


def images(name, count=6, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *SOURCES[name].shape), dtype=np.uint8)


def labels(name, count=6, seed=0):
    return np.random.default_rng(seed).integers(0, SOURCES[name].classes, count, dtype=np.uint8)


def idx(array):
    return bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def idx_parts(name="mnist"):
    return images(name), labels(name), images(name, 4, 1), labels(name, 4, 1)


def idx_files(name="mnist"):
    """The four official files, by name, gzipped."""
    return {file: gzip.compress(idx(part)) for file, part in zip(IDX, idx_parts(name))}


def records(name, x, y):
    """CIFAR's binary records; the coarse label is 19 throughout."""
    rows = zip(y, x.transpose(0, 3, 1, 2))
    return b"".join(bytes([19] * (CIFAR[name][0] - 1) + [label]) + image.tobytes() for label, image in rows)


def cifar_parts(name):
    """One batch of three images for each member of the archive, by member name."""
    members = (*SOURCES[name].train, *SOURCES[name].test)
    return {member: (images(name, 3, i), labels(name, 3, i)) for i, member in enumerate(members)}


def cifar_files(name):
    return {member: records(name, x, y) for member, (x, y) in cifar_parts(name).items()}


def archive(name, files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for member, raw in files.items():
            info = tarfile.TarInfo(f"{SOURCES[name].archive_folder}/{member}")
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
    return buffer.getvalue()


def expected_cifar(name):
    parts, source = cifar_parts(name), SOURCES[name]
    columns = (
        np.concatenate([parts[m][axis] for m in split]) for split in (source.train, source.test) for axis in (0, 1)
    )
    return tuple(columns)


def write(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, raw in files.items():
        (folder / name).write_bytes(raw)


def assert_found(name, expected):
    found = find(name)
    assert tuple(found) == KEYS
    for key, part in zip(KEYS, expected):
        assert found[key].dtype == (np.uint8 if key[0] == "x" else np.int64)
        assert found[key].flags.writeable
        assert np.array_equal(found[key], part)


@pytest.fixture
def data(tmp_path, monkeypatch):
    """An empty RKD_DATA_DIR."""
    monkeypatch.setenv("RKD_DATA_DIR", str(tmp_path / "data"))
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, no RKD_DATA_DIR and no system folder but in `tmp_path`."""
    monkeypatch.delenv("RKD_DATA_DIR", raising=False)
    monkeypatch.setenv("RKD_CACHE_DIR", str(tmp_path / "cache"))
    fashion = dataclasses.replace(SOURCES["fashion_mnist"], system_folder=str(tmp_path / "system"))
    monkeypatch.setitem(SOURCES, "fashion_mnist", fashion)
    return tmp_path / "cache"


class TestFind:
    @pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
    @pytest.mark.parametrize("gzipped", [True, False])
    def test_idx(self, data, name, gzipped):
        files = idx_files(name)
        write(data / name, files if gzipped else {k[:-3]: gzip.decompress(v) for k, v in files.items()})
        assert_found(name, idx_parts(name))

    def test_idx_in_the_shared_folder_is_not_taken(self, data):
        """MNIST and Fashion-MNIST have the same file names."""
        write(data, idx_files())
        for name in ("mnist", "fashion_mnist"):
            with pytest.raises(FileNotFoundError):
                find(name)

    @pytest.mark.parametrize("name", CIFAR)
    @pytest.mark.parametrize("place", [".", "{name}"])
    def test_cifar_archive(self, data, name, place):
        write(data / place.format(name=name), {next(iter(SOURCES[name].files)): archive(name, cifar_files(name))})
        assert_found(name, expected_cifar(name))

    @pytest.mark.parametrize("name", CIFAR)
    @pytest.mark.parametrize("place", ["{folder}", "{name}", "{name}/{folder}"])
    def test_cifar_unpacked(self, data, name, place):
        write(data / place.format(name=name, folder=SOURCES[name].archive_folder), cifar_files(name))
        assert_found(name, expected_cifar(name))

    def test_nothing_is_extracted(self, data):
        write(data, {"cifar-100-binary.tar.gz": archive("cifar100", {**cifar_files("cifar100"), "../../evil": b"x"})})
        before = sorted(data.parent.rglob("*"))
        find("cifar100")
        assert sorted(data.parent.rglob("*")) == before

    @pytest.mark.parametrize("name", SOURCES)
    @pytest.mark.parametrize("place", [".", "{name}"])
    def test_npz(self, data, name, place):
        parts = (images(name), labels(name), images(name, 4, 1), labels(name, 4, 1).astype(np.int32))
        folder = data / place.format(name=name)
        folder.mkdir(exist_ok=True)
        np.savez(folder / f"{name}.npz", classes=np.arange(3), **dict(zip(KEYS, parts)))
        assert_found(name, parts)

    def test_order_of_places(self, data, cache, tmp_path):
        first, second, third = (idx_parts(), idx_parts()[2:] * 2, idx_parts()[:2] * 2)
        write(cache / "fashion_mnist", {f: idx(p) for f, p in zip((f[:-3] for f in IDX), third)})
        assert_found("fashion_mnist", third)
        write(tmp_path / "system", {f: gzip.compress(idx(p)) for f, p in zip(IDX, second)})
        assert_found("fashion_mnist", second)
        write(data / "fashion_mnist", {f: gzip.compress(idx(p)) for f, p in zip(IDX, first)})
        assert_found("fashion_mnist", first)

    def test_not_found(self, data, cache):
        with pytest.raises(FileNotFoundError) as caught:
            find("cifar10")
        for part in (data, data / "cifar10", cache / "cifar10", "`rkd data fetch cifar10`", "cifar-10-binary.tar.gz"):
            assert str(part) in str(caught.value)

    def test_not_found_without_a_data_folder(self):
        with pytest.raises(FileNotFoundError, match=r"\(RKD_DATA_DIR is not set\)"):
            find("mnist")

    def test_incomplete(self, data):
        files = idx_files()
        del files[IDX[2]]
        write(data / "mnist", files)
        with pytest.raises(FileNotFoundError, match=rf"mnist \(incomplete, lacks {IDX[2]}\)"):
            find("mnist")

    @pytest.mark.parametrize("call", [find, fetch])
    def test_bad_name(self, call):
        with pytest.raises(
            ValueError, match="name must be one of mnist, fashion_mnist, cifar10, cifar100, got 'digits'"
        ):
            call("digits")

    def test_platform_cache(self, monkeypatch):
        monkeypatch.delenv("RKD_CACHE_DIR")
        monkeypatch.setattr(platformdirs, "user_cache_path", lambda project: Path("platform") / project)
        with pytest.raises(FileNotFoundError, match=os.path.join("platform", "rkd", "mnist")):
            find("mnist")

    def test_a_package_is_missing(self, monkeypatch):
        monkeypatch.delenv("RKD_CACHE_DIR")
        monkeypatch.setitem(sys.modules, "platformdirs", None)
        with pytest.raises(ImportError, match=r"pip install 'rkd\[study\]'"):
            find("mnist")

    folder = Path(SOURCES["fashion_mnist"].system_folder)

    @pytest.mark.skipif(not folder.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed")
    def test_real_fashion_mnist(self, monkeypatch):
        source = dataclasses.replace(SOURCES["fashion_mnist"], system_folder=str(self.folder))
        monkeypatch.setitem(SOURCES, "fashion_mnist", source)
        found = find("fashion_mnist")
        assert [found[key].shape for key in KEYS] == [(60000, 28, 28), (60000,), (10000, 28, 28), (10000,)]
        assert np.bincount(found["y_train"]).tolist() == [6000] * 10
        assert np.bincount(found["y_test"]).tolist() == [1000] * 10
        assert found["x_train"].mean() / 255 == pytest.approx(0.2860, abs=5e-5)
        assert found["x_train"].std() / 255 == pytest.approx(0.3530, abs=5e-5)


def assert_corrupt(name, path, *words):
    """The message holds the path, what was expected and found, and the way out."""
    with pytest.raises(CorruptDataError) as caught:
        find(name)
    for word in (str(path), "expected", "found", f"`rkd data fetch {name}`", *words):
        assert word in str(caught.value)


def put(array, *position, value):
    array = array.copy()
    array[position] = value
    return array


class TestCorruptIdx:
    x, y, *_ = idx_parts()

    @pytest.mark.parametrize(
        ("file", "raw", "words"),
        [
            (0, idx(x)[:-1], ("4720 bytes for shape (6, 28, 28)", "4719 bytes")),
            (0, idx(x) + b"\0", ("4720 bytes", "4721 bytes")),
            (1, idx(y)[:-2], ("14 bytes for shape (6,)", "12 bytes")),
            (0, b"\0\0\x0d\x03" + idx(x)[4:], ("00 00 08 03", "00 00 0d 03")),
            (0, idx(y), ("00 00 08 03", "00 00 08 01")),
            (1, idx(x), ("00 00 08 01", "00 00 08 03")),
            (0, b"<html>not found</html>", ("00 00 08 03", "3c 68 74 6d")),
            (0, idx(x)[:9], ("00 00 08 03",)),
            (0, b"", ("00 00 08 03", "nothing")),
            (0, idx(x[:, :27]), ("shape (N, 28, 28)", "(6, 27, 28)")),
            (0, idx(x[:0]), ("shape (N, 28, 28)", "(0, 28, 28)")),
            (0, idx(x[:5]), ("5 integer labels", "(6,)")),
            (1, idx(y[:5]), ("6 integer labels", "(5,)")),
            (1, idx(put(y, 3, value=10)), ("labels from 0 to 9", "to 10")),
        ],
    )
    @pytest.mark.parametrize("gzipped", [True, False])
    def test_content(self, data, file, raw, words, gzipped):
        write(data / "mnist", idx_files())
        good = data / "mnist" / IDX[file]
        good.unlink()
        bad = good if gzipped else good.with_suffix("")
        bad.write_bytes(gzip.compress(raw) if gzipped else raw)
        assert_corrupt("mnist", data / "mnist", *words)

    def test_the_path_is_named(self, data):
        write(data / "mnist", {**idx_files(), IDX[3]: gzip.compress(idx(self.x))})
        assert_corrupt("mnist", data / "mnist" / IDX[3])

    @pytest.mark.parametrize("damage", ["cut", "flipped", "block type", "plain", "tail"])
    def test_gzip(self, data, damage):
        good = gzip.compress(idx(self.x))
        middle = len(good) // 2
        bad = {
            "cut": good[:middle],
            "flipped": good[:middle] + bytes([good[middle] ^ 255]) + good[middle + 1 :],
            "block type": good[:10] + b"\xff" + good[11:],
            "plain": idx(self.x),
            "tail": good[:-8] + bytes(8),
        }[damage]
        write(data / "mnist", {**idx_files(), IDX[0]: bad})
        assert_corrupt("mnist", data / "mnist" / IDX[0], "a complete gzip file")


@pytest.mark.parametrize("name", CIFAR)
class TestCorruptCifar:
    def write(self, data, name, files):
        write(data, {next(iter(SOURCES[name].files)): archive(name, files)})
        return data / next(iter(SOURCES[name].files))

    @pytest.mark.parametrize("change", [lambda raw: raw[:-1], lambda raw: raw + b"\0", lambda raw: b""])
    def test_length(self, data, name, change):
        files, member = cifar_files(name), SOURCES[name].test[0]
        path = self.write(data, name, {**files, member: change(files[member])})
        assert_corrupt(name, path / member, f"records of {3072 + CIFAR[name][0]} bytes")

    def test_label(self, data, name):
        member = SOURCES[name].train[-1]
        raw = records(name, images(name, 1), [CIFAR[name][1]])
        path = self.write(data, name, {**cifar_files(name), member: raw})
        assert_corrupt(name, path / member, f"labels from 0 to {CIFAR[name][1] - 1}")

    def test_unpacked(self, data, name):
        files, member = cifar_files(name), SOURCES[name].train[0]
        write(data / name, {**files, member: files[member][:-1]})
        assert_corrupt(name, data / name / member)

    def test_member_is_missing(self, data, name):
        files = cifar_files(name)
        del files[SOURCES[name].test[0]]
        path = self.write(data, name, files)
        assert_corrupt(name, path, f"no {SOURCES[name].archive_folder}/{SOURCES[name].test[0]}")

    @pytest.mark.parametrize("damage", ["cut", "flipped", "plain", "empty", "gzip of text"])
    def test_archive(self, data, name, damage):
        path = self.write(data, name, cifar_files(name))
        good = path.read_bytes()
        middle = len(good) // 2
        path.write_bytes(
            {
                "cut": good[:middle],
                "flipped": good[:middle] + bytes(b ^ 255 for b in good[middle : middle + 9]) + good[middle + 9 :],
                "plain": b"<html>moved</html>",
                "empty": b"",
                "gzip of text": gzip.compress(b"text " * 500),
            }[damage]
        )
        assert_corrupt(name, path)


GOOD = dict(zip(KEYS, idx_parts()))


class Trap:
    """Unpickling it would end the test run."""

    def __reduce__(self):
        return os._exit, (1,)


class TestCorruptNpz:
    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"x_train": GOOD["x_train"].astype(float)}, ("type uint8", "float64")),
            ({"x_train": GOOD["x_train"][..., :27]}, ("shape (N, 28, 28)", "(6, 28, 27)")),
            ({"x_test": GOOD["x_test"][..., None]}, ("shape (N, 28, 28)", "(4, 28, 28, 1)")),
            ({"x_test": GOOD["x_test"][:0]}, ("shape (N, 28, 28)", "(0, 28, 28)")),
            ({"x_test": np.uint8(0)}, ("shape (N, 28, 28)", "()")),
            ({"y_train": GOOD["y_train"].astype(float)}, ("integer labels", "float64")),
            ({"y_train": GOOD["y_train"][:, None]}, ("6 integer labels", "(6, 1)")),
            ({"y_test": GOOD["y_test"][:3]}, ("4 integer labels", "(3,)")),
            ({"y_test": GOOD["y_test"].astype(int) - 20}, ("labels from 0 to 9",)),
            ({"y_test": put(GOOD["y_test"], 0, value=10)}, ("labels from 0 to 9", "to 10")),
            ({"y_train": np.array([Trap()] * 6, dtype=object)}, ("plain arrays", "Object arrays")),
        ],
    )
    def test_arrays(self, data, change, words):
        np.savez(data / "mnist.npz", **{**GOOD, **change})
        assert_corrupt("mnist", data / "mnist.npz", *words)

    @pytest.mark.parametrize("key", KEYS)
    def test_key_is_missing(self, data, key):
        np.savez(data / "mnist.npz", **{k: v for k, v in GOOD.items() if k != key})
        assert_corrupt("mnist", data / "mnist.npz", f"no {key}")

    @pytest.mark.parametrize("damage", ["cut", "flipped", "text", "empty", "npy"])
    def test_file(self, data, damage):
        path = data / "mnist.npz"
        np.savez_compressed(path, **GOOD)
        good, npy = path.read_bytes(), io.BytesIO()
        np.save(npy, GOOD["x_train"])
        path.write_bytes(
            {
                "cut": good[: len(good) // 2],
                "flipped": good[:1000] + bytes(b ^ 255 for b in good[1000:1009]) + good[1009:],
                "text": b"not an archive",
                "empty": b"",
                "npy": npy.getvalue(),
            }[damage]
        )
        assert_corrupt("mnist", path)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        body = self.server.files.get(self.path)
        if body is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if self.path in self.server.cut else body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """A mirror at /good/ of tiny MNIST and CIFAR-100; SOURCES point at it. `files`, `cut` and `asked` are its state."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    files = {
        "mnist": idx_files(),
        "cifar100": {"cifar-100-binary.tar.gz": archive("cifar100", cifar_files("cifar100"))},
    }
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        httpd.files = {f"/good/{file}": raw for group in files.values() for file, raw in group.items()}
        httpd.cut, httpd.asked = set(), []
        httpd.url = f"http://127.0.0.1:{httpd.server_port}"
        for name, group in files.items():
            hashes = {file: hashlib.md5(raw).hexdigest() for file, raw in group.items()}
            source = dataclasses.replace(SOURCES[name], mirrors=(f"{httpd.url}/good/",), files=hashes)
            monkeypatch.setitem(SOURCES, name, source)
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield httpd
        httpd.shutdown()
        thread.join()


@pytest.fixture
def dead():
    """The address of a port on which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}/"


def mirrors(monkeypatch, name, *urls):
    monkeypatch.setitem(SOURCES, name, dataclasses.replace(SOURCES[name], mirrors=urls))


class TestFetch:
    def test_success(self, server, cache):
        assert fetch("mnist") == cache / "mnist"
        assert sorted(path.name for path in (cache / "mnist").iterdir()) == sorted(IDX)
        assert_found("mnist", idx_parts())
        fetch("cifar100")
        assert_found("cifar100", expected_cifar("cifar100"))

    def test_what_is_there_is_kept(self, server):
        fetch("mnist")
        asked = len(server.asked)
        fetch("mnist")
        assert len(server.asked) == asked

    def test_a_damaged_file_is_replaced(self, server, cache):
        fetch("mnist")
        (cache / "mnist" / IDX[0]).write_bytes(b"damaged")
        assert_corrupt("mnist", cache / "mnist" / IDX[0])
        fetch("mnist")
        assert_found("mnist", idx_parts())

    def test_find_never_downloads(self, server):
        with pytest.raises(FileNotFoundError):
            find("mnist")
        assert server.asked == []

    def assert_fails(self, server, cache, name, file, *words):
        """The error names the address and the hash; of the failed file nothing is left, and later all can be mended."""
        with pytest.raises(FetchError) as caught:
            fetch(name)
        for word in (file, SOURCES[name].files[file], f"`rkd data fetch {name}`", *words):
            assert word in str(caught.value)
        before = list(SOURCES[name].files)[: list(SOURCES[name].files).index(file)]
        assert sorted(path.name for path in (cache / name).iterdir()) == sorted(before)
        with pytest.raises(FileNotFoundError):
            find(name)

    @pytest.mark.parametrize(("name", "file"), [("mnist", IDX[2]), ("cifar100", "cifar-100-binary.tar.gz")])
    @pytest.mark.parametrize("failure", ["other content", "cut", "404"])
    def test_failure(self, server, cache, name, file, failure):
        path = f"/good/{file}"
        good = server.files[path]
        word = server.url + path
        if failure == "other content":
            server.files[path] = good[:-1] + b"\xff"
            word = hashlib.md5(server.files[path]).hexdigest()
        elif failure == "cut":
            server.cut.add(path)
        else:
            del server.files[path]
            word = "404"
        self.assert_fails(server, cache, name, file, server.url + path, word)
        server.files[path], server.cut = good, set()
        server.asked.clear()
        fetch(name)
        assert server.asked == [
            f"/good/{f}" for f in list(SOURCES[name].files)[list(SOURCES[name].files).index(file) :]
        ]
        find(name)

    def test_no_server(self, server, dead, cache, monkeypatch):
        mirrors(monkeypatch, "mnist", dead)
        self.assert_fails(server, cache, "mnist", IDX[0], dead + IDX[0])

    def test_second_mirror(self, server, dead, monkeypatch):
        mirrors(monkeypatch, "mnist", dead, f"{server.url}/gone/", f"{server.url}/good/")
        fetch("mnist")
        assert_found("mnist", idx_parts())

    def test_second_mirror_after_wrong_content(self, server, monkeypatch):
        server.files |= {f"/bad/{file}": b"<html>please log in</html>" for file in IDX}
        mirrors(monkeypatch, "mnist", f"{server.url}/bad/", f"{server.url}/good/")
        fetch("mnist")
        assert_found("mnist", idx_parts())

    def test_all_mirrors_are_named(self, server, dead, monkeypatch):
        mirrors(monkeypatch, "mnist", dead, f"{server.url}/gone/")
        with pytest.raises(FetchError) as caught:
            fetch("mnist")
        assert f"\n  {dead}{IDX[0]}: " in str(caught.value)
        assert f"\n  {server.url}/gone/{IDX[0]}: 404" in str(caught.value)

    @pytest.mark.parametrize("terminal", [True, False])
    def test_progress_bar_on_a_terminal_only(self, server, monkeypatch, capsys, terminal):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
        fetch("cifar100")
        assert ("B/s" in capsys.readouterr().err) == terminal


@pytest.mark.parametrize("name", SOURCES)
def test_registry(name):
    source = SOURCES[name]
    assert source.name == name
    assert all(mirror.startswith("http") and mirror.endswith("/") for mirror in source.mirrors)
    assert all(len(bytes.fromhex(md5)) == 16 for md5 in source.files.values())
    assert not any("python" in file for file in source.files)


def test_optional():
    assert sources.optional("math").pi > 3
    with pytest.raises(ImportError, match=r"no_such_module cannot be imported .*: pip install 'rkd\[study\]'"):
        sources.optional("no_such_module")
