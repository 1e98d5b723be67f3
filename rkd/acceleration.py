"""How a step of training uses the machine: mixed precision, memory layout, compilation, CUDA graphs, streams.

In mixed precision, "bf16", weights, batch statistics, losses and optimisers stay in float32; convolutions and matrix
products read bfloat16 copies and give bfloat16, which tensor cores do several times faster. Images then lie in memory
with their channels last.
Book: A.5, "Running a study".
"""

import copy
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

PRECISIONS = ("float32", "float64", "bf16")
MODES = ("auto", "eager", "graphs", "compiled")
_WARM_UP = 3  # steps before a graph is recorded: libraries choose their algorithms and allocate in them


def storage(precision: str) -> torch.dtype:
    """The type of weights and data: float32 for "bf16"."""
    return torch.float64 if precision == "float64" else torch.float32


@dataclass(frozen=True)
class Acceleration:
    """What a training run makes use of; the default is plain PyTorch.

    Attributes:
        mixed: bfloat16 in convolutions and matrix products.
        compiled: networks go through `torch.compile`, which fuses what lies between the products.
        captured: on a GPU a whole step is recorded once and replayed, which spares launching its kernels one by one.
        streams: how many networks of a stack may run side by side on a GPU.
    """

    mixed: bool = False
    compiled: bool = False
    captured: bool = False
    streams: int = 1

    @classmethod
    def of(cls, precision: str, device: str, mode: str = "auto") -> "Acceleration":
        """What `mode` asks for.

        Args:
            precision: one of `PRECISIONS`.
            device: "cpu" or "cuda".
            mode: "eager", nothing; "graphs", CUDA graphs; "compiled", compilation, on a GPU with graphs; "auto", graphs
                on a GPU and nothing elsewhere.

        Raises:
            ValueError: no such precision or mode, or graphs without a GPU.
        """
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        cuda = device.startswith("cuda")
        if mode == "graphs" and not cuda:
            raise ValueError(f"mode graphs needs a GPU, got device {device!r}")
        captured = cuda and mode != "eager"
        return cls(precision == "bf16", mode == "compiled", captured, 4 if captured else 1)

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """Inside, convolutions and products run in bfloat16 if `mixed`."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.mixed)

    def compile(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The function, compiled anew for every shape if `compiled`."""
        return torch.compile(function, dynamic=False) if self.compiled else function

    def arrange(self, x: Tensor) -> Tensor:
        """Images in the layout that the networks read: channels last in mixed precision."""
        return x.contiguous(memory_format=torch.channels_last) if self.mixed and x.ndim == 4 else x.contiguous()

    def lowered(self, weight: Tensor, copies: int = 0) -> Tensor:
        """A parameter as a network reads it: weights of products in bfloat16, others unchanged; differentiable.

        Args:
            weight: shape (*axes, ...), the last of a convolution or a linear layer with at least two axes.
            copies: how many leading axes number networks.
        """
        axes = weight.ndim - copies
        if not self.mixed or axes < 2:
            return weight
        if axes != 4:
            return weight.to(torch.bfloat16)
        flat = weight.flatten(0, copies).to(torch.bfloat16, memory_format=torch.channels_last)
        return flat.unflatten(0, weight.shape[: copies + 1])

    def inference(self, network: nn.Module) -> Callable[[Tensor], Tensor]:
        """A network that only answers, in evaluation mode: float logits of a batch, without gradients."""
        if not self.mixed and not self.compiled:
            return network
        frozen = copy.deepcopy(network).eval()
        for parameter in frozen.parameters():
            parameter.data = self.lowered(parameter.detach())
            parameter.requires_grad_(False)
        run = self.compile(frozen)

        def answer(x: Tensor) -> Tensor:
            with torch.no_grad(), self.autocast(x.device):
                return run(self.arrange(x)).to(x.dtype)

        return answer


PLAIN = Acceleration()


@dataclass
class Replayed:
    """A step on a GPU that reads its arguments and changes tensors in place: recorded once a shape, then replayed.

    The first calls of a shape run as they are: they are real steps, and they warm up what a recording may not contain.

    Attributes:
        step: takes tensors, returns nothing, and never waits for the device.
    """

    step: Callable[..., None]
    _calls: Counter[tuple[torch.Size, ...]] = field(default_factory=Counter)
    _graphs: dict[tuple[torch.Size, ...], tuple["torch.cuda.CUDAGraph", list[Tensor]]] = field(default_factory=dict)

    def __call__(self, *arguments: Tensor) -> None:
        shapes = tuple(argument.shape for argument in arguments)
        if shapes not in self._graphs:
            self._calls[shapes] += 1
            if self._calls[shapes] <= _WARM_UP:
                self._aside(arguments)
                return
            fixed = [argument.clone() for argument in arguments]
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.step(*fixed)
            self._graphs[shapes] = graph, fixed
        graph, fixed = self._graphs[shapes]
        for place, argument in zip(fixed, arguments, strict=True):
            place.copy_(argument, non_blocking=True)
        graph.replay()

    def _aside(self, arguments: tuple[Tensor, ...]) -> None:
        """On another stream, as a recording will be."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.step(*arguments)
        torch.cuda.current_stream().wait_stream(stream)
