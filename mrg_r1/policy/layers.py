"""What decoder layers are built of: linear layers with their LoRA, SwiGLU, RMSNorm, and the contract of a layer.

These are readings of the checkpoint's modules: the weights stay where they are. Projections that share an input are one
matrix, and LoRA has a gradient of its own that never forms a full weight's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.nn import functional as F

from mrg_r1.kernels import calls as kernels
from mrg_r1.products import product


class DecoderLayer(ABC):
    """One decoder layer, the attention itself left out: a frozen dataclass of projections and norms.

    Its arithmetic stands here once; the passes over prompts and completions (`language.LanguageModel`) and the decode
    step (`rollout.decoder`) each put their own attention between the two methods.
    """

    window: int | None = None  # the layer sees tokens less than so many before its own; None: all of them

    @abstractmethod
    def heads(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of tokens: the norm before attention, the projections, the rotation.

        Args:
            x: [T, H] the residual stream.
            cos, sin: as the family's rotation made them, of these tokens.

        Returns:
            q [T, heads, D], k and v [T, key heads, D]. Scores are scaled by D ** -0.5 afterwards. Without gradients
            they may be views of larger tensors.
        """

    @abstractmethod
    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """The rest of the layer: output projection, residuals, MLP.

        Args:
            x: [T, H] the residual stream as `heads` was given it.
            attended: [T, heads, D].

        Returns:
            [T, H] the residual stream for the next layer.
        """

    def merged(self) -> Self:
        """The same with LoRA folded into new matrices."""
        return self._map(Projection.merged)

    def for_few_tokens(self) -> Self:
        """The same with matrices laid out for few tokens a call."""
        return self._map(Projection.for_few_tokens)

    def _map(self, change: Callable[[Projection], Projection]) -> Self:
        found = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        changed = {name: change(value) for name, value in found.items() if isinstance(value, Projection)}
        return replace(self, **changed)  # type: ignore[type-var]


@dataclass(frozen=True)
class Adapter:
    """One LoRA pair and the rows of a projection's output that it adds to."""

    a: Tensor  # [r, in]
    b: Tensor  # [rows, r]
    rows: slice
    scale: float


@dataclass(frozen=True)
class Projection:
    """One or several linear layers of the same input as one matrix, with their LoRA."""

    weight: Tensor  # [out, in]
    bias: Tensor | None  # [out]
    adapters: tuple[Adapter, ...] = ()
    packed: Tensor | None = None  # the weight laid out for few tokens, without adapters

    @classmethod
    def read(cls, modules: Sequence[Any]) -> Projection:
        """Linear layers, wrapped by PEFT or not, as one projection; only adapters that are switched on take part.

        Frozen weights that share an input are moved behind one another in memory once, and the modules' weights become
        views of that: nothing is held twice.
        """
        linears = [module.base_layer if isinstance(module, LoraLayer) else module for module in modules]
        ends, start, adapters = [], 0, []
        for module, linear in zip(modules, linears, strict=True):
            ends.append(start + linear.weight.shape[0])
            adapters += [
                Adapter(
                    module.lora_A[name].weight, module.lora_B[name].weight, slice(start, ends[-1]), module.scaling[name]
                )
                for name in _active(module)
            ]
            start = ends[-1]
        biases = [linear.bias for linear in linears]
        bias = None if biases[0] is None else torch.cat(biases) if len(biases) > 1 else frozen_values(biases[0])
        return cls(_one_matrix([linear.weight for linear in linears]), bias, tuple(adapters))

    def __call__(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out]."""
        if self.packed is not None:
            return kernels.linear(x, self.packed, self.bias, len(self.weight))
        if not self.adapters:
            wanted = any(one is not None and one.requires_grad for one in (x, self.weight, self.bias))
            return (F.linear if wanted and torch.is_grad_enabled() else product)(x, self.weight, self.bias)
        pairs = [tensor for adapter in self.adapters for tensor in (adapter.a, adapter.b)]
        result: Tensor = _LoraLinear.apply(x, self, *pairs)
        return result

    def merged(self) -> Projection:
        """The same with LoRA added in, in new memory: the policy's own weights are never touched."""
        weight = self.weight.clone()
        for adapter in self.adapters:
            weight[adapter.rows].addmm_(adapter.b, adapter.a, alpha=adapter.scale)
        return Projection(weight, self.bias)

    def for_few_tokens(self) -> Projection:
        """The same with the weight laid out once for many products of few tokens, where there are kernels for it.

        Torch's own product packs a weight anew at each call, which for few tokens costs as much as the product.
        """
        if self.adapters or not kernels.ready(self.weight):
            return self
        return replace(self, packed=kernels.pack(self.weight.t()))


@dataclass(frozen=True)
class Norm:
    """RMSNorm, x / rms(x) * weight, float32 inside (arXiv 1910.07467)."""

    weight: Tensor  # [H], or [D] of a head
    epsilon: float

    def __call__(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H]; torch's own but in float32 on the CPU, and for gradients there: it is no kernel."""
        if not torch.is_grad_enabled() and kernels.ready(x, self.weight):
            return kernels.rms_norm(x, self.weight, self.epsilon)[0]
        if x.is_cuda or (x.dtype != torch.float32 and not torch.is_grad_enabled()):
            return F.rms_norm(x, (x.shape[-1],), self.weight, self.epsilon)
        if not torch.is_grad_enabled():
            return (x * _inverse_rms(x, self.epsilon)).mul_(self.weight)
        result: Tensor = _RmsNorm.apply(x, self.weight, self.epsilon)
        return result


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up: [T, 2 * intermediate] -> [T, intermediate] (arXiv 2002.05202)."""
    if torch.is_grad_enabled():
        result: Tensor = _Swiglu.apply(gate_up)
        return result
    return _swiglu(gate_up)


class _LoraLinear(torch.autograd.Function):
    """y = x (W + s B A)' + b for frozen W and b; the gradients of A and B by thin products only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, projection: Projection, *pairs: Tensor) -> Tensor:
        weight, adapters = projection.weight, projection.adapters
        # the weight among what is saved and not beside it: with recomputation it is then forgotten until the backward
        # pass comes
        ctx.save_for_backward(x, weight, *pairs)
        ctx.adapters = adapters
        up, down = _joined(adapters, pairs, weight)
        if x.dtype == torch.float32:  # in fewer bits an update of LoRA may be too small for the sum
            return product(x, torch.addmm(weight, up, down), projection.bias)
        return F.linear(x, weight, projection.bias).addmm_(x @ down.t(), up.t())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *pairs = ctx.saved_tensors
        up, down = _joined(ctx.adapters, pairs, weight)
        inner, d_inner = product(x, down), x.new_empty(len(x), len(down))  # [T, sum of ranks]
        gradients, first = [], 0
        for adapter, b in zip(ctx.adapters, pairs[1::2], strict=True):
            part, ranks = grad[:, adapter.rows], slice(first, first := first + b.shape[1])
            d_inner[:, ranks] = product(part, (b * adapter.scale).t())
            gradients.append((inner[:, ranks].t() @ part).t() * adapter.scale)
        d_down = product(d_inner.t(), x.t()).split([b.shape[1] for b in pairs[1::2]])
        gradients = [each for pair in zip(d_down, gradients, strict=True) for each in pair]
        d_x = None
        if ctx.needs_input_grad[0] and x.dtype == torch.float32:
            d_x = product(grad, torch.addmm(weight, up, down).t())
        elif ctx.needs_input_grad[0]:
            d_x = (grad @ weight).addmm_(d_inner, down)
        return d_x, None, *gradients


def _joined(adapters: Sequence[Adapter], pairs: Sequence[Tensor], weight: Tensor) -> tuple[Tensor, Tensor]:
    """All adapters of a projection as one: scaled up [out, sum of ranks], 0 outside of an adapter's rows, and down
    [sum of ranks, in].
    """
    down = torch.cat(tuple(pairs[::2]))
    up, first = weight.new_zeros(len(weight), len(down)), 0
    for adapter, b in zip(adapters, pairs[1::2], strict=True):
        torch.mul(b, adapter.scale, out=up[adapter.rows, first : first + b.shape[1]])
        first += b.shape[1]
    return up, down


class _Swiglu(torch.autograd.Function):
    """silu(gate) * up of [T, 2 * intermediate]; keeps its input alone."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return _swiglu(gate_up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        if kernels.ready(grad, gate_up):
            return kernels.swiglu_backward(grad, gate_up)
        gate, up = gate_up.chunk(2, dim=1)
        result = torch.empty_like(gate_up)  # written in place: fresh memory costs more than the arithmetic
        d_gate, d_up = result.chunk(2, dim=1)
        torch.ops.aten.silu.out(gate, out=d_up).mul_(grad)
        torch.mul(grad, up, out=d_gate)
        torch.ops.aten.silu_backward.grad_input(d_gate, gate, grad_input=d_gate)
        return result


def _swiglu(gate_up: Tensor) -> Tensor:
    if kernels.ready(gate_up):
        return kernels.swiglu(gate_up)
    gate, up = gate_up.chunk(2, dim=1)
    return F.silu(gate).mul_(up)


def _inverse_rms(x: Tensor, epsilon: float) -> Tensor:
    """[..., H] -> [..., 1]."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.addcmul(x.new_full((), epsilon), norm, norm, value=1 / x.shape[-1]).rsqrt_()


class _RmsNorm(torch.autograd.Function):
    """RMSNorm with the gradients of its input and, where it is trained, of its weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        if kernels.ready(x, weight):
            y, scale = kernels.rms_norm(x, weight, epsilon, scales=True)
            ctx.save_for_backward(x, scale, weight)
            return y
        wide = x.float()
        scale = _inverse_rms(wide, epsilon)
        ctx.save_for_backward(x, scale, weight)
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, scale, weight = ctx.saved_tensors
        wide, d_weight = x.float(), None
        if ctx.needs_input_grad[1]:  # sum of grad * x / rms(x) over all tokens, as a product with the scales
            d_weight = (scale.flatten() @ (grad * wide).flatten(0, -2)).to(weight.dtype)
        if kernels.ready(grad, x, weight):
            return kernels.rms_norm_backward(grad, x, scale, weight), d_weight, None
        grad = grad * weight.float()
        mean = torch.linalg.vecdot(grad, wide).unsqueeze(-1).div_(x.shape[-1]).mul_(scale).mul_(scale)
        return grad.addcmul_(wide, mean, value=-1).mul_(scale).to(x.dtype), d_weight, None


def frozen_values(weight: Tensor) -> Tensor:
    """A frozen weight by itself: whoever holds it keeps these values, wherever its parameter is moved."""
    return weight if weight.requires_grad else weight.data


def _active(module: Any) -> Iterator[str]:
    if isinstance(module, LoraLayer) and not module.disable_adapters:
        yield from (name for name in module.active_adapters if name in module.lora_A)


def _one_matrix(weights: Sequence[Tensor]) -> Tensor:
    """[sum of rows, in]: a view where the weights lie behind one another; frozen ones are moved there."""
    first = weights[0]
    if len(weights) == 1:
        return frozen_values(first)
    if any(weight.requires_grad for weight in weights):
        return torch.cat(list(weights))  # an optimizer holds them where they are
    rows = [weight.shape[0] for weight in weights]
    expected = first.data_ptr()
    for weight in weights:
        if weight.data_ptr() != expected or weight.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            fused = torch.cat([weight.data for weight in weights])
            for target, part in zip(weights, fused.split(rows), strict=True):
                target.data = part
            return fused
        expected += weight.numel() * weight.element_size()
    return first.data.as_strided((sum(rows), first.shape[1]), (first.shape[1], 1))
