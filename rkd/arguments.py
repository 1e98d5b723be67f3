"""What arguments are accepted, and errors that name the argument, the value and what would be right."""

import math
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

Order = float | Tensor
ArrayLike = Any


def check_order(alpha: ArrayLike, like: Tensor) -> Order:
    """The order as a float, or as a tensor of `like`'s dtype, float32 at least, and device. Raises on negative or NaN.

    Tensors on an accelerator are not inspected, since that would wait for the device: there a bad order gives NaN.
    """
    return _number_or_tensor("alpha", alpha, like, "in [0, inf]", lambda x: x >= 0)


def check_temperature(temperature: ArrayLike, like: Tensor) -> Order:
    """The temperature as a float, or as a tensor of `like`'s dtype and device. Raises unless positive and finite."""
    return _number_or_tensor(
        "temperature", temperature, like, "positive and finite", lambda x: (x > 0) & (x < math.inf)
    )


def check_positive(name: str, value: Any) -> float:
    """`value` as a float; raises unless it is a positive, finite real number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a positive number, got {value!r}")
    if not 0 < float(value) < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value!r}")
    return float(value)


def _number_or_tensor(name: str, value: Any, like: Tensor, accepted: str, valid: Any) -> Order:
    if isinstance(value, bool):
        raise TypeError(f"{name} must be a number or an array {accepted}, got {value!r}")
    if isinstance(value, Real):
        if not valid(float(value)):
            raise ValueError(f"{name} must be {accepted}, got {value!r}")
        return float(value)
    tensor = as_floating(name, value)
    if tensor.requires_grad:
        raise TypeError(f"{name} is not differentiable: pass {name}.detach()")
    if can_inspect(tensor):
        bad = tensor[~valid(tensor)]
        if bad.numel():
            raise ValueError(f"{name} must be {accepted}, got {bad.flatten()[0].item()!r}")
    return tensor.to(dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)


def can_inspect(tensor: Tensor) -> bool:
    """Whether looking at the entries is free: not on an accelerator, not while compiling, not inside `torch.func`."""
    if tensor.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def as_floating(name: str, value: ArrayLike) -> Tensor:
    """`value` as a floating tensor, half precision widened to float32."""
    if not isinstance(value, Tensor):
        array = np.asarray(value)
        if array.dtype.kind not in "fiu":
            raise TypeError(f"{name} must be numeric, got {array.dtype} ({value!r:.60})")
        value = torch.from_numpy(
            np.array(array, dtype=array.dtype if array.dtype in (np.float32, np.float16) else np.float64)
        )
    elif not value.is_floating_point():
        if value.is_complex() or value.dtype == torch.bool:
            raise TypeError(f"{name} must be real numbers, got {value.dtype}")
        value = value.to(torch.get_default_dtype())
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def as_probabilities(name: str, value: ArrayLike) -> Tensor:
    """`value` as a floating tensor whose rows are probability vectors, up to the rounding that its type brings."""
    kind = str(getattr(value, "dtype", "float64")).removeprefix("torch.")
    tolerance = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 1e-2}.get(kind, 1e-8)
    vector = as_floating(name, value)
    if vector.dim() == 0 or vector.shape[-1] == 0:
        raise ValueError(f"{name} must hold at least one class on its last axis, got shape {tuple(vector.shape)}")
    values = vector.detach()
    bad = values[~((values >= 0) & (values <= 1 + tolerance))]
    if bad.numel():
        raise ValueError(f"{name} must hold probabilities in [0, 1], got {bad[0].item()!r}")
    mass = values.sum(-1).flatten()
    off = mass[(mass - 1).abs() > tolerance]
    if off.numel():
        raise ValueError(f"{name} must sum to 1 over its last axis (within {tolerance:g}), got {off[0].item()!r}")
    return vector


def check_logits(student: Any, teacher: Any) -> tuple[Tensor, Tensor]:
    """Both logits, in float64 if one is; raises unless they are floating tensors of one shape (..., n)."""
    for name, logits in (("student_logits", student), ("teacher_logits", teacher)):
        if not isinstance(logits, Tensor):
            raise TypeError(f"{name} must be a torch tensor, got {type(logits).__name__}")
        if not logits.is_floating_point():
            raise TypeError(f"{name} must be floating, got {logits.dtype}: pass logits, not labels")
    if student.shape != teacher.shape:
        raise ValueError(
            "student_logits and teacher_logits must have the same shape, "
            f"got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    if student.dim() == 0 or student.shape[-1] == 0:
        raise ValueError(f"student_logits must hold classes on the last axis, got shape {tuple(student.shape)}")
    if torch.float64 in (student.dtype, teacher.dtype):
        return student.double(), teacher.double()
    return student, teacher


def widen(*logits: Tensor) -> list[Tensor]:
    """Half precision in float32."""
    return [x.float() if x.dtype in (torch.float16, torch.bfloat16) else x for x in logits]


def check_class_mask(mask: Any, logits: Tensor) -> None:
    """Raises unless `mask` is boolean and broadcasts to the logits."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"class_mask must be a boolean tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
    check_fits("class_mask", mask, logits.shape)


def check_fits(name: str, tensor: Tensor, shape: torch.Size) -> None:
    """Raises unless `tensor` broadcasts to `shape`."""
    try:
        fits = torch.broadcast_shapes(tensor.shape, shape) == shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(f"{name} of shape {tuple(tensor.shape)} does not broadcast to {tuple(shape)}")


def check_labels(labels: Any, logits: Tensor, ignore_index: int) -> None:
    """Raises unless `labels` are integers of the logits' leading shape, in [0, n) or equal to `ignore_index`.

    The range is not looked at on an accelerator, since that would wait for the device.
    """
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be an integer tensor, got {getattr(labels, 'dtype', type(labels).__name__)}")
    if labels.shape != logits.shape[:-1]:
        raise ValueError(f"labels must have shape {tuple(logits.shape[:-1])}, got {tuple(labels.shape)}")
    if can_inspect(labels):
        bad = labels[(labels != ignore_index) & ((labels < 0) | (labels >= logits.shape[-1]))]
        if bad.numel():
            raise ValueError(f"labels must lie in [0, {logits.shape[-1]}) or equal {ignore_index}, got {bad[0].item()}")
