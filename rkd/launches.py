"""Which kernels serve some rows, in which variants, on which tiles; and their launch.

Ordinary rows go to `rkd.kernels`, what these leave to `rkd.exact_kernel`, which serves small batches and orders out of
range as well.
Book: 2.1.1, "The Objective".
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rkd.arguments import Order
from rkd.divergence import settle

ORDERS = (1e-3, 64.0)  # of `visit_rows`
FEW_LOGITS = 2**18  # `visit_rows_exactly` alone, in one launch
CACHE = 0.75, 2  # of the second-level cache, and rows in flight on each multiprocessor


class Rows(NamedTuple):
    """Logits (rows, n), a mask of 0 and 1 that expands to them, labels and per-row numbers (rows,)."""

    z: Tensor
    v: Tensor
    mask: Tensor | None
    labels: Tensor | None
    alphas: Tensor | None
    temperatures: Tensor | None
    softs: Tensor | None
    hards: Tensor | None

    @classmethod
    def of(
        cls,
        student: Tensor,
        teacher: Tensor,
        alpha: Order,
        temperature: Order,
        soft: Order,
        hard: Order,
        labels: Tensor | None,
        class_mask: Tensor | None,
    ) -> "Rows":
        leading, n = student.shape[:-1], student.shape[-1]
        z, v = (x if x.dim() == 2 else x.reshape(-1, n) for x in (student, teacher))
        z, v = (x if x.stride(1) == 1 or n == 1 else x.contiguous() for x in (z, v))
        mask = None
        if class_mask is not None:
            mask = class_mask.to(torch.uint8)
            mask = mask.expand(n) if mask.dim() < 2 else mask.expand(student.shape).reshape(-1, n)
            mask = mask.contiguous() if mask.stride(-1) != 1 else mask
        numbers = (
            x.expand(leading).reshape(-1).contiguous() if isinstance(x, Tensor) else None
            for x in (alpha, temperature, soft, hard)
        )
        if labels is not None:
            labels = labels.reshape(-1).contiguous()
        return cls(z, v, mask, labels, *numbers)


class Numbers(NamedTuple):
    """What rows share where `Rows` holds None."""

    alpha: float
    temperature: float
    soft: float
    hard: float
    per_order: bool

    @classmethod
    def of(cls, alpha: Order, temperature: Order, soft: Order, hard: Order, per_order: bool) -> "Numbers":
        alpha = settle(alpha)
        alpha, temperature, soft, hard = (0.0 if isinstance(x, Tensor) else x for x in (alpha, temperature, soft, hard))
        return cls(alpha, temperature, soft, hard, per_order)


class Launch:
    """The kernels for these rows, with the options that select their variants."""

    def __init__(self, rows: Rows, numbers: Numbers) -> None:
        self.rows, self.numbers = rows, numbers
        self.count, self.n = rows.z.shape
        one = rows.z  # stands for what is not there
        self.tensors = tuple(one if x is None else x for x in rows)
        self.shared = tuple(map(float, numbers[:4]))
        self.present = {
            "PER_ORDER": numbers.per_order,
            "HARD": rows.labels is not None,
            "HAS_MASK": rows.mask is not None,
            "ALPHAS": rows.alphas is not None,
            "TEMPERATURES": rows.temperatures is not None,
            "SOFTS": rows.softs is not None,
            "HARDS": rows.hards is not None,
        }
        in_range = ORDERS[0] <= numbers.alpha <= ORDERS[1] or (numbers.alpha == 0.0 and numbers.per_order)
        self.exact_only = rows.z.numel() <= FEW_LOGITS or not (in_range or rows.alphas is not None)

    def variant(self) -> dict[str, Any]:
        from rkd import kernels

        rows, alpha = self.rows, self.numbers.alpha
        half = torch.float32 not in (rows.z.dtype, rows.v.dtype)
        kind = kernels.APART if 0.4 <= alpha <= 0.6 or alpha >= 1.4 else kernels.ANY
        kind = kernels.ONE if alpha in (0.0, 1.0) else kind
        if rows.alphas is not None:
            kind = kernels.ANY
        warps = 4 if self.n < 2**13 else 8
        width = power_of_2(self.n, warps * 32 * (8 if half else 4))
        rich = rows.labels is not None or rows.mask is not None or kind == kernels.ANY  # takes many registers
        sub = 2 if self.n >= 2 * width and not rich else 1
        return self.present | {
            "KIND": kind,
            "FLIP": alpha < 0.5,
            "HALF": half,
            "EVEN": self.n % (sub * width) == 0,
            "SUB": sub,
            "WIDTH": width,
            "STAGES": 3,
            "num_warps": warps,
        }

    def strides(self, slope: Tensor | None) -> tuple[int, int, int, int]:
        z, v, mask = self.rows[:3]
        return (
            z.stride(0),
            v.stride(0),
            0 if mask is None or mask.dim() == 1 else mask.stride(0),
            0 if slope is None else slope.stride(0),
        )

    def visit(self, values: Tensor, state: Tensor, slope: Tensor | None) -> None:
        from rkd.kernels import visit_rows

        out = values if slope is None else slope
        with on_device(values.device):
            if not self.exact_only:
                visit_rows[(self.count,)](
                    *self.tensors,
                    values,
                    state,
                    out,
                    self.n,
                    *self.strides(slope),
                    *self.shared,
                    0.0 if self.numbers.alpha == 0.0 and self.rows.alphas is None else ORDERS[0],
                    ORDERS[1],
                    GRADIENT=slope is not None,
                    **self.variant(),
                )
            self.exactly(values, values, state, out, slope, upstream=False)

    def differentiate(self, upstream: Tensor, state: Tensor, slope: Tensor) -> None:
        from rkd.kernels import differentiate_rows

        with on_device(slope.device):
            if not self.exact_only:
                differentiate_rows[(self.count,)](
                    *self.tensors,
                    upstream,
                    state,
                    slope,
                    self.n,
                    *self.strides(slope),
                    upstream.stride(0),
                    *self.shared,
                    **self.variant(),
                )
            self.exactly(upstream, state, state, slope, slope, upstream=True)

    def exactly(
        self, incoming: Tensor, values: Tensor, state: Tensor, out: Tensor, slope: Tensor | None, upstream: bool
    ) -> None:
        from rkd.exact_kernel import visit_rows_exactly

        programs = self.count if self.exact_only else min(self.count, 4 * _multiprocessors(out.device))
        block = power_of_2(self.n, 1024)
        visit_rows_exactly[(programs,)](
            *self.tensors,
            incoming,
            values,
            state,
            out,
            self.count,
            self.n,
            *self.strides(slope),
            incoming.stride(0) if upstream else 0,
            *self.shared,
            **self.present,
            UPSTREAM=upstream,
            ONLY_LEFT=not self.exact_only,
            GRADIENT=slope is not None,
            BLOCK=block,
            num_warps=max(1, min(8, block // 128)),
        )


def outputs(z: Tensor, gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    rows = z.shape[0]
    return (
        z.new_empty(rows, dtype=torch.float32),
        z.new_zeros(rows, 6, dtype=torch.float32),
        z.new_empty(z.shape if gradient else (0,)),
    )


def power_of_2(n: int, largest: int) -> int:
    return min(largest, 1 << max(0, n - 1).bit_length())


def on_device(device: torch.device) -> Any:
    return torch.cuda.device(device) if device.type == "cuda" else torch.autograd.profiler.record_function("rkd")


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def fits_in_cache(z: Tensor, v: Tensor) -> bool:
    """Whether the rows in flight are still in the second-level cache when they are read again."""
    if z.device.type != "cuda":
        return z.shape[1] <= 2**12
    share, in_flight = CACHE
    cache = torch.cuda.get_device_properties(z.device).L2_cache_size
    row = z.shape[1] * (z.itemsize + v.itemsize)
    return row * in_flight * _multiprocessors(z.device) <= share * cache
