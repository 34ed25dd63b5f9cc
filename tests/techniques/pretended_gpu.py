"""A GPU that is pretended: tensors say that they lie there, hold real values, and do not meet those of main memory.

Without a GPU nothing shows that a tensor was left behind in main memory: everything lies there. While `pretended()`
lasts, `torch.device("cuda", 0)` gives tensors whose values the CPU's kernels compute; each operation checks, as a GPU
does, that its tensors lie together (a single number may come from main memory). `Pretended.peak` is the most bytes that
lay there at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gossamer.models.spilled import tensors_changed, tensors_in

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
ATEN = torch.ops.aten
TRANSFERS = (ATEN.copy_.default, ATEN._to_copy.default)


class There(Tensor):
    """A tensor that says it lies on the GPU; `inner` holds its values."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # results are what operations say that they are

    @staticmethod
    def __new__(cls, inner: Tensor, _: Pretended) -> There:
        """Return a tensor without values of its own: to torch's engine it lies on its meta device."""
        made: There = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device="meta"
        )
        return made

    def __init__(self, inner: Tensor, gpu: Pretended) -> None:
        self.inner = inner
        self.gpu = gpu
        storage = inner.untyped_storage()
        gpu.hold(storage.data_ptr(), storage.nbytes())
        self.place = storage.data_ptr()

    def __del__(self) -> None:
        self.gpu.release(self.place)

    @property
    def device(self) -> torch.device:
        """Return the GPU."""
        return GPU

    def tolist(self) -> Any:
        """Return the values as numbers: torch refuses it to any but its own class."""
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute with the values, where no mode does."""
        gpu = next(value.gpu for value in tensors_in([args, kwargs or {}]) if isinstance(value, There))
        return gpu.computed(func, args, kwargs or {})

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        """Write the values, and that they lie there."""
        return f"There({self.inner})"


class Pretended(TorchDispatchMode):
    """Compute on the GPU that is pretended what is asked of it."""

    # torch looks for a real GPU unless a mode of this kind is there
    _mode_key = torch._C._TorchDispatchModeKey.FAKE

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[int, int] = {}
        self.users: Counter[int] = Counter()
        self.held = self.peak = 0
        self.called = 0

    def hold(self, place: int, size: int) -> None:
        """Count a tensor that lies here."""
        if not self.users[place]:
            self.held += size
            self.bytes[place] = size
        self.users[place] += 1
        self.peak = max(self.peak, self.held)

    def release(self, place: int) -> None:
        """Take a tensor off that went."""
        self.users[place] -= 1
        if not self.users[place]:
            del self.users[place]
            self.held -= self.bytes.pop(place)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled, and asking takes longer than computing

    def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute, here or in main memory."""
        return self.computed(func, args, kwargs or {})

    def computed(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Return what an operation gives; where its tensors lie, or where it is asked for."""
        met = tensors_in([args, kwargs])
        here = any(isinstance(value, There) for value in met)
        if not here and kwargs.get("device") is None:
            return func(*args, **kwargs)
        if func is ATEN._fused_sdp_choice.default and here:
            return 0  # the one that is written in operations that every device has
        if here and func not in TRANSFERS:
            left = [tuple(value.shape) for value in met if not isinstance(value, There) and value.dim()]
            assert not left, f"{func} meets tensors of main memory: {left}"
        if kwargs.get("device") is not None:
            here = torch.device(kwargs["device"]).type in (GPU.type, "meta")
            kwargs = {**kwargs, "device": CPU}
        self.called += here
        known = {id(_inner(value)): value for value in met}
        found = func(*tensors_changed(args, _inner), **tensors_changed(kwargs, _inner))

        def outer(value: Tensor) -> Tensor:
            if id(value) in known:  # it was changed in place
                return known[id(value)]
            return There(value, self) if here else value

        return tensors_changed(found, outer)


def _inner(value: Tensor) -> Tensor:
    return value.inner if isinstance(value, There) else value


@contextmanager
def pretended() -> Iterator[Pretended]:
    """Pretend that there is a GPU while the `with` lasts."""
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor makes one in main memory, and moves it
    try:
        with Pretended() as gpu:
            yield gpu
    finally:
        torch._C._set_only_lift_cpu_tensors(before)
