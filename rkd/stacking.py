"""Many copies of one network as one batched model, and optimisers with a learning rate for each copy.

Copies come in a grid, K seeds times C students: students of one seed start from one set of weights and see one batch,
so their first layer is a single matrix product. Every parameter has the leading axes (K, C).
Book: A.5, "Running a study".
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from rkd.acceleration import PLAIN, Acceleration
from rkd.models import stackable

Factor = float | Tensor
_EVALUATION_ROWS = {"cpu": 500, "cuda": 2500}


class Stack:
    """K·C networks of one architecture.

    How they run, all with the same result up to rounding: multilayer perceptrons as batched matrix products; other
    networks that `rkd.models.stackable` accepts as grouped convolutions, by `torch.vmap`; the rest, and on a CPU also
    two-dimensional convolutions, where stacking gains nothing, one after another on shared batches; on a GPU side by
    side, where the acceleration has several streams.

    Args:
        build: makes a network from a seed.
        seeds: K of them.
        copies: C.
        device: where the parameters lie.
        acceleration: of training; `predict` runs in the type of the parameters whatever it says.

    Raises:
        ValueError: no seeds or no copies, or the network drops units at random: the draw of one copy would depend on
            the others.
    """

    def __init__(
        self,
        build: Callable[[int], nn.Module],
        seeds: Sequence[int],
        copies: int,
        device: str | torch.device = "cpu",
        acceleration: Acceleration = PLAIN,
    ) -> None:
        if not seeds or copies < 1:
            raise ValueError(f"seeds and copies must be at least one, got {len(seeds)} and {copies}")
        networks = [build(seed).to(device) for seed in seeds]
        if any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in networks[0].modules()):
            raise ValueError("a student must not have dropout")

        def spread(tensors: list[Iterator[tuple[str, Tensor]]]) -> dict[str, Tensor]:
            rows = [dict(t) for t in tensors]
            return {
                name: torch.stack([row[name].detach() for row in rows]).unsqueeze(1).repeat_interleave(copies, 1)
                for name in rows[0]
            }

        self.shape = (len(seeds), copies)
        self.parameters = spread([n.named_parameters() for n in networks])
        self.buffers = spread([n.named_buffers() for n in networks])
        for parameter in self.parameters.values():
            parameter.requires_grad_()
        self.network = copy.deepcopy(networks[0]).train()
        self._acceleration = acceleration
        self._forward = self._runner()
        self._streams = self._side_streams()
        self._fast_call = acceleration.compile(self._call)

    def logits(self, x: Tensor) -> Tensor:
        """Logits (K, C, n, B) of one batch (K, B, ...) a seed, differentiable in the parameters; training mode."""
        with self._acceleration.autocast(x.device):
            return self._forward(x).to(x.dtype)

    def predict(self, x: Tensor) -> Tensor:
        """Logits (K, C, n, M) of the same inputs (M, ...) for all copies, without gradients; evaluation mode."""
        self.network.eval()
        with torch.no_grad():
            rows = x.split(_EVALUATION_ROWS.get(x.device.type, 500))
            parts = [self._forward(part.expand(self.shape[0], *part.shape)) for part in rows]
        self.network.train()
        return torch.cat(parts, -1)

    def state(self) -> dict[str, Tensor]:
        """All parameters and buffers by name, for `restore`; not copies."""
        return {**self.parameters, **self.buffers}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave, from any device."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])

    def finite(self) -> Tensor:
        """Which copies have finite parameters only: boolean, (K, C)."""
        checks = [p.detach().isfinite().flatten(2).all(2) for p in self.parameters.values()]
        return torch.stack(checks).all(0)

    def _runner(self) -> Callable[[Tensor], Tensor]:
        layers = list(self.network.modules())[1:]
        if isinstance(self.network, nn.Sequential) and all(
            isinstance(m, nn.Flatten | nn.Linear | nn.ReLU) for m in layers
        ):
            return self._products
        flat = next(iter(self.parameters.values())).device.type == "cpu" and any(
            isinstance(m, nn.Conv2d) for m in layers
        )
        return self._vmapped if stackable(self.network) and not flat else self._one_by_one

    def _products(self, x: Tensor) -> Tensor:
        """Features before samples: (K, F, B), then (K·C, F, B)."""
        seeds, copies = self.shape
        h, shared = x.flatten(2).transpose(1, 2), True
        for name, layer in self.network.named_children():
            if isinstance(layer, nn.Linear):
                weight, bias = self.parameters[f"{name}.weight"], self.parameters[f"{name}.bias"]
                joined = (1, 2) if shared else (0, 1)
                h = torch.baddbmm(
                    bias.flatten(*(0, 1) if not shared else (1, 2)).unsqueeze(-1), weight.flatten(*joined), h
                )
                h, shared = h.view(seeds * copies, -1, h.shape[-1]), False
            elif isinstance(layer, nn.ReLU):
                h = h.relu()
        return h.view(seeds, copies, -1, h.shape[-1])

    def _vmapped(self, x: Tensor) -> Tensor:
        call = lambda p, b, rows: functional_call(self.network, (p, b), (rows,))  # noqa: E731
        stacked = torch.vmap(torch.vmap(call, in_dims=(0, 0, None)), in_dims=(0, 0, 0))
        return stacked(self.parameters, self.buffers, x).transpose(2, 3).contiguous()

    def _one_by_one(self, x: Tensor) -> Tensor:
        seeds, copies = self.shape
        training = self.network.training
        read = self._acceleration.lowered if training else lambda weight, copies: weight
        call = self._fast_call if training else self._call
        parameters = {name: read(p, 2).flatten(0, 1).unbind(0) for name, p in self.parameters.items()}
        batches = [self._acceleration.arrange(rows) if training else rows for rows in x]

        def one(i: int) -> Tensor:
            own = {name: p[i] for name, p in parameters.items()}
            return call(own, {name: b[divmod(i, copies)] for name, b in self.buffers.items()}, batches[i // copies])

        logits = side_by_side(one, seeds * copies, self._streams)
        return torch.stack(logits).transpose(1, 2).unflatten(0, self.shape)

    def _call(self, parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(self.network, (parameters, buffers), (x,))

    def _side_streams(self) -> list["torch.cuda.Stream"]:
        device = next(iter(self.parameters.values())).device
        count = min(self._acceleration.streams, math.prod(self.shape))
        return [torch.cuda.Stream(device) for _ in range(count)] if device.type == "cuda" and count > 1 else []


def side_by_side(run: Callable[[int], Tensor], count: int, streams: Sequence["torch.cuda.Stream"]) -> list[Tensor]:
    """run(0), …, run(count − 1), in turn on the streams; those of the backward pass are the same. Plainly without any.

    All that is done afterwards on the present stream comes after them.
    """
    if not streams:
        return [run(i) for i in range(count)]
    present = torch.cuda.current_stream()
    for stream in streams:
        stream.wait_stream(present)
    results = []
    for i in range(count):
        with torch.cuda.stream(streams[i % len(streams)]):
            results.append(run(i))
    for stream in streams:
        present.wait_stream(stream)
    return results


class Optimizer:
    """AdamW or SGD with momentum on parameters (K, C, ...), as in `torch.optim`, with C learning rates.

    Args:
        name: "adamw" (betas 0.9 and 0.999, ε = 1e-8, decoupled weight decay) or "sgd" (momentum 0.9, weight decay in
            the gradient).
        learning_rates: shape (C,).

    Attributes:
        steps: how many were made.
    """

    def __init__(self, name: str, parameters: Sequence[Tensor], learning_rates: Tensor, weight_decay: float) -> None:
        self.name, self.parameters, self.weight_decay, self.steps = name, list(parameters), weight_decay, 0
        self.rates = [learning_rates.to(p).view(1, -1, *[1] * (p.ndim - 2)) for p in self.parameters]
        self._one_rate = len(learning_rates.unique()) == 1
        self.mean = [torch.zeros_like(p) for p in self.parameters]
        self.square = [torch.zeros_like(p) for p in self.parameters] if name == "adamw" else []

    def step(self, gradients: Sequence[Tensor], decay: float) -> None:
        """One step with the learning rates times `decay`."""
        self.apply(gradients, *self.next_factors(decay))

    def next_factors(self, decay: float) -> tuple[float, float, float]:
        """What changes from step to step and not from parameter to parameter: the arguments of `apply`."""
        self.steps += 1
        return decay, math.sqrt(1 - 0.999**self.steps), 1 - 0.9**self.steps

    @torch.no_grad()
    def apply(self, gradients: Sequence[Tensor], decay: Factor, root: Factor, correction: Factor) -> None:
        """One step; the factors are numbers, or tensors of no axes, so that a recorded step can read new ones."""
        if self.name == "sgd":
            moved = torch._foreach_add(list(gradients), self.parameters, alpha=self.weight_decay)
            torch._foreach_mul_(self.mean, 0.9)
            torch._foreach_add_(self.mean, moved)
            if self._one_rate:
                rate = self.rates[0].flatten()[0] * decay
                torch._foreach_sub_(self.parameters, torch._foreach_mul(self.mean, rate))
                return
            for p, mean, rate in zip(self.parameters, self.mean, self.rates, strict=True):
                p.sub_(rate * decay * mean)
            return
        for i, (p, g) in enumerate(zip(self.parameters, gradients, strict=True)):
            rate = self.rates[i] * decay
            p.mul_(1 - rate * self.weight_decay)
            self.mean[i].lerp_(g, 1 - 0.9)
            self.square[i].mul_(0.999).addcmul_(g, g, value=1 - 0.999)
            scale = self.square[i].sqrt().div_(root).add_(1e-8)
            p.sub_(self.mean[i].div(scale).mul_(rate / correction))

    def state(self) -> dict[str, Tensor]:
        """Moments and the number of steps by name, for `restore`; not copies."""
        moments = {"mean": self.mean, "square": self.square}
        named = {f"{name}/{i}": tensor for name, tensors in moments.items() for i, tensor in enumerate(tensors)}
        return named | {"steps": torch.tensor(self.steps)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave, from any device."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])
        self.steps = int(state["steps"])
