"""`rkd.models` and `rkd.resnets`: published sizes, independent forward passes, seeds, stacking, bad input."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from rkd.models import MODELS, build, cnn, cnn1d, mlp, options_of, parameter_count, stackable
from rkd.resnets import resnet, wide_resnet

# parameters at 100 classes, and their number and that of multiplications in millions as published (but wrn_10_1)
CIFAR = {
    "resnet8": (83_892, 0.084, 12.5),
    "resnet20": (278_324, 0.278, 40.8),
    "resnet56": (861_620, 0.862, 125.8),
    "resnet8x4": (1_233_540, 1.234, 177),
    "resnet32x4": (7_433_860, 7.434, 1083),
    "wrn_10_1": (83_700, 0.084, 12.5),
    "wrn_16_2": (703_284, 0.703, 101.1),
    "wrn_40_2": (2_255_156, 2.255, 327.6),
}
# blocks a stage, and widths of stem and stages
LAYOUT = {
    "resnet8": (1, (16, 16, 32, 64)),
    "wrn_10_1": (1, (16, 16, 32, 64)),
    "resnet20": (3, (16, 16, 32, 64)),
    "resnet56": (9, (16, 16, 32, 64)),
    "resnet8x4": (1, (32, 64, 128, 256)),
    "resnet32x4": (5, (32, 64, 128, 256)),
    "wrn_16_2": (2, (16, 32, 64, 128)),
    "wrn_40_2": (6, (16, 32, 64, 128)),
}
COLOUR = (3, 32, 32)
STACKABLE = [
    ("mlp", (1, 8, 8), {"hidden": [7, 6]}),
    ("mlp", (1, 40), {"hidden": []}),
    ("mlp", (5,), {"hidden": [3], "dropout": 0.0}),
    ("cnn", (1, 8, 8), {"width": 3}),
    ("cnn", (3, 9, 6), {"width": 2}),
    ("cnn1d", (1, 40), {"width": 4}),
    ("cnn1d", (2, 3), {}),
]
SMALL = [*STACKABLE, ("mlp", (6,), {"hidden": [5], "dropout": 0.5}), ("resnet20", COLOUR, {}), ("wrn_16_2", COLOUR, {})]


class TestSizes:
    @pytest.mark.parametrize("model", CIFAR)
    def test_cifar_networks(self, model):
        count, millions, macs = CIFAR[model]
        network = build(model, COLOUR, 100, 0)
        assert parameter_count(network) == count
        assert count / 1e6 == pytest.approx(millions, abs=5e-4)
        with FlopCounterMode(display=False) as counter:
            assert network.to("meta")(torch.empty(1, *COLOUR, device="meta")).shape == (1, 100)
        assert counter.get_total_flops() / 2e6 == pytest.approx(macs, rel=2e-3)

    @pytest.mark.parametrize("model", LAYOUT)
    @pytest.mark.parametrize("classes", [10, 100])
    def test_cifar_networks_by_hand(self, model, classes):
        blocks, (stem, *stages) = LAYOUT[model]
        count, before = 27 * stem, stem
        if wide := model.startswith("wrn"):
            count += 2 * stages[-1]  # batch norm before the head
        else:
            count += 2 * stem
        for width in stages:
            count += 9 * before * width + (2 * blocks - 1) * 9 * width**2  # 3×3 convolutions
            count += 2 * before + (2 * blocks - 1) * 2 * width if wide else 4 * blocks * width  # batch norms
            if before != width:
                count += before * width + (0 if wide else 2 * width)  # the shortcut
            before = width
        assert parameter_count(build(model, COLOUR, classes, 0)) == count + (before + 1) * classes

    @pytest.mark.parametrize(
        ("model", "shape", "options", "count"),
        [
            ("mlp", (1, 28, 28), {"hidden": [1200, 1200], "dropout": 0.5}, 785 * 1200 + 1201 * 1200 + 1201 * 10),
            ("mlp", (1, 40), {"hidden": []}, 410),
            ("cnn", (1, 28, 28), {}, 50_186),
            ("cnn", (1, 28, 28), {"width": 4}, 40 + 296 + 3930),
            ("cnn", (1, 8, 8), {"width": 4}, 40 + 296 + 330),
            ("cnn1d", (1, 40), {}, 5210),
            ("cnn1d", (1, 40), {"width": 5}, 30 + 80 + 80 + 260),
        ],
    )
    def test_small_networks(self, model, shape, options, count):
        network = build(model, shape, 10, 0, **options)
        assert parameter_count(network) == count
        assert network(torch.randn(3, *shape)).shape == (3, 10)

    def test_no_dropout_modules_without_dropout(self):
        assert [type(layer) for layer in mlp([6, 5, 5, 4], 0)] == [nn.Flatten, *[nn.Linear, nn.ReLU] * 2, nn.Linear]
        dropped = mlp([6, 5, 5, 4], 0, dropout=0.3)
        assert [layer.p for layer in dropped if isinstance(layer, nn.Dropout)] == [0.3, 0.3]
        assert torch.equal(dropped[-1].weight, mlp([6, 5, 5, 4], 0)[-1].weight)

    def test_an_mlp_flattens(self):
        model, x = mlp([24, 5, 3], 0), torch.randn(7, 2, 3, 4, dtype=torch.float64)
        assert torch.equal(model(x), model(x.view(7, 24)))


class TestForward:
    """The residual networks against a plain function of their parameters and statistics, taken in order."""

    @staticmethod
    def entries(network):
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)
        return iter(value.detach() for name, value in network.state_dict().items() if "num_batches" not in name)

    @staticmethod
    def norm(x, entries):
        weight, bias, mean, variance = (next(entries)[:, None, None] for _ in range(4))
        return (x - mean) / (variance + 1e-5).sqrt() * weight + bias

    def check(self, network, plain):
        entries, x = self.entries(network), torch.randn(2, 3, 32, 32, dtype=torch.float64)
        last = plain(x, entries).mean((2, 3))
        expected = last @ next(entries).T + next(entries)
        assert next(entries, None) is None
        torch.testing.assert_close(network.eval()(x), expected, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("model", ["resnet8x4", "resnet20"])
    def test_resnet(self, model):
        def plain(x, entries):
            x, before = self.norm(F.conv2d(x, next(entries), padding=1), entries).relu(), widths[0]
            for width, stage_stride in zip(widths[1:], (1, 2, 2)):
                for stride in [stage_stride] + [1] * (blocks - 1):
                    out = self.norm(F.conv2d(x, next(entries), stride=stride, padding=1), entries).relu()
                    out = self.norm(F.conv2d(out, next(entries), padding=1), entries)
                    if before != width:
                        x = self.norm(F.conv2d(x, next(entries), stride=stride), entries)
                    x, before = (out + x).relu(), width
            return x

        blocks, widths = LAYOUT[model]
        self.check(build(model, COLOUR, 10, 0, torch.float64), plain)

    def test_wide_resnet(self):
        def plain(x, entries):
            x, before = F.conv2d(x, next(entries), padding=1), widths[0]
            for width, stage_stride in zip(widths[1:], (1, 2, 2)):
                for stride in [stage_stride] + [1] * (blocks - 1):
                    a = self.norm(x, entries).relu()
                    out = F.conv2d(a, next(entries), stride=stride, padding=1)
                    out = F.conv2d(self.norm(out, entries).relu(), next(entries), padding=1)
                    x = out + (x if before == width else F.conv2d(a, next(entries), stride=stride))
                    before = width
            return self.norm(x, entries).relu()

        blocks, widths = LAYOUT["wrn_16_2"]
        self.check(build("wrn_16_2", COLOUR, 10, 0, torch.float64), plain)

    @pytest.mark.parametrize("model", ["resnet8x4", "wrn_16_2"])
    def test_initial_weights(self, model):
        network = build(model, COLOUR, 100, 0)
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                expected = (2 / (module.kernel_size[0] ** 2 * module.out_channels)) ** 0.5
                assert module.weight.detach().std() == pytest.approx(expected, rel=5 / module.weight.numel() ** 0.5)
                assert abs(module.weight.mean()) < 5 * expected / module.weight.numel() ** 0.5
            if isinstance(module, nn.BatchNorm2d):
                assert (module.weight == 1).all()
                assert (module.bias == 0).all()
        assert (network[-1].bias == 0).all() == (model == "wrn_16_2")


class TestSeeds:
    @pytest.mark.parametrize(("model", "shape", "options"), SMALL)
    def test_a_seed_decides_the_weights(self, model, shape, options):
        one, again, other = (build(model, shape, 10, seed, **options).state_dict() for seed in (1, 1, 2))
        assert all(torch.equal(one[name], again[name]) for name in one)
        assert not torch.equal(list(one.values())[-2], list(other.values())[-2])

    @pytest.mark.parametrize(("model", "shape", "options"), SMALL)
    def test_global_state_is_neither_read_nor_moved(self, model, shape, options, monkeypatch):
        """An accelerator's generator is not reseeded either, and a default device has no say."""
        expected = build(model, shape, 10, 1, **options)
        monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("accelerator reseeded"))
        torch.rand(3)
        state = torch.get_rng_state()
        with torch.device("meta"):
            weights = build(model, shape, 10, 1, **options).state_dict()
        assert torch.equal(state, torch.get_rng_state())
        assert all(torch.equal(weights[name], value) for name, value in expected.state_dict().items())

    @pytest.mark.parametrize(("model", "shape", "options"), SMALL)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_dtype(self, model, shape, options, dtype):
        network = build(model, shape, 10, 0, dtype, **options)
        assert {p.dtype for p in network.parameters()} == {dtype}
        assert network(torch.randn(2, *shape, dtype=dtype)).dtype == dtype

    def test_build_is_the_named_function(self):
        x = torch.randn(2, 1, 8, 8)
        named = build("mlp", (1, 8, 8), 3, 5, hidden=[4])
        assert torch.equal(named(x), mlp([64, 4, 3], 5, dtype=torch.float32)(x))
        assert torch.equal(build("cnn", (1, 8, 8), 3, 5, width=4)(x), cnn((1, 8, 8), 3, 5, width=4)(x))
        assert torch.equal(build("cnn1d", (1, 8), 3, 5)(x[:, :, 0]), cnn1d((1, 8), 3, 5)(x[:, :, 0]))


class TestStacks:
    @pytest.mark.parametrize(("model", "shape", "options"), STACKABLE)
    def test_a_stack_is_its_networks(self, model, shape, options):
        """Logits and gradients of three networks, each on a batch of its own."""
        networks = [build(model, shape, 4, seed, torch.float64, **options) for seed in range(3)]
        assert all(map(stackable, networks))
        x = torch.randn(3, 5, *shape, dtype=torch.float64)
        parameters, buffers = torch.func.stack_module_state(networks)
        forward = lambda p, b, x: torch.func.functional_call(networks[0], (p, b), (x,))  # noqa: E731
        logits = torch.vmap(forward)(parameters, buffers, x)
        separate = torch.stack([network(batch) for network, batch in zip(networks, x)])
        torch.testing.assert_close(logits, separate, rtol=1e-12, atol=1e-12)
        gradients = torch.autograd.grad(logits.sin().sum(), list(parameters.values()))
        separate.sin().sum().backward()
        for name, gradient in zip(parameters, gradients, strict=True):
            expected = torch.stack([network.get_parameter(name).grad for network in networks])
            torch.testing.assert_close(gradient, expected, rtol=1e-11, atol=1e-12)

    def test_batch_norm_and_dropout_do_not_stack(self):
        assert not stackable(mlp([6, 5, 4], 0, dropout=0.1))
        assert not any(stackable(build(model, COLOUR, 10, 0)) for model in ("resnet20", "wrn_16_2"))
        assert stackable(nn.Sequential(nn.Dropout(0.0), nn.LayerNorm(3)))
        assert not stackable(nn.ModuleList([nn.AlphaDropout(0.2)]))
        assert not stackable(nn.BatchNorm1d(3))


class TestOptions:
    def test_options_with_types_and_defaults(self):
        options = {
            model: {name: (o.annotation, o.default) for name, o in options_of(model).items()} for model in MODELS
        }
        assert options == {
            "mlp": {"hidden": (list[int], inspect.Parameter.empty), "dropout": (float, 0.0)},
            "cnn": {"width": (int, 32)},
            "cnn1d": {"width": (int, 25)},
            **{name: {} for name in CIFAR},
        }

    @pytest.mark.parametrize(
        ("arguments", "options", "message"),
        [
            (("vgg", (1, 8, 8), 10, 0), {}, "model must be one of mlp, cnn, cnn1d, resnet8, .*, wrn_40_2, got 'vgg'"),
            (("mlp", (8,), 10, 0), {"width": 3}, r"options of mlp must be among \[hidden, dropout\], got width"),
            (("resnet20", COLOUR, 10, 0), {"width": 3}, r"options of resnet20 must be among \[\], got width"),
            (("mlp", (8,), 10, 0), {"dropout": 0.1}, r"options of mlp must include hidden, got \[dropout\]"),
            (("mlp", (8,), 10, 0), {"hidden": [3, 0]}, r"hidden must be positive widths, got \[3, 0\]"),
            (("mlp", (8,), 10, 0), {"hidden": [3], "dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
            (("mlp", (8, 0), 10, 0), {"hidden": [3]}, r"shape must hold positive sizes, got \(8, 0\)"),
            (("mlp", (), 10, 0), {"hidden": [3]}, r"shape must hold positive sizes, got \(\)"),
            (("mlp", (8,), 0, 0), {"hidden": [3]}, "classes must be at least 1, got 0"),
            (("cnn", (1, 8, 8), 10, 0), {"width": 0}, "width must be at least 1, got 0"),
            (("cnn", (1, 40), 10, 0), {}, r"shape must be \(channels, height, width\), .* for cnn, got \(1, 40\)"),
            (("cnn", (1, 3, 8), 10, 0), {}, r"4×4 pixels at least, for cnn, got \(1, 3, 8\)"),
            (("cnn1d", (1, 8, 8), 10, 0), {}, r"shape must be \(channels, length\), .* for cnn1d, got \(1, 8, 8\)"),
            (("cnn1d", (1, 2), 10, 0), {}, r"length at least 3, for cnn1d, got \(1, 2\)"),
            (("cnn1d", (1, 40), 10, 0), {"width": -1}, "width must be at least 1, got -1"),
            (("resnet20", (1, 28, 28), 10, 0), {}, r"shape must be \(3, 32, 32\) for a CIFAR network, got \(1, 28, 28"),
        ],
    )
    def test_bad_input(self, arguments, options, message):
        with pytest.raises(ValueError, match=message):
            build(*arguments, **options)

    def test_bad_depth(self):
        with pytest.raises(ValueError, match=r"depth must be 6n \+ 2 with n at least 1, got 18"):
            resnet(18, (16, 16, 32, 64), 10)
        with pytest.raises(ValueError, match=r"depth must be 6n \+ 4 with n at least 1, got 4"):
            wide_resnet(4, 2, 10)
