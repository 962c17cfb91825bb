"""The language model of Qwen2.5-VL as raw tensors: what rollout and scoring run instead of the checkpoint's modules.

The weights stay where they are; this is a reading of them. Projections that share an input are one matrix, LoRA has a
gradient of its own that never forms a full weight's, and the layers take packed tokens, so that a prompt is computed
once for its group. Source of the architecture: Qwen2.5-VL (arXiv 2502.13923); that it equals transformers' modules is
tested, not assumed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mrg_r1.policy.attention import GroupAttention, PackedAttention, Rotated, SeqLens

# A private name of torch, so it may go; then decoding on a CPU is slower and nothing else.
_PACK = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None) if torch.backends.mkldnn.is_available() else None


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
    packed: Tensor | None = None  # the weight in oneDNN's layout for few tokens, without adapters

    def __call__(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out]."""
        if self.packed is not None:
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        if not self.adapters:
            return F.linear(x, self.weight, self.bias)
        pairs = [tensor for adapter in self.adapters for tensor in (adapter.a, adapter.b)]
        result: Tensor = _LoraLinear.apply(x, self, *pairs)
        return result

    def merged(self) -> Projection:
        """The same with LoRA added in, in new memory: the policy's own weights are never touched."""
        weight = self.weight.clone()
        for adapter in self.adapters:
            weight[adapter.rows].addmm_(adapter.b, adapter.a, alpha=adapter.scale)
        return Projection(weight, self.bias)

    def for_few_tokens(self, tokens: int) -> Projection:
        """The same, faster for about so many tokens a call where oneDNN can lay the weight out for it: float32 on a
        CPU.

        Its own product packs a weight anew at each call, which for few tokens costs as much as the product.
        """
        if _PACK is None or self.weight.dtype != torch.float32 or self.weight.device.type != "cpu" or self.adapters:
            return self
        return replace(self, packed=_PACK(self.weight, tokens))


class _LoraLinear(torch.autograd.Function):
    """y = x W' + b + scale * (x A') B' for frozen W and b; the gradients of A and B by thin products only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, projection: Projection, *pairs: Tensor) -> Tensor:
        inner = x @ torch.cat(pairs[::2]).t()  # [T, sum of ranks]
        y = F.linear(x, projection.weight, projection.bias)
        for adapter, b, part in zip(projection.adapters, pairs[1::2], _ranks(inner, pairs), strict=True):
            y[:, adapter.rows].addmm_(part, b.t(), alpha=adapter.scale)
        # the weight among what is saved and not beside it: with recomputation it is then forgotten until the backward
        # pass comes
        ctx.save_for_backward(x, inner, projection.weight, *pairs)
        ctx.adapters = projection.adapters
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, inner, weight, *pairs = ctx.saved_tensors
        d_inner, d_b = torch.empty_like(inner), []
        for adapter, b, part, d_part in zip(
            ctx.adapters, pairs[1::2], _ranks(inner, pairs), _ranks(d_inner, pairs), strict=True
        ):
            share = grad[:, adapter.rows]
            d_part.copy_(share @ b).mul_(adapter.scale)
            d_b.append((share.t() @ part).mul_(adapter.scale))
        d_a = (d_inner.t() @ x).split([a.shape[0] for a in pairs[::2]])
        d_x = (grad @ weight).addmm_(d_inner, torch.cat(pairs[::2])) if ctx.needs_input_grad[0] else None
        return d_x, None, *(gradient for pair in zip(d_a, d_b, strict=True) for gradient in pair)


def _ranks(inner: Tensor, pairs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """[T, sum of ranks] -> a view for each adapter."""
    return inner.split([a.shape[0] for a in pairs[::2]], dim=1)


class _Swiglu(torch.autograd.Function):
    """silu(gate) * up of [T, 2 * intermediate]; keeps its input alone."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=1)
        result = torch.empty_like(gate_up)  # written in place: fresh memory costs more than the arithmetic
        d_gate, d_up = result.chunk(2, dim=1)
        torch.ops.aten.silu.out(gate, out=d_up).mul_(grad)
        torch.mul(grad, up, out=d_gate)
        torch.ops.aten.silu_backward.grad_input(d_gate, gate, grad_input=d_gate)
        return result


class _RmsNorm(torch.autograd.Function):
    """x / rms(x) * weight with a frozen weight, float32 inside (arXiv 1910.07467)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = x.float()
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, scale, weight)
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, scale, weight = ctx.saved_tensors
        grad, wide = grad * weight.float(), x.float()
        mean = torch.linalg.vecdot(grad, wide).unsqueeze(-1).div_(x.shape[-1]).mul_(scale).mul_(scale)
        return grad.addcmul_(wide, mean, value=-1).mul_(scale).to(x.dtype), None, None


@dataclass(frozen=True)
class Layer:
    """One decoder layer."""

    qkv: Projection
    out: Projection
    gate_up: Projection
    down: Projection
    norm_attention: Tensor  # [H]
    norm_mlp: Tensor  # [H]

    def merged(self) -> Layer:
        return self._map(lambda projection: projection.merged())

    def _map(self, change: Callable[[Projection], Projection]) -> Layer:
        return replace(
            self, qkv=change(self.qkv), out=change(self.out), gate_up=change(self.gate_up), down=change(self.down)
        )


@dataclass(frozen=True)
class LanguageModel:
    """The decoder's weights as they are now: read it anew after an update of adapters or a change between policy and
    reference.
    """

    layers: tuple[Layer, ...]
    norm: Tensor  # [H]
    heads: int
    head_size: int
    epsilon: float
    inverse_frequencies: Tensor  # [D / 2] float32
    axis_of_frequency: Tensor  # [D / 2] int64: time, height or width

    @classmethod
    def read(cls, policy: Any) -> LanguageModel:
        """The language model of a policy; its adapters as they stand, on or off.

        Frozen projections that share an input are moved behind one another in memory once, and the modules' weights
        become views of that: nothing is held twice.
        """
        model = policy.language_model
        layers = tuple(read_layer(layer) for layer in model.layers)
        return cls(**cls.dimensions(policy), layers=layers, norm=_values(model.norm.weight))

    @staticmethod
    def dimensions(policy: Any) -> dict[str, Any]:
        """What a decoder is besides its weights."""
        config = policy.base.config.text_config
        frequencies = policy.language_model.rotary_emb.inv_freq.float()
        sections = config.rope_parameters["mrope_section"]
        return {
            "heads": config.num_attention_heads,
            "head_size": 2 * len(frequencies),
            "epsilon": config.rms_norm_eps,
            "inverse_frequencies": frequencies,
            "axis_of_frequency": torch.arange(3).repeat_interleave(torch.tensor(sections)).to(frequencies.device),
        }

    @property
    def depth(self) -> int:
        return len(self.layers)

    def layer(self, number: int) -> AbstractContextManager[Layer]:
        """A layer, to be used inside the block only."""
        return nullcontext(self.layers[number])

    @property
    def key_heads(self) -> int:
        return (self.layers[0].qkv.weight.shape[0] // self.head_size - self.heads) // 2

    def merged(self) -> LanguageModel:
        """The same with LoRA folded into new matrices, for the rollout."""
        return replace(self, layers=tuple(layer.merged() for layer in self.layers))

    def for_few_tokens(self, tokens: int) -> LanguageModel:
        """The same with weights laid out for decoding about `tokens` rows."""
        layers = (layer._map(lambda projection: projection.for_few_tokens(tokens)) for layer in self.layers)
        return replace(self, layers=tuple(layers))

    def rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """[3, T] multimodal positions -> cos and sin [T, 1, D / 2] float32 (Qwen2-VL, arXiv 2409.12191, section
        2.1).
        """
        angles = positions[self.axis_of_frequency].t().float() * self.inverse_frequencies
        return angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)

    def rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """[..., H] -> [..., H]; torch's fused kernel, but for gradients on the CPU, where there is none."""
        if x.is_cuda or not torch.is_grad_enabled():
            return F.rms_norm(x, (x.shape[-1],), weight, self.epsilon)
        result: Tensor = _RmsNorm.apply(x, weight, self.epsilon)
        return result

    def mlp(self, layer: Layer, x: Tensor) -> Tensor:
        """[T, H] -> [T, H], the residual included."""
        gate_up = layer.gate_up(self.rms_norm(x, layer.norm_mlp))
        if torch.is_grad_enabled():
            return layer.down(_Swiglu.apply(gate_up)).add_(x)
        gate, up = gate_up.chunk(2, dim=1)
        return layer.down(F.silu(gate).mul_(up)).add_(x)

    def prompt_pass(self, prompts: Packed, *, recompute: bool = False) -> PromptCache:
        """Run prompts: what everything after them needs to know of them.

        Args:
            recompute: gradient checkpointing: keep each layer's input only.
        """
        x, layers = prompts.embeddings, []
        for number in range(self.depth):
            x, k, v = self._run(recompute, self._prompt_layer, number, x, prompts)
            layers.append((k, v))
        return PromptCache(tuple(layers), self.rms_norm(x, self.norm), prompts.runs)

    def completion_pass(
        self, completions: Packed, groups: SeqLens, states: PromptCache, *, recompute: bool = False
    ) -> Tensor:
        """Run completions after their prompts.

        Args:
            groups: how many of the tokens belong to each study of `states`.

        Returns:
            [T, H] normalised hidden states.
        """
        x = completions.embeddings
        for number in range(self.depth):
            x = self._run(
                recompute, self._completion_layer, number, x, completions, groups, states.runs, *states.layers[number]
            )
        return self.rms_norm(x, self.norm)

    def _run(self, recompute: bool, layer: Callable[..., Any], *arguments: Any) -> Any:
        if recompute and torch.is_grad_enabled():
            return checkpoint(layer, *arguments, use_reentrant=False)
        return layer(*arguments)

    def _prompt_layer(self, number: int, x: Tensor, prompts: Packed) -> tuple[Tensor, Tensor, Tensor]:
        runs = prompts.runs
        with self.layer(number) as layer:
            q, k, v = self._queries_keys_values(layer, x, prompts)
            if number == self.depth - 1:  # past the last keys and values only the last tokens predict something
                last = runs.last_tokens
                attended, x = PackedAttention.apply(q[last], k, v, runs.ones, runs, False), x[last]
            else:
                attended = PackedAttention.apply(q, k, v, runs, runs, True)
            return self.mlp(layer, layer.out(attended.flatten(1)).add_(x)), k, v

    def _completion_layer(
        self,
        number: int,
        x: Tensor,
        completions: Packed,
        groups: SeqLens,
        prompts: SeqLens,
        prompt_k: Tensor,
        prompt_v: Tensor,
    ) -> Tensor:
        with self.layer(number) as layer:
            q, k, v = self._queries_keys_values(layer, x, completions)
            attended: Tensor = GroupAttention.apply(q, k, v, prompt_k, prompt_v, groups, prompts, completions.runs)
            return self.mlp(layer, layer.out(attended.flatten(1)).add_(x))

    def _queries_keys_values(self, layer: Layer, x: Tensor, packed: Packed) -> tuple[Tensor, Tensor, Tensor]:
        qkv = layer.qkv(self.rms_norm(x, layer.norm_attention)).view(len(x), -1, self.head_size)
        q, k, v = Rotated.apply(qkv, self.heads, packed.cos, packed.sin)
        return q, k, v


@dataclass(frozen=True)
class Packed:
    """Sequences behind one another on one axis, as a layer takes them."""

    embeddings: Tensor  # [T, H]
    cos: Tensor  # [T, 1, D / 2] float32, the rotation of each token
    sin: Tensor  # [T, 1, D / 2] float32
    runs: SeqLens


@dataclass(frozen=True)
class PromptCache:
    """What completions need to know of their prompts: computed once, shared by a group, and by a rollout and the update
    after it.
    """

    layers: tuple[tuple[Tensor, Tensor], ...]  # keys and values of each layer, each [T, key heads, D]
    last: Tensor  # [B, H] normalised hidden states of the last tokens, which predict the first of each completion
    runs: SeqLens  # a run a study

    def select(self, studies: Sequence[int]) -> PromptCache:
        """Those of some studies, in the order given."""
        if list(studies) == list(range(len(self.runs.lengths))):
            return self

        def chosen(tokens: Tensor) -> Tensor:
            pieces = tokens.split(list(self.runs.lengths))
            return torch.cat([pieces[study] for study in studies])

        runs = SeqLens(tuple(self.runs.lengths[study] for study in studies), self.runs.device)
        return PromptCache(tuple((chosen(k), chosen(v)) for k, v in self.layers), self.last[list(studies)], runs)

    def leaves(self) -> PromptCache:
        """The same values cut off from their graph, collecting gradients: several backward passes can start
        from them.
        """

        def leaf(tensor: Tensor) -> Tensor:
            return tensor.detach().requires_grad_()

        return PromptCache(tuple((leaf(k), leaf(v)) for k, v in self.layers), leaf(self.last), self.runs)

    def continuation(self, leaves: PromptCache) -> Tensor:
        """A scalar whose gradient is what reached `leaves`: its backward pass goes on through the prompts' graph."""
        pairs = zip(self._tensors(), leaves._tensors(), strict=True)
        parts = [(mine * leaf.grad).sum() for mine, leaf in pairs if leaf.grad is not None]
        return torch.stack(parts).sum() if parts else self.last.sum() * 0.0

    def _tensors(self) -> list[Tensor]:
        return [tensor for pair in self.layers for tensor in pair] + [self.last]


def read_layer(module: Any) -> Layer:
    """A decoder layer of the checkpoint's modules; its adapters as they stand, on or off."""
    attention, mlp = module.self_attn, module.mlp
    return Layer(
        qkv=_projection([attention.q_proj, attention.k_proj, attention.v_proj]),
        out=_projection([attention.o_proj]),
        gate_up=_projection([mlp.gate_proj, mlp.up_proj]),
        down=_projection([mlp.down_proj]),
        norm_attention=_values(module.input_layernorm.weight),
        norm_mlp=_values(module.post_attention_layernorm.weight),
    )


def _projection(modules: Sequence[Any]) -> Projection:
    """Linear layers, wrapped by PEFT or not, as one projection; only adapters that are switched on take part."""
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
    bias = None if biases[0] is None else torch.cat(biases) if len(biases) > 1 else _values(biases[0])
    return Projection(_one_matrix([linear.weight for linear in linears]), bias, tuple(adapters))


def _values(weight: Tensor) -> Tensor:
    """A frozen weight by itself: whoever holds it keeps these values, wherever its parameter is moved."""
    return weight if weight.requires_grad else weight.data


def _active(module: Any) -> Iterator[str]:
    if isinstance(module, LoraLayer) and not module.disable_adapters:
        yield from (name for name in module.active_adapters if name in module.lora_A)


def _one_matrix(weights: Sequence[Tensor]) -> Tensor:
    """[sum of rows, in]: a view where the weights lie behind one another; frozen ones are moved there."""
    first = weights[0]
    if len(weights) == 1:
        return _values(first)
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
