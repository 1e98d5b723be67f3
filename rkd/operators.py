"""The loss of each row as operators of PyTorch on a GPU: `rkd.kernels` chosen, launched, and differentiated.

Wide rows are read for the value in the forward pass and for the gradient in the backward pass, which folds the incoming
gradient in: five times the bytes of the logits of one network. Rows of which a GPU's second-level cache holds all that
are in flight get their gradient at once, while they are there: three times. Nothing waits for the device, so a CUDA
graph can record it, and `torch.compile` sees operators of known shapes.
The environment variable RKD_TRITON, read on import, chooses: 0 never; 1 always, also on a CPU under Triton's
interpreter (TRITON_INTERPRET=1, for tests); otherwise on GPUs where Triton is installed, and where a first launch gives
what the plain path gives.
Book: 2.1.1, "The Objective".
"""

import functools
import math
import os
import warnings
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from rkd.arguments import Order
from rkd.launches import Launch, Numbers, Rows, fits_in_cache, on_device, outputs, power_of_2
from rkd.logits import renyi_from_logits
from rkd.rows import weigh

_CHOICE = os.environ.get("RKD_TRITON", "auto")
_INSTALLED = find_spec("triton") is not None
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TOLERANCE = 2e-5  # of the first launches


def can_launch(student: Any, teacher: Any) -> bool:
    """Whether `weighted_loss` applies: a GPU, up to single precision, no gradient for the teacher, no transforms."""
    if _CHOICE == "0" or not _INSTALLED or not isinstance(student, Tensor) or not isinstance(teacher, Tensor):
        return False
    if not (student.is_cuda or _CHOICE == "1") or student.device != teacher.device or student.shape != teacher.shape:
        return False
    if student.dtype not in _DTYPES or teacher.dtype not in _DTYPES or student.dim() == 0 or student.numel() == 0:
        return False
    if teacher.requires_grad and torch.is_grad_enabled():
        return False
    return torch.compiler.is_compiling() or (
        not torch._C._are_functorch_transforms_active()
        and not torch.jit.is_tracing()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch.autograd.forward_ad._current_level < 0
        and _holds(student.device)
    )


@functools.cache
def _holds(device: torch.device) -> bool:
    """Whether both kernels give on this device what the plain path gives on a CPU, tried once. Else a warning."""
    random = torch.Generator().manual_seed(0)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            for shape in ((8, 300), (64, 4099)):  # `rkd.launches.FEW_LOGITS` lies between them
                z, v = torch.randn(2, *shape, generator=random).unbind()
                leaf, exact_leaf = z.to(device).requires_grad_(), z.double().requires_grad_()
                exact = renyi_from_logits(exact_leaf, v.double(), 2.0, 1.0, False)
                values = weighted_loss(leaf, v.to(device), 2.0, 1.0, False, 1.0)
                (exact_slope,) = torch.autograd.grad(exact.sum(), exact_leaf)
                (slope,) = torch.autograd.grad(values.sum(), leaf)
                by_value = (values.cpu() - exact) / exact
                by_slope = (slope.cpu() - exact_slope) / exact_slope.abs().amax(-1, keepdim=True)
                worst = max(error.abs().max().item() for error in (by_value, by_slope))
                if not worst <= _TOLERANCE:
                    raise ArithmeticError(f"relative error {worst:.1g} on {shape[0]} rows of {shape[1]} classes")
    except Exception as error:
        warnings.warn(f"Triton kernels are not used: {type(error).__name__}: {error}"[:400], stacklevel=4)
        return False
    return True


def weighted_loss(
    student: Tensor,
    teacher: Tensor,
    alpha: Order,
    temperature: Order,
    per_order: bool,
    soft: Order,
    *,
    hard: Order = 0.0,
    labels: Tensor | None = None,
    class_mask: Tensor | None = None,
    total: bool = False,
) -> Tensor:
    """soft·D_α + hard·cross-entropy of each row (D_α/α if `per_order`), or the sum over all rows if `total`.

    Args:
        student, teacher: logits (..., n) of one shape, float32, bfloat16 or float16, -inf for impossible classes.
        alpha, temperature, soft, hard: numbers, or tensors that broadcast against the leading axes. A row whose `soft`
            and `hard` are 0 counts as 0 and gets zero gradient, whatever it holds.
        labels: integers of the leading shape where `hard` is not 0; elsewhere than in [0, n) they give NaN.
        class_mask: boolean, broadcastable to the logits; False removes a class from both distributions.

    Returns:
        float32, of the leading shape or a scalar; differentiable in the student's logits, twice if `hard` is 0.
    """
    rows = Rows.of(student, teacher, alpha, temperature, soft, hard, labels, class_mask)
    numbers = Numbers.of(alpha, temperature, soft, hard, per_order)
    wanted = student.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    at_once = wanted and fits_in_cache(rows.z, rows.v)
    values = torch.ops.rkd.visit(*rows, *numbers, at_once)[0]
    return values.sum() if total else values.view(student.shape[:-1])


def visit_in_place(
    student: Tensor,
    teacher: Tensor,
    alpha: Order,
    temperature: Order,
    per_order: bool,
    soft: Order,
    hard: Order = 0.0,
    labels: Tensor | None = None,
    gradient: bool = True,
) -> Tensor:
    """`weighted_loss` of rows (rows, n), outside autograd; the gradient takes the place of the student's logits."""
    rows = Rows.of(student, teacher, alpha, temperature, soft, hard, labels, None)
    numbers = Numbers.of(alpha, temperature, soft, hard, per_order)
    if not gradient:
        return torch.ops.rkd.visit(*rows, *numbers, False)[0]
    return torch.ops.rkd.visit_(*rows, *numbers)


# --------------------------------------------------------------------------- operators


@torch.library.custom_op("rkd::visit", mutates_args=())
def visit(
    z: Tensor,
    v: Tensor,
    mask: Tensor | None,
    labels: Tensor | None,
    alphas: Tensor | None,
    temperatures: Tensor | None,
    softs: Tensor | None,
    hards: Tensor | None,
    alpha: float,
    temperature: float,
    soft: float,
    hard: float,
    per_order: bool,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The weighted loss of each row, what `differentiate` needs of it, and its gradient if asked for."""
    rows = Rows(z, v, mask, labels, alphas, temperatures, softs, hards)
    numbers = Numbers(alpha, temperature, soft, hard, per_order)
    values, state, slope = outputs(z, gradient)
    Launch(rows, numbers).visit(values, state, slope if gradient else None)
    return values, state, slope


@visit.register_fake
def _(z: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return outputs(z, arguments[-1])


@torch.library.custom_op("rkd::visit_", mutates_args={"z"})
def visit_(
    z: Tensor,
    v: Tensor,
    mask: Tensor | None,
    labels: Tensor | None,
    alphas: Tensor | None,
    temperatures: Tensor | None,
    softs: Tensor | None,
    hards: Tensor | None,
    alpha: float,
    temperature: float,
    soft: float,
    hard: float,
    per_order: bool,
) -> Tensor:
    """The weighted loss of each row; its gradient takes the place of z."""
    rows = Rows(z, v, mask, labels, alphas, temperatures, softs, hards)
    values, state, _ = outputs(z, False)
    Launch(rows, Numbers(alpha, temperature, soft, hard, per_order)).visit(values, state, z)
    return values


@visit_.register_fake
def _(z: Tensor, *arguments: Any) -> Tensor:
    return outputs(z, False)[0]


@torch.library.custom_op("rkd::differentiate", mutates_args=())
def differentiate(
    upstream: Tensor,
    state: Tensor,
    z: Tensor,
    v: Tensor,
    mask: Tensor | None,
    labels: Tensor | None,
    alphas: Tensor | None,
    temperatures: Tensor | None,
    softs: Tensor | None,
    hards: Tensor | None,
    alpha: float,
    temperature: float,
    soft: float,
    hard: float,
    per_order: bool,
) -> Tensor:
    """The gradient of each row times `upstream`, (rows,)."""
    rows = Rows(z, v, mask, labels, alphas, temperatures, softs, hards)
    slope = outputs(z, True)[2]
    Launch(rows, Numbers(alpha, temperature, soft, hard, per_order)).differentiate(upstream, state, slope)
    return slope


@differentiate.register_fake
def _(upstream: Tensor, state: Tensor, z: Tensor, *arguments: Any) -> Tensor:
    return outputs(z, True)[2]


@torch.library.custom_op("rkd::scale_", mutates_args={"gradient"})
def scale_(gradient: Tensor, upstream: Tensor) -> None:
    """gradient (rows, n) times `upstream` (rows,), with 0 where that is 0; nothing is touched where it is 1."""
    from rkd.kernels import scale_rows

    rows, n = gradient.shape
    width = power_of_2(n, 2048)
    with on_device(gradient.device):
        scale_rows[(rows,)](gradient, upstream, n, gradient.stride(0), upstream.stride(0), WIDTH=width)


@scale_.register_fake
def _(gradient: Tensor, upstream: Tensor) -> None:
    pass


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.numbers = Numbers(*inputs[8:13])
    ctx.gradient = output[2].detach() if inputs[13] else None
    ctx.save_for_backward(output[1], *inputs[:8])


def _backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    state, *rows = ctx.saved_tensors
    none = (None,) * 13
    if upstream is None:
        return None, *none
    if torch.is_grad_enabled():  # create_graph
        return _differentiable_gradient(Rows(*rows), ctx.numbers, upstream), *none
    transforms = torch._C._functorch
    if transforms.is_legacy_batchedtensor(upstream) or transforms.is_functorch_wrapped_tensor(upstream):
        ones = state.new_ones(()).expand(state.shape[0])
        return weigh(torch.ops.rkd.differentiate(ones, state, *rows, *ctx.numbers), upstream), *none
    gradient, ctx.gradient = ctx.gradient, None
    if gradient is None:  # not made at once, or handed over to an earlier backward pass
        return torch.ops.rkd.differentiate(upstream, state, *rows, *ctx.numbers), *none
    torch.ops.rkd.scale_(gradient, upstream)
    return gradient, *none


visit.register_autograd(_backward, setup_context=_setup_context)


def _differentiable_gradient(rows: Rows, numbers: Numbers, upstream: Tensor) -> Tensor:
    """By the plain path."""
    leaf = rows.z.view_as(rows.z)  # hooks of the logits are not to run here
    z, v = leaf.float(), rows.v.float()
    if rows.mask is not None:
        z, v = (x.masked_fill(rows.mask == 0, -math.inf) for x in (z, v))
    alpha, temperature, soft, hard = (
        shared if own is None else own.to(z.dtype) for shared, own in zip(numbers[:4], rows[4:], strict=True)
    )
    values = soft * renyi_from_logits(z, v, alpha, temperature, numbers.per_order)
    if rows.labels is not None:
        known = (rows.labels >= 0) & (rows.labels < z.shape[1])
        target = torch.where(known, rows.labels, 0).unsqueeze(-1)
        values = values - hard * z.log_softmax(-1).gather(-1, target).squeeze(-1)
    counted = torch.as_tensor(soft != 0.0) | torch.as_tensor(hard != 0.0)
    values = torch.where(counted.to(values.device), values, 0.0)
    return torch.autograd.grad(values, leaf, upstream, create_graph=True)[0]
