"""CUDA without a card: code runs on fake tensors, which have a shape, a dtype and a device and no values.

torch's `FakeTensorMode` refuses what a card would: mixed devices, dtypes and shapes that an operator does not take, an
operator that is not there. What it cannot do is handed in here: the whole numbers that lengths, masks and places are,
which are computed beside it on the CPU, so that code that asks for them goes on; and the backward of each hand-written
autograd function, called as a function, since autograd itself wants the card; and what is checkpointed, run a second
time as a backward pass does. Each place at which the host would wait for the device is noted.
"""

from __future__ import annotations

import importlib
import linecache
import pkgutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_iter, tree_map_only
from torch.utils.checkpoint import checkpoint

import mrg_r1
from mrg_r1 import policy
from mrg_r1.types import Prompts

PACKAGE = Path(mrg_r1.__file__).parent
_aten = torch.ops.aten
# Results as long as the values say: the device is asked for how many.
_LONG_AS_VALUES = {
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten._unique2.default,
    _aten.unique_dim.default,
    _aten.unique_consecutive.default,
    _aten.bincount.default,
    _aten.repeat_interleave.Tensor,
}
_INDEXING = {_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default, _aten._index_put_impl_.default}
_READING = {
    Tensor.tolist,
    Tensor.item,
    Tensor.__bool__,
    Tensor.__int__,
    Tensor.__index__,
    Tensor.__float__,
}
# Of bindings that switch to a tensor's device before they do anything, which a build for CPUs cannot.
_REQUIRES_GRAD = Tensor.requires_grad.__get__  # type: ignore[attr-defined]
_NO_CARD = "not linked with support for cuda"
# Operators that a card refuses where their tensors are of several dtypes, and a fake one does not look.
_ONE_DTYPE = {
    *("mm", "mm_out", "addmm", "addmm_", "bmm", "bmm_out", "baddbmm", "baddbmm_", "linear", "dot", "linalg_vecdot"),
    *("index_copy", "index_copy_", "scatter_add", "scatter_add_", "scatter", "scatter_", "index_add", "index_add_"),
    *("masked_scatter", "masked_scatter_", "index_put", "index_put_", "convolution"),
}


class FakeCuda:
    """A block in which `device="cuda"` is fake, entered as `with FakeCuda() as cuda`.

    Attributes:
        waits: of (place, what), how often; a place is `file:function`.
        lines: of the same, file with line and the line itself, for messages.
        backwards: autograd functions whose backward ran, by name, how often; as "checkpoint" what was run again.
        chosen: gives the values of whole numbers that a fake result decides (which token was sampled), by operator and
            shape; zeros where it is None or gives None.
    """

    def __init__(self) -> None:
        self.waits: Counter[tuple[str, str]] = Counter()
        self.lines: dict[tuple[str, str], str] = {}
        self.backwards: Counter[str] = Counter()
        self.chosen: Callable[[Any, torch.Size], Tensor | None] | None = None
        self.mode = FakeTensorMode()

    def __enter__(self) -> FakeCuda:
        self._stack = ExitStack()
        self._stack.enter_context(self.mode)
        self._numbers = self._stack.enter_context(_WholeNumbers(self))
        self._stack.enter_context(_Bindings(self, self._numbers))
        self._stack.enter_context(self._functions_as_functions())
        self._stack.enter_context(self._checkpoints_run_again())
        patch = self._stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(FakeTensor, "tolist", Tensor.tolist)  # its own reads value by value
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def of(self, tensor: Tensor) -> Tensor:
        """A real CPU tensor as a fake one of the CPU; whole numbers keep their values."""
        fake = self.mode.from_tensor(tensor)
        if _is_whole(tensor):
            with no_dispatch():
                fake.whole = tensor.clone()
        return fake

    def move(self, module: nn.Module) -> None:
        """A module's parameters and buffers, which may be of the meta device, as fake ones of CUDA. Which are
        trained is remembered, not known to autograd.
        """
        fakes: dict[int, Any] = {}
        for part in module.modules():
            for name, weight in part._parameters.items():
                if weight is not None:
                    key = id(weight)
                    if key not in fakes:
                        fresh = torch.empty(weight.shape, dtype=weight.dtype, device="cuda")
                        fakes[key] = nn.Parameter(fresh, requires_grad=False)
                        fakes[key].trained = weight.requires_grad
                    part._parameters[name] = fakes[key]
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda")

    def fake(self, prompts: Prompts) -> None:
        """Prompts as the loader makes them, on the CPU, with fake tensors in place of theirs."""
        for name in ("input_ids", "attention_mask", "positions", "next_position"):
            setattr(prompts, name, self.of(getattr(prompts, name)))
        prompts.images.tensors.update({name: self.of(tensor) for name, tensor in prompts.images.tensors.items()})

    def note(self, what: str) -> None:
        """The host waits, here: the innermost frame of the package."""
        frame = sys._getframe(1)
        while frame is not None and not _is_of_package(frame):
            frame = frame.f_back
        if frame is None:
            return
        file = Path(frame.f_code.co_filename).relative_to(PACKAGE)
        key = f"{file}:{frame.f_code.co_qualname}".replace(".<locals>", ""), what
        self.waits[key] += 1
        source = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
        self.lines[key] = f"mrg_r1/{file}:{frame.f_lineno} waits ({what}): {source}"

    @contextmanager
    def waiting(self, expected: Mapping[tuple[str, str], int]) -> Iterator[None]:
        """A block that waits at these places, so often, and nowhere else."""
        before = self.waits.copy()
        yield
        found = self.waits - before
        wrong = [key for key in {*found, *expected} if found[key] != expected.get(key, 0)]
        told = [f"{self.lines.get(key, key)}: {found[key]} times, {expected.get(key, 0)} known" for key in wrong]
        assert not wrong, "\n".join(told)

    @contextmanager
    def _functions_as_functions(self) -> Iterator[None]:
        """Each autograd function of the package runs forward and then backward, with gradients like its outputs."""
        for module in pkgutil.walk_packages(policy.__path__, "mrg_r1.policy."):
            importlib.import_module(module.name)
        with pytest.MonkeyPatch.context() as patch:
            for function in torch.autograd.Function.__subclasses__():
                if function.__module__.startswith("mrg_r1."):
                    patch.setattr(function, "apply", self._both_ways(function))
            yield

    @contextmanager
    def _checkpoints_run_again(self) -> Iterator[None]:
        def again(run: Callable[..., Any], *arguments: Any, use_reentrant: bool) -> Any:
            self.backwards["checkpoint"] += 1
            run(*arguments)
            return run(*arguments)

        with pytest.MonkeyPatch.context() as patch:
            for name, module in list(sys.modules.items()):
                if name.startswith("mrg_r1.policy.") and getattr(module, "checkpoint", None) is checkpoint:
                    patch.setattr(module, "checkpoint", again)
            yield

    def _both_ways(self, function: Any) -> Callable[..., Any]:
        def apply(*arguments: Any) -> Any:
            ctx, backward = _Context(arguments), torch.is_grad_enabled()
            with torch.no_grad():  # as autograd does both
                outputs = function.forward(ctx, *arguments)
                several = outputs if isinstance(outputs, tuple) else (outputs,)
                found = function.backward(ctx, *(torch.empty_like(one) for one in several)) if backward else ()
            if backward:
                gradients = found if isinstance(found, tuple) else (found,)
                assert len(gradients) == len(arguments), f"{function.__qualname__}: a gradient an argument"
                for place, (argument, gradient) in enumerate(zip(arguments, gradients, strict=True)):
                    if gradient is not None:
                        mine, wanted = _described(gradient), _described(argument)
                        assert mine == wanted, f"{function.__qualname__}: argument {place} is {wanted}, gradient {mine}"
                self.backwards[function.__qualname__] += 1
            return outputs

        return apply


class _Context(SimpleNamespace):
    """What autograd hands to a function, as far as the package's use it."""

    def __init__(self, arguments: tuple[Any, ...]) -> None:
        super().__init__(
            needs_input_grad=tuple(isinstance(one, Tensor) and one.is_floating_point() for one in arguments)
        )

    def save_for_backward(self, *tensors: Any) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *_: Tensor) -> None:
        pass


class _Bindings(TorchFunctionMode):
    """Calls as Python makes them, before torch asks for a device that is not there."""

    def __init__(self, cuda: FakeCuda, numbers: _WholeNumbers) -> None:
        self.cuda, self.numbers = cuda, numbers

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _READING:
            (tensor,) = args
            if tensor.is_cuda:
                self.cuda.note(f".{func.__name__.strip('_')}()")
            with no_dispatch():
                return func(self.numbers.values(tensor))
        if func == _REQUIRES_GRAD and _is_of_package(sys._getframe(1)):
            return getattr(args[0], "trained", torch.is_grad_enabled() and args[0].is_floating_point())
        if func is Tensor.to and (target := _cuda_of(args[1:], kwargs)) is not None:
            dtype = next((one for one in (*args[1:], *kwargs.values()) if isinstance(one, torch.dtype)), None)
            if args[0].device == torch.device("cuda:0") and dtype in (None, args[0].dtype):
                return args[0]
            return _aten._to_copy(
                args[0],
                dtype=dtype or args[0].dtype,
                device=target,
                non_blocking=kwargs.get("non_blocking", False),
            )
        if func is Tensor.requires_grad_ and args[0].is_cuda:
            return args[0]  # what is trained `move` remembers, and autograd is not to know
        if func is Tensor.cuda:
            raise AssertionError("Tensor.cuda() in the package: a rank's device is not always the first")
        if func is torch.nn.functional.rms_norm:  # what CUDA makes of it
            x, weight = args[0], kwargs["weight"]
            assert weight is None or x.dtype == weight.dtype, f"rms_norm of {x.dtype} and {weight.dtype}"
            return _aten._fused_rms_norm(*args, weight, kwargs["eps"])[0]
        try:
            return func(*args, **kwargs)
        except RuntimeError as error:  # before anything was done
            if _NO_CARD not in str(error):
                raise
            with self.numbers.devices_hidden():
                return func(*args, **kwargs)


class _WholeNumbers(TorchDispatchMode):
    """Below torch's Python: notes what waits, and computes whole numbers beside the fake tensors."""

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__()
        self.cuda, self.hidden = cuda, False

    @contextmanager
    def devices_hidden(self) -> Iterator[None]:
        before, self.hidden = self.hidden, True
        try:
            yield
        finally:
            self.hidden = before

    def values(self, tensor: Tensor) -> Tensor:
        """What a tensor holds, where it is known, else made up."""
        if not isinstance(tensor, FakeTensor):
            return tensor
        known = getattr(tensor, "whole", None)
        with no_dispatch():
            return torch.zeros(tuple(tensor.shape), dtype=tensor.dtype) if known is None else known

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return torch.device("cpu") if self.hidden else func(*args)
        before, self.hidden = self.hidden, False
        try:
            return self._run(func, args, kwargs)
        finally:
            self.hidden = before

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        tensors = [one for one in tree_iter((args, kwargs)) if isinstance(one, Tensor)]
        _refuse(func, args, tensors)
        self._note_waits(func, args, kwargs, tensors)
        if func is _aten.silu_backward.grad_input:  # a fake one would write by a binding that wants the card
            made, target = _aten.silu_backward(*args), kwargs["grad_input"]
            assert _described(made) == _described(target), f"{func}: {target} for {made}"
            return target
        if func is _aten._local_scalar_dense.default:
            with no_dispatch():
                return self.values(args[0]).item()
        if func in _LONG_AS_VALUES:
            return self._by_values(func, args, kwargs)
        if func in _INDEXING:
            args = (args[0], [self._places(one) for one in args[1]], *args[2:])
            args = (args[0], [part for one in args[1] for part in (one if isinstance(one, list) else [one])], *args[2:])
        out = func(*args, **kwargs)
        self._attach(func, args, kwargs, tensors, out)
        return out

    def _by_values(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A result whose length the values decide: computed from those, and as empty as the rest where it is fake."""
        device = args[0].device
        with no_dispatch():
            real_args, real_kwargs = tree_map_only(Tensor, self.values, (args, kwargs))
            real = func(*real_args, **real_kwargs)
        return tree_map_only(Tensor, lambda one: self._fake(one, device), real)

    def _fake(self, real: Tensor, device: torch.device) -> Tensor:
        fake = torch.empty(real.shape, dtype=real.dtype, device=device)
        if _is_whole(real):
            fake.whole = real
        return fake

    def _places(self, index: Any) -> Any:
        """A mask as the places where it is True, an index each dimension."""
        if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8):
            return list(self._by_values(_aten.nonzero.default, (index,), {}).unbind(1))
        return index

    def _note_waits(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> None:
        if not any(one.device.type == "cuda" for one in tensors) and "device" not in kwargs:
            return
        if func is _aten._to_copy.default or func is _aten.copy_.default:
            source = args[0] if func is _aten._to_copy.default else args[1]
            target = kwargs.get("device") or (source.device if func is _aten._to_copy.default else args[0].device)
            waits = not kwargs.get("non_blocking") and not (len(args) > 2 and args[2])
            if torch.device(target).type != source.device.type:
                if waits or torch.device(target).type == "cpu":
                    self.cuda.note(f"copy to {torch.device(target).type}")
        elif func is _aten._local_scalar_dense.default or func is _aten.equal.default:
            self.cuda.note("a value is read")
        elif func in _LONG_AS_VALUES:
            self.cuda.note(func._schema.name.removeprefix("aten::"))
        elif func in _INDEXING and args[0].device.type == "cuda":
            for index in args[1]:
                if index is not None and index.device.type == "cpu":
                    self.cuda.note("index from the CPU")
                elif index is not None and index.dtype in (torch.bool, torch.uint8):
                    self.cuda.note("index by a mask")

    def _attach(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor], out: Any) -> None:
        """The whole numbers of a result, beside it."""
        outs, _ = tree_flatten(out)
        if not any(isinstance(one, FakeTensor) and _is_whole(one) for one in outs):
            return
        if all(_is_whole(one) for one in tensors):
            with no_dispatch():
                real_args, real_kwargs = tree_map_only(Tensor, self.values, (args, kwargs))
                if "device" in real_kwargs:
                    real_kwargs["device"] = torch.device("cpu")
                found, _ = tree_flatten(func(*real_args, **real_kwargs))
            for fake, real in zip(outs, found, strict=True):
                if isinstance(fake, FakeTensor) and _is_whole(fake):
                    fake.whole = real
            return
        for fake in outs:
            if isinstance(fake, FakeTensor) and _is_whole(fake) and not hasattr(fake, "whole"):
                with no_dispatch():
                    chosen = None if self.cuda.chosen is None else self.cuda.chosen(func, fake.shape)
                if chosen is not None:
                    fake.whole = chosen


def _refuse(func: Any, args: Any, tensors: list[Tensor]) -> None:
    """What a card's operators refuse and their fake ones let pass.

    Raises:
        AssertionError: names it.
    """
    name = func._schema.name.removeprefix("aten::")
    if name.endswith(("_for_cpu", "_for_cpu_backward")) or name.startswith("mkldnn::"):
        assert not any(one.device.type == "cuda" for one in tensors), f"{name} is for a CPU"
    if name in _ONE_DTYPE:
        dtypes = sorted({str(one.dtype) for one in tensors if one.is_floating_point()})
        assert len(dtypes) < 2, f"{name} of {' and '.join(dtypes)}"
    elif name.startswith("_flash_attention_"):
        *heads, q_starts, k_starts = args[: 5 if name.endswith("forward") else 8]
        if name.endswith("backward"):
            assert heads.pop().dtype == torch.float32, f"{name}: the log-sum-exp"
        assert {one.dtype for one in heads} in ({torch.bfloat16}, {torch.float16}), f"{name}: {heads}"
        assert {one.dtype for one in (q_starts, k_starts)} == {torch.int32}, f"{name}: where sequences start"
        assert all(one.stride(-1) == 1 and one.shape[-1] % 8 == 0 for one in heads), f"{name}: heads"


def _is_of_package(frame: FrameType) -> bool:
    return Path(frame.f_code.co_filename).is_relative_to(PACKAGE) and frame.f_code.co_filename != __file__


def _is_whole(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() and not tensor.is_complex()


def _cuda_of(args: Any, kwargs: Any) -> torch.device | None:
    for one in (*args, kwargs.get("device")):
        if isinstance(one, (str, torch.device)) and torch.device(one).type == "cuda":
            return torch.device(one)
        if isinstance(one, Tensor) and one.is_cuda:
            return one.device
    return None


def _described(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}".replace("cuda:0", "cuda")
