"""`rkd.evaluation` against scikit-learn and a calibration error written out bin by bin."""

import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss

from rkd.evaluation import accuracy, agreement, ece, nll


@pytest.fixture(scope="module")
def case():
    generator = torch.Generator().manual_seed(0)
    return 2 * torch.randn(3, 5, 400, generator=generator), torch.randint(5, (400,), generator=generator)


def test_accuracy_and_likelihood(case):
    logits, y = case
    for row, a, b in zip(logits, accuracy(logits, y), nll(logits, y)):
        assert float(a) == pytest.approx(accuracy_score(y, row.argmax(0)))
        assert float(b) == pytest.approx(log_loss(y, row.double().softmax(0).T.numpy()), rel=1e-6)


def test_agreement_is_with_the_teachers_answer(case):
    logits, y = case
    teacher = torch.nn.functional.one_hot(y, 5).float()
    torch.testing.assert_close(agreement(logits, teacher), accuracy(logits, y))
    assert agreement(logits[0], logits[0].T) == 1


def test_calibration_error_bin_by_bin(case):
    logits, y = case
    confidence, guess = logits[1].double().softmax(0).max(0)
    total = 0.0
    for b in range(15):
        inside = (confidence > b / 15) & (confidence <= (b + 1) / 15)
        if inside.any():
            total += inside.double().mean() * ((guess == y)[inside].double().mean() - confidence[inside].mean()).abs()
    assert float(ece(logits, y)[1]) == pytest.approx(float(total), rel=1e-9)


def test_known_calibration():
    """Certain and right half of the time: 1/2. Uniform over two classes and right half of the time: 0."""
    y = torch.tensor([0, 1, 0, 1])
    certain = torch.tensor([[50.0] * 4, [-50.0] * 4])
    assert float(ece(certain, y)) == pytest.approx(0.5)
    assert float(ece(torch.zeros(2, 4), y)) == pytest.approx(0.0)
    assert float(ece(torch.full((2, 4), torch.nan), y)) != float(ece(certain, y))
