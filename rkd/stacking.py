"""Many copies of one network as one batched model, and optimisers with a learning rate for each copy.

Copies come in a grid, K seeds times C students: students of one seed start from one set of weights and see one batch,
so their first layer is a single matrix product. Every parameter has the leading axes (K, C).
Explained in the book: A.5, "Running a study".
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from rkd.models import stackable

_EVALUATION_ROWS = 500


class Stack:
    """K·C networks of one architecture.

    How they run, all with the same result up to rounding: multilayer perceptrons as batched matrix products; other
    networks that `rkd.models.stackable` accepts as grouped convolutions, by `torch.vmap`; the rest, and on a CPU also
    two-dimensional convolutions, where stacking gains nothing, one after another on shared batches.

    Args:
        build: makes a network from a seed.
        seeds: K of them.
        copies: C.
        device: where the parameters lie.

    Raises:
        ValueError: no seeds or no copies, or the network drops units at random: the draw of one copy would depend on
            the others.
    """

    def __init__(
        self, build: Callable[[int], nn.Module], seeds: Sequence[int], copies: int, device: str | torch.device = "cpu"
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
        self._forward = self._runner()

    def logits(self, x: Tensor) -> Tensor:
        """Logits (K, C, n, B) of one batch (K, B, ...) a seed, differentiable in the parameters; training mode."""
        return self._forward(x)

    def predict(self, x: Tensor) -> Tensor:
        """Logits (K, C, n, M) of the same inputs (M, ...) for all copies, without gradients; evaluation mode."""
        self.network.eval()
        with torch.no_grad():
            parts = [self._forward(part.expand(self.shape[0], *part.shape)) for part in x.split(_EVALUATION_ROWS)]
        self.network.train()
        return torch.cat(parts, -1)

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
        parameters = {name: p.flatten(0, 1).unbind(0) for name, p in self.parameters.items()}
        logits = [
            functional_call(
                self.network,
                (
                    {name: p[i] for name, p in parameters.items()},
                    {name: b[divmod(i, copies)] for name, b in self.buffers.items()},
                ),
                (x[i // copies],),
            )
            for i in range(seeds * copies)
        ]
        return torch.stack(logits).transpose(1, 2).unflatten(0, self.shape)


class Optimizer:
    """AdamW or SGD with momentum on parameters (K, C, ...), as in `torch.optim`, with C learning rates.

    Args:
        name: "adamw" (betas 0.9 and 0.999, ε = 1e-8, decoupled weight decay) or "sgd" (momentum 0.9, weight decay in
            the gradient).
        learning_rates: shape (C,).
    """

    def __init__(self, name: str, parameters: Sequence[Tensor], learning_rates: Tensor, weight_decay: float) -> None:
        self.name, self.parameters, self.weight_decay, self.steps = name, list(parameters), weight_decay, 0
        self.rates = [learning_rates.to(p).view(1, -1, *[1] * (p.ndim - 2)) for p in self.parameters]
        self.mean = [torch.zeros_like(p) for p in self.parameters]
        self.square = [torch.zeros_like(p) for p in self.parameters] if name == "adamw" else []

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], decay: float) -> None:
        """One step with the learning rates times `decay`."""
        self.steps += 1
        for i, (p, g) in enumerate(zip(self.parameters, gradients, strict=True)):
            rate = self.rates[i] * decay
            if self.name == "sgd":
                self.mean[i].mul_(0.9).add_(g.add(p, alpha=self.weight_decay))
                p.sub_(rate * self.mean[i])
                continue
            p.mul_(1 - rate * self.weight_decay)
            self.mean[i].lerp_(g, 1 - 0.9)
            self.square[i].mul_(0.999).addcmul_(g, g, value=1 - 0.999)
            scale = self.square[i].sqrt().div_(math.sqrt(1 - 0.999**self.steps)).add_(1e-8)
            p.sub_(self.mean[i].div(scale).mul_(rate / (1 - 0.9**self.steps)))
