"""`rkd.data` and `rkd.models`: disjoint fixed splits, normalisation from the training part, networks made by seeds."""

import pytest
import torch
from sklearn.datasets import load_digits

from rkd.data import digits
from rkd.models import mlp


class TestDigits:
    data = digits()
    parts = (data.train, data.validation, data.test)

    def test_sizes_and_types(self):
        assert [part.x.shape for part in self.parts] == [(797, 64), (200, 64), (800, 64)]
        assert all(part.x.dtype == torch.float64 and part.y.dtype == torch.int64 for part in self.parts)
        assert digits(torch.float32).train.x.dtype == torch.float32

    def test_splits_are_disjoint_and_complete(self):
        """Undo the normalisation and compare the images, as a multiset, with scikit-learn's."""
        images, labels = load_digits(return_X_y=True)
        x = torch.cat([part.x for part in self.parts])
        low, high = x.min(), x.max()
        pixels = ((x - low) / (high - low) * 16).round()
        found = sorted([*row, label] for row, label in zip(pixels.tolist(), self.labels(), strict=True))
        assert found == sorted([*row, label] for row, label in zip(images.tolist(), labels.tolist(), strict=True))

    def labels(self):
        return torch.cat([part.y for part in self.parts]).tolist()

    def test_classes_in_proportion(self):
        for part in self.parts:
            counts = part.y.bincount(minlength=10) / len(part.y)
            assert counts.min() > 0.09
            assert counts.max() < 0.11

    def test_normalised_by_the_training_part(self):
        assert abs(self.data.train.x.mean()) < 1e-12
        assert abs(self.data.train.x.std() - 1) < 1e-12
        assert abs(self.data.test.x.mean()) > 1e-6

    def test_the_split_is_fixed(self):
        assert torch.equal(digits().test.x, self.data.test.x)


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
