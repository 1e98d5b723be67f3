"""`rkd.acceleration`: what a mode means on a device, weights as networks read them, recorded steps."""

import pytest
import torch
from fake_graphs import fake_graphs
from torch import nn

from rkd.acceleration import PLAIN, Acceleration, Replayed, storage
from rkd.resnets import resnet

MIXED = Acceleration(mixed=True)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("float32", "cpu"), PLAIN),
        (("float64", "cpu", "eager"), PLAIN),
        (("bf16", "cpu"), MIXED),
        (("bf16", "cpu", "compiled"), Acceleration(mixed=True, compiled=True)),
        (("float32", "cuda"), Acceleration(captured=True, streams=4)),
        (("float32", "cuda", "eager"), PLAIN),
        (("bf16", "cuda", "graphs"), Acceleration(mixed=True, captured=True, streams=4)),
        (("bf16", "cuda:1", "compiled"), Acceleration(mixed=True, compiled=True, captured=True, streams=4)),
    ],
)
def test_modes(arguments, expected):
    assert Acceleration.of(*arguments) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("half", "cpu"), "precision must be one of float32, float64, bf16, got 'half'"),
        (("bf16", "cpu", "fast"), "mode must be one of auto, eager, graphs, compiled, got 'fast'"),
        (("bf16", "cpu", "graphs"), "mode graphs needs a GPU, got device 'cpu'"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        Acceleration.of(*arguments)


def test_weights_are_stored_in_single_precision():
    types = {"float32": torch.float32, "float64": torch.float64, "bf16": torch.float32}
    assert {precision: storage(precision) for precision in types} == types


def test_weights_as_networks_read_them():
    """The values of a cast; each network's convolution with its channels last; gradients come back in single."""
    generator = torch.Generator().manual_seed(0)
    for shape in [(2, 3, 5, 4, 3, 3), (2, 3, 5, 4)]:
        weight = torch.randn(shape, generator=generator, requires_grad=True)
        read = MIXED.lowered(weight, 2)
        assert read.dtype == torch.bfloat16
        assert torch.equal(read, weight.to(torch.bfloat16))
        if len(shape) == 6:
            assert read[1, 2].is_contiguous(memory_format=torch.channels_last)
        factor = torch.randn(shape, generator=generator)
        (gradient,) = torch.autograd.grad((read.float() * factor).sum(), weight)
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, factor.to(torch.bfloat16).float())
    scale = torch.ones(2, 3, 7)
    assert MIXED.lowered(scale, 2) is scale
    assert PLAIN.lowered(weight, 2) is weight


def test_inference_is_autocast_of_the_network():
    torch.manual_seed(0)
    network = resnet(8, (4, 4, 8, 8), 10).eval()
    x = torch.randn(6, 3, 8, 8)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    answers = MIXED.inference(network)(x)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = network(x.contiguous(memory_format=torch.channels_last))
    assert answers.dtype == torch.float32
    assert not answers.requires_grad
    torch.testing.assert_close(answers, expected.float(), rtol=2e-2, atol=2e-3)
    assert not torch.equal(answers, network(x))
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert PLAIN.inference(network) is network


def test_a_compiled_function_is_asked_for(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: asked.append(options) or function)
    Acceleration(compiled=True).inference(nn.Linear(2, 2))
    assert asked == [{"dynamic": False}]


def test_steps_are_recorded_once_a_shape_and_replayed(monkeypatch):
    recordings, total, calls = fake_graphs(monkeypatch), torch.zeros(()), []

    def step(a, b):
        calls.append(a.data_ptr())
        total.add_((a * b).sum())

    replayed = Replayed(step)
    expected = 0.0
    for i in range(6):
        for n in (2, 3):
            replayed(torch.full((n,), float(i)), torch.tensor(2.0))
            expected += n * i * 2
    assert total == expected
    assert [recording.replays for recording in recordings] == [3, 3]
    assert len(set(calls[6:])) == 2  # one place for each shape
