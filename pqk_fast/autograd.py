"""Gradients that autograd cannot derive: straight-through, step size, and the complementary split of phase 2."""

from __future__ import annotations

import inspect
from typing import Any, TypeVar

import torch
from torch import Tensor

from pqk_fast import dispatch, reference

Forward = TypeVar("Forward")


def quickly_bound(forward: Forward) -> Forward:
    """Function.apply binds its arguments to forward's signature at every call, which takes several times as long as a
    small layer's forward; to this signature they bind at once."""
    anything = inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL)
    forward.__signature__ = inspect.Signature([anything])  # type: ignore[attr-defined]
    return forward


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply``; its forward alone where the compiler has nothing to differentiate.

    There torch.compile looks at the signature (torch 2.11 to 2.13), and a quickly bound one says nothing.
    """
    if torch.compiler.is_compiling():
        learning = any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)
        if not (learning and torch.is_grad_enabled()):
            return function.forward(*args)
    return function.apply(*args)


def _inlined(weight: Tensor) -> bool:
    """True where the compiler gets the definition in plain PyTorch, which it fuses with what is around.

    On a CPU. Around an operation that it does not know it copies 4-d weights and masks to channels_last and back.
    """
    return torch.compiler.is_compiling() and weight.device.type == "cpu"


def _passed_on(grad: Tensor, weight: Tensor, ste: str, mask_gradients: bool) -> bool:
    """True where the weight's gradient is the incoming one as it is: nothing to compute, nothing to copy."""
    return ste == "identity" and not mask_gradients and grad.dtype == weight.dtype


class FakeQuant(torch.autograd.Function):
    """Eqs 2-4 forward; straight-through weight gradient and step-size gradient backward."""

    generate_vmap_rule = True

    @staticmethod
    @quickly_bound
    def forward(
        weight: Tensor,
        mask: Tensor,
        step: Tensor,
        bits: int,
        ste: str,
        mask_gradients: bool,
        dtype: torch.dtype,
    ) -> Tensor:
        if _inlined(weight):
            return reference.fake_quant(weight, mask, step, bits, dtype)
        out: Tensor = dispatch.fake_quant(weight, mask, step, bits, dtype)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, mask, step, *options, _ = inputs
        ctx.save_for_backward(weight, mask, step)
        ctx.options = options

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, mask, step = ctx.saved_tensors
        bits, ste, mask_gradients = ctx.options
        need_weight, _, need_step = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled() or _inlined(weight):  # a gradient of this gradient is wanted
            both = reference.fake_quant_backward(grad, weight, mask, step, bits, ste, mask_gradients)
            return both[0] if need_weight else None, None, both[1] if need_step else None, *[None] * 4
        passed_on = _passed_on(grad, weight, ste, mask_gradients)
        grad_weight: Tensor | None = grad
        grad_step: Tensor | None = None
        if need_step or not passed_on:
            computed = need_weight and not passed_on
            clipped = ste == "clipped"
            layer = (grad, weight, mask, step, bits)
            made, grad_step = dispatch.fake_quant_backward(*layer, clipped, mask_gradients, computed, need_step)
            grad_weight = made if computed else grad
        return grad_weight if need_weight else None, None, grad_step if need_step else None, *[None] * 4


class FakeQuantAll(torch.autograd.Function):
    """:class:`FakeQuant` for all layers at once: ``tensors`` are the weights, then the steps.

    Each tensor that apply gets costs time, so the masks, which have no gradient, come in a list.
    """

    @staticmethod
    @quickly_bound
    def forward(
        masks: list[Tensor], bits: list[int], ste: str, mask_gradients: bool, dtype: torch.dtype, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        n = len(bits)
        if _inlined(tensors[0]):
            layers = zip(tensors[:n], masks, tensors[n:], bits, strict=True)
            return tuple(reference.fake_quant(*layer, dtype) for layer in layers)
        return tuple(dispatch.fake_quant_all(tensors[:n], masks, tensors[n:], bits, dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        masks, bits, ste, mask_gradients, _, *tensors = inputs
        ctx.save_for_backward(*tensors, *masks)
        ctx.options = bits, ste, mask_gradients

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        bits, ste, mask_gradients = ctx.options
        n = len(bits)
        tensors = ctx.saved_tensors
        weights, steps, masks = tensors[:n], tensors[n : 2 * n], tensors[2 * n :]
        needs = ctx.needs_input_grad[5:]
        need_weight, need_step = any(needs[:n]), any(needs[n:])
        if torch.is_grad_enabled() or _inlined(tensors[0]):
            layers = zip(grads, weights, masks, steps, bits, strict=True)
            pairs = [reference.fake_quant_backward(*layer, ste, mask_gradients) for layer in layers]
            every = zip([*(w for w, _ in pairs), *(s for _, s in pairs)], needs, strict=True)
            return *[None] * 5, *(grad if needed else None for grad, needed in every)
        passed_on = all(_passed_on(g, w, ste, mask_gradients) for g, w in zip(grads, weights, strict=True))
        grad_weights, grad_steps = grads, steps
        if need_step or not passed_on:
            computed = need_weight and not passed_on
            flags = (ste == "clipped", mask_gradients, computed, need_step)
            made, made_steps = dispatch.fake_quant_all_backward(grads, weights, masks, steps, bits, *flags)
            grad_weights, grad_steps = made if computed else grads, made_steps if need_step else steps
        if not all(needs):
            every = zip((*grad_weights, *grad_steps), needs, strict=True)
            return *[None] * 5, *(grad if needed else None for grad, needed in every)
        return *[None] * 5, *grad_weights, *grad_steps


class PrunedOnly(torch.autograd.Function):
    """The teacher's weight in phase 2 (Eq. 12): forward an alias of ``w``, backward ``(1 - M) g``."""

    generate_vmap_rule = True

    @staticmethod
    @quickly_bound
    def forward(weight: Tensor, mask: Tensor) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return torch.where(mask, 0.0, grad), None


class DualWeights(torch.autograd.Function):
    """Both weights of phase 2: ``wbar`` and an alias of ``w``; backward ``M g_S + (1 - M) g_T`` (Eqs 11, 12).

    The step size is a constant.
    """

    generate_vmap_rule = True

    @staticmethod
    @quickly_bound
    def forward(
        weight: Tensor, mask: Tensor, step: Tensor, bits: int, ste: str, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        return dispatch.fake_quant(weight, mask, step, bits, dtype), weight.view_as(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        weight, mask, step, *options, _ = inputs
        ctx.save_for_backward(weight, mask, step)
        ctx.options = options

    @staticmethod
    def backward(ctx: Any, grad_student: Tensor, grad_teacher: Tensor) -> tuple[Tensor | None, ...]:
        bits, ste = ctx.options
        weight, mask, step = ctx.saved_tensors
        if torch.is_grad_enabled():
            student, _ = reference.fake_quant_backward(grad_student, weight, mask, step, bits, ste)
            return torch.where(mask, student, grad_teacher.to(weight.dtype)), *[None] * 5
        made = dispatch.dual_weight_backward(grad_student, grad_teacher, weight, mask, step, bits, ste == "clipped")
        return made, *[None] * 5
