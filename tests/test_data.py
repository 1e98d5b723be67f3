"""`rkd.data` and `rkd.models`: disjoint fixed splits, normalisation from the training part, networks made by seeds."""

import hashlib
import random
import subprocess
import sys

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from mnist1d.data import make_dataset
from sklearn.datasets import load_digits

from rkd.data import MNIST1D_SEED, NAMES, Split, digits, generated, load, subset, with_label_noise, without
from rkd.models import mlp
from rkd.sources import KEYS, SOURCES


def parts(data):
    return data.train, data.validation, data.test


def raw(data):
    """Undo the normalisation: images and labels of the three splits together."""
    x, y = (torch.cat(tensors) for tensors in zip(*parts(data)))
    shape = (-1, *[1] * (x.ndim - 2))
    return x * data.std.view(shape) + data.mean.view(shape), y


class TestDigits:
    data = digits()

    def test_sizes_and_types(self):
        assert [part.x.shape for part in parts(self.data)] == [(797, 1, 8, 8), (200, 1, 8, 8), (800, 1, 8, 8)]
        assert all(part.x.dtype == torch.float64 and part.y.dtype == torch.int64 for part in parts(self.data))
        assert digits(torch.float32).train.x.dtype == torch.float32

    def test_splits_are_disjoint_and_complete(self):
        """Undo the normalisation and compare the images, as a multiset, with scikit-learn's."""
        images, labels = load_digits(return_X_y=True)
        pixels, y = raw(self.data)
        found = sorted([*row, label] for row, label in zip(pixels.round().flatten(1).tolist(), y.tolist(), strict=True))
        assert found == sorted([*row, label] for row, label in zip(images.tolist(), labels.tolist(), strict=True))

    def test_rows_and_their_order_never_change(self):
        """Published figures rest on them."""
        pixels, y = raw(self.data)
        content = pixels.round().numpy().astype(np.uint8).tobytes() + y.numpy().astype("<i8").tobytes()
        known = "4875e7307f886b4beb4bfa19159ad8e4b9f17556598cf60dd5e99fc4c9d78d4c"
        assert hashlib.sha256(content).hexdigest() == known

    def test_classes_in_proportion(self):
        for part in parts(self.data):
            counts = part.y.bincount(minlength=10) / len(part.y)
            assert counts.min() > 0.09
            assert counts.max() < 0.11

    def test_normalised_by_the_training_part(self):
        assert abs(self.data.train.x.mean()) < 1e-12
        assert abs(self.data.train.x.std() - 1) < 1e-12
        assert abs(self.data.test.x.mean()) > 1e-6

    def test_the_split_is_fixed(self):
        assert torch.equal(digits().test.x, self.data.test.x)
        assert torch.equal(load("digits", dtype=torch.float64).train.x, self.data.train.x)

    def test_the_test_part_does_not_depend_on_the_validation_part(self):
        other = load("digits", 0, torch.float64)
        assert len(other.train.y) == 997
        assert torch.equal(other.test.y, self.data.test.y)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Small sets of all official names in RKD_DATA_DIR: three training images of each class and 50 test images."""
    monkeypatch.setenv("RKD_DATA_DIR", str(tmp_path))
    made = {}
    for name, source in SOURCES.items():
        generator = np.random.default_rng(0)
        y = np.arange(3 * source.classes, dtype=np.uint8) % source.classes
        x, x_test = (generator.integers(0, 256, (n, *source.shape), dtype=np.uint8) for n in (len(y), 50))
        made[name] = dict(zip(KEYS, (x, y, x_test, np.arange(50, dtype=np.uint8) % 10)))
        np.savez(tmp_path / f"{name}.npz", **made[name])
    return made


@pytest.mark.parametrize("name", SOURCES)
class TestOfficialSets:
    def test_splits(self, files, name):
        """Every image is where it belongs, channels first, and the validation part has each class once."""
        data, arrays, classes = load(name, SOURCES[name].classes), files[name], SOURCES[name].classes
        shape = (3, 32, 32) if "cifar" in name else (1, 28, 28)
        assert [part.x.shape for part in parts(data)] == [(n, *shape) for n in (2 * classes, classes, 50)]
        assert data.validation.y.bincount().tolist() == [1] * classes
        pixels, y = raw(data)
        pixels = pixels.round().to(torch.uint8).movedim(1, -1).reshape(len(y), -1).numpy()
        drawn = sorted(zip(pixels[:-50].tolist(), y[:-50].tolist()))
        assert drawn == sorted(zip(arrays["x_train"].reshape(3 * classes, -1).tolist(), arrays["y_train"].tolist()))
        assert np.array_equal(pixels[-50:], arrays["x_test"].reshape(50, -1))
        assert np.array_equal(y[-50:], arrays["y_test"])

    def test_normalised_by_channel(self, files, name):
        data = load(name, SOURCES[name].classes, torch.float64)
        channels = data.train.x.movedim(1, 0).flatten(1)
        assert data.mean.shape == data.std.shape == data.blank.shape == (len(channels),)
        assert torch.allclose(channels.mean(1), torch.zeros(len(channels), dtype=torch.float64))
        assert torch.allclose(channels.std(1), torch.ones(len(channels), dtype=torch.float64))

    def test_blank_is_a_black_pixel(self, files, tmp_path, name):
        files[name]["x_test"][0] = 0
        np.savez(tmp_path / f"{name}.npz", **files[name])
        data = load(name, 0)
        assert torch.equal(data.test.x[0], data.blank[:, None, None].expand(data.test.x[0].shape))

    def test_classes(self, files, name):
        names = load(name, 0).classes
        assert len(names) == len(set(names)) == SOURCES[name].classes

    def test_no_validation_part(self, files, name):
        data = load(name, 0)
        assert data.validation.x.shape == (0, *data.train.x.shape[1:])
        assert data.train.y.tolist() == files[name]["y_train"].tolist()

    def test_types(self, files, name):
        data = load(name, 0)
        assert all(part.x.dtype == torch.float32 and part.y.dtype == torch.int64 for part in parts(data))
        assert all(part.x.is_contiguous() for part in parts(data))
        assert load(name, 0, torch.float64).blank.dtype == torch.float64


class TestLoad:
    def test_bad_name(self):
        with pytest.raises(ValueError, match=f"name must be one of {', '.join(NAMES)}, got 'minst'"):
            load("minst")

    @pytest.mark.parametrize("count", [-1, 9, 988, 0.2, True])
    def test_bad_validation_count(self, count):
        with pytest.raises(ValueError, match=f"validation must be 0 or an integer in 10 … 987, got {count}"):
            load("digits", count)

    def test_constant_images(self, files, tmp_path):
        np.savez(tmp_path / "mnist.npz", **files["mnist"] | {"x_train": np.zeros((30, 28, 28), np.uint8)})
        with pytest.raises(ValueError, match=r"images of mnist must vary in each channel, got deviations \[0.0\]"):
            load("mnist", 0)

    def test_not_on_this_machine(self, tmp_path, monkeypatch):
        monkeypatch.setenv("RKD_CACHE_DIR", str(tmp_path))
        monkeypatch.delenv("RKD_DATA_DIR", raising=False)
        with pytest.raises(FileNotFoundError, match="`rkd data fetch mnist`"):
            load("mnist")

    def test_names_of_classes(self, files):
        assert load("fashion_mnist", 0).classes[9] == "Ankle boot"
        assert load("cifar10", 0).classes[6] == "frog"
        hundred = load("cifar100", 0).classes
        assert list(hundred) == sorted(hundred)
        assert (hundred[0], hundred[47], hundred[99]) == ("apple", "maple_tree", "worm")

    def test_importing_needs_torch_and_numpy_only(self):
        others = "{'sklearn', 'scipy', 'pooch', 'requests', 'mnist1d', 'matplotlib'}"
        code = f"import sys, rkd.data; print({others} & set(sys.modules))"
        assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"

    @pytest.mark.parametrize(("name", "module"), [("mnist1d", "mnist1d"), ("digits", "sklearn.datasets")])
    def test_a_package_is_missing(self, monkeypatch, name, module):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ImportError, match=rf"{module} cannot be imported .*: pip install 'rkd\[study\]'"):
            load(name)


class TestMNIST1D:
    data = load("mnist1d", dtype=torch.float64)

    def test_sizes(self):
        assert [part.x.shape for part in parts(self.data)] == [(3000, 1, 40), (1000, 1, 40), (1000, 1, 40)]
        assert all(part.y.bincount().min() >= 0.08 * len(part.y) for part in parts(self.data))

    def test_equals_the_package(self):
        """The package normalises by all its samples; normalised by the training part, both are the same."""
        state = random.getstate(), np.random.get_state()
        official = make_dataset()
        random.setstate(state[0])
        np.random.set_state(state[1])
        data = load("mnist1d", 0, torch.float64)
        x, x_test = (torch.tensor(official[key])[:, None] for key in ("x", "x_test"))
        assert data.train.y.tolist() == official["y"].tolist()
        assert data.test.y.tolist() == official["y_test"].tolist()
        assert torch.allclose(data.train.x, (x - x.mean()) / x.std(), atol=1e-12)
        assert torch.allclose(data.test.x, (x_test - x.mean()) / x.std(), atol=1e-12)

    def test_global_generators_are_left_alone(self):
        np.random.seed(3)
        random.seed(3)
        before = random.getstate(), torch.get_rng_state(), np.random.get_state()
        first = generated(self.data, 20, seed=1)
        assert random.getstate() == before[0]
        assert torch.equal(torch.get_rng_state(), before[1])
        assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), before[2]))
        np.random.seed(4)
        assert torch.equal(generated(self.data, 20, seed=1).x, first.x)

    def test_generator_state_survives_an_error(self, monkeypatch):
        def fail(*_):
            raise RuntimeError("no sample")

        before = np.random.get_state()[1].copy()
        monkeypatch.setattr("mnist1d.transform", fail)
        with pytest.raises(RuntimeError, match="no sample"):
            generated(self.data, 20)
        assert np.array_equal(np.random.get_state()[1], before)

    def test_generated(self):
        fresh = generated(self.data, 1003)
        assert fresh.x.shape == (1003, 1, 40)
        assert fresh.x.dtype == self.data.train.x.dtype
        assert fresh.y.bincount().tolist() == [101] * 3 + [100] * 7
        assert abs(fresh.x.mean()) < 0.05
        assert abs(fresh.x.std() - 1) < 0.05
        known = torch.cat([part.x for part in parts(self.data)])
        assert torch.cdist(fresh.x[:, 0], known[:, 0]).min() > 0.1

    def test_the_same_statistics_normalise(self, monkeypatch):
        """Generated with the official seed, which is refused otherwise, the official samples come out."""
        monkeypatch.setattr("rkd.data.MNIST1D_SEED", -1)
        again = generated(self.data, 5000, MNIST1D_SEED)
        assert torch.equal(again.x[4000:], self.data.test.x)

    @pytest.mark.parametrize("seed", [MNIST1D_SEED, -1, 2**32])
    def test_bad_seed(self, seed):
        with pytest.raises(ValueError, match=rf"seed must lie in \[0, 2³²\) and differ from 42, .* got {seed}"):
            generated(self.data, 10, seed)

    def test_bad_size_and_set(self):
        with pytest.raises(ValueError, match="size must be at least 1, got 0"):
            generated(self.data, 0)
        with pytest.raises(ValueError, match="like must be mnist1d, the only set with a generator, got digits"):
            generated(digits(), 10)


def numbered(labels):
    """A split whose x tells the rows apart."""
    return Split(torch.arange(len(labels), dtype=torch.float64).view(-1, 1, 1), torch.tensor(labels))


class TestSubset:
    @given(st.lists(st.sampled_from([0, 1, 1, 1, 3, 4, 4]), min_size=2, max_size=90), st.data(), st.integers(0, 3))
    def test_nested_and_in_proportion(self, labels, data, seed):
        """With k classes a count is off by at most ½ for itself and its share of k/2 for the common rounding."""
        split = numbered(labels)
        sizes = sorted(data.draw(st.tuples(*[st.integers(1, len(labels))] * 2)))
        small, large = (subset(split, size, seed) for size in sizes)
        assert torch.equal(large.x[: sizes[0]], small.x)
        rows = large.x.flatten().long()
        assert len(set(rows.tolist())) == sizes[1]
        assert torch.equal(split.y[rows], large.y)
        counts = split.y.bincount()
        shares = counts / len(labels)
        off = (large.y.bincount(minlength=len(counts)) - shares * sizes[1]).abs()
        assert (off <= 0.5 + shares * (counts > 0).sum() / 2 + 1e-6).all()

    def test_balanced_classes_differ_by_one(self):
        split = numbered(list(range(10)) * 7)
        for size in range(1, 71):
            counts = subset(split, size).y.bincount(minlength=10)
            assert counts.max() - counts.min() <= 1

    def test_seed(self):
        split = digits().train
        assert torch.equal(subset(split, 50, 1).x, subset(split, 50, 1).x)
        assert not torch.equal(subset(split, 50, 1).x, subset(split, 50, 2).x)

    @pytest.mark.parametrize("size", [0, -1, 5])
    def test_bad_size(self, size):
        with pytest.raises(ValueError, match=f"size must lie in 1 … 4, got {size}"):
            subset(numbered([0, 1, 0, 1]), size)


def test_without():
    split = numbered([2, 0, 1, 2, 0])
    assert without(split, [0]).x.flatten().tolist() == [0, 2, 3]
    assert without(split, {1, 2}).y.tolist() == [0, 0]
    assert without(split, ()).y.tolist() == split.y.tolist()
    assert without(split, range(3)).x.shape == (0, 1, 1)


class TestLabelNoise:
    @given(st.integers(1, 60), st.floats(0, 1), st.integers(2, 5), st.integers(0, 3))
    def test_exact_count(self, size, rate, classes, seed):
        split = numbered([i % classes for i in range(size)])
        noisy = with_label_noise(split, rate, classes, seed)
        assert (noisy.y != split.y).sum() == round(rate * size)
        assert torch.equal(noisy.x, split.x)
        assert 0 <= noisy.y.min() <= noisy.y.max() < classes
        assert torch.equal(noisy.y, with_label_noise(split, rate, classes, seed).y)
        assert split.y.tolist() == [i % classes for i in range(size)]

    def test_every_other_label_is_as_probable(self):
        noisy = with_label_noise(numbered([1] * 4000), 0.75, 4, 0).y.bincount().tolist()
        assert noisy[1] == 1000
        assert all(abs(noisy[label] - 1000) < 120 for label in (0, 2, 3))

    @pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
    def test_bad_rate(self, rate):
        with pytest.raises(ValueError, match=rf"rate must lie in \[0, 1\], got {rate}"):
            with_label_noise(numbered([0, 1]), rate, 2)

    @pytest.mark.parametrize("classes", [1, 2])
    def test_bad_classes(self, classes):
        with pytest.raises(ValueError, match=f"classes must be at least 2 and more than each label in .*got {classes}"):
            with_label_noise(numbered([0, 2]), 0.5, classes)


class TestMLP:
    def test_a_seed_decides_the_weights(self):
        x = torch.randn(3, 6, dtype=torch.float64)
        assert torch.equal(mlp([6, 5, 4], 1)(x), mlp([6, 5, 4], 1)(x))
        assert not torch.equal(mlp([6, 5, 4], 1)(x), mlp([6, 5, 4], 2)(x))

    def test_layers(self):
        model = mlp([6, 5, 5, 4], 0, dropout=0.5)
        assert sum(p.numel() for p in model.parameters()) == 6 * 5 + 5 + 5 * 5 + 5 + 5 * 4 + 4
        assert isinstance(model[-1], torch.nn.Linear)

    @pytest.mark.parametrize("sizes", [[3], [3, 0], []])
    def test_bad_sizes(self, sizes):
        with pytest.raises(ValueError, match="sizes must be at least two positive widths, got"):
            mlp(sizes, 0)
