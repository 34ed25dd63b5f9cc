"""Follow one forward pass: which layer feeds which, what is attention, what is a gate, how much is multiplied.

Every tensor carries an Origin while the pass runs: the layers whose outputs reach it without passing through another
layer, and what happened on the way. Operations are seen through torch's own `TorchFunctionMode`, layers through hooks.

    scores  = q @ k^T            a product of two tensors that come from layers
    weights = softmax(scores)    now the product is known to be attention: left fed by q, right fed by k
    mixed   = weights @ v        right fed by v; the layer that reads `mixed` is o
    gated   = act(g) * u         a product of two layers' outputs, element by element; its reader is the down layer

`F.scaled_dot_product_attention(q, k, v)` says the same in one call. A residual sum forgets `mixed` and `gated`: what
reads the sum reads the stream, not the branch. Nothing depends on names or on architectures.

Multiply-accumulates (MACs): linear layers and convolutions by layer; products of two activations (attention) in
`other_macs`. Not counted: norms, activations, softmax, embeddings, element-wise arithmetic, biases.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from gossamer.models.experts import Matrix

Names = frozenset[str]
Ids = frozenset[int]

VIEWS = frozenset((  # they move values and leave them as they are
    "view", "view_as", "reshape", "reshape_as", "transpose", "permute", "contiguous", "split", "chunk", "unbind",
    "tensor_split", "__getitem__", "squeeze", "unsqueeze", "expand", "expand_as", "flatten", "unflatten", "to",
    "type", "float", "half", "bfloat16", "clone", "detach", "narrow", "select", "repeat", "repeat_interleave", "t",
    "swapaxes", "swapdims", "movedim", "dropout", "__get__", "type_as", "requires_grad_", "index_select", "gather",
    "cat", "stack", "pad", "roll",
))  # fmt: skip
MATMULS = frozenset(["matmul", "__matmul__", "__rmatmul__", "bmm", "mm", "baddbmm", "addmm", "addbmm", "einsum"])
PRODUCTS = frozenset(["mul", "mul_", "__mul__", "__rmul__", "__imul__", "multiply"])
SUMS = frozenset(["add", "add_", "__add__", "__radd__", "__iadd__", "sub"])
SOFTMAXES = frozenset(("softmax", "_safe_softmax"))


@dataclass(frozen=True)
class Origin:
    """Say where a tensor comes from: `layers` that feed it directly, `steps` of arithmetic since, and what it is."""

    layers: Names = frozenset()
    steps: int = 0
    scores: Ids = frozenset()
    weights: Ids = frozenset()
    mixed: Ids = frozenset()
    gated: Ids = frozenset()


NOWHERE = Origin()


@dataclass
class Product:
    """Hold the layers on the left (q) and right (k) of an attention product, and of its values (v) once seen.

    `key_size` and `value_size` are the widths of one head's queries and values, 0 where an operation hides them.
    """

    left: Names
    right: Names
    values: Names = frozenset()
    key_size: int = 0
    value_size: int = 0


@dataclass
class Flow:
    """Hold what one forward pass showed: `feeds` is the origin of each layer's input, `outputs` of the model's."""

    feeds: dict[str, Origin] = field(default_factory=dict)
    products: list[Product] = field(default_factory=list)
    gates: list[tuple[str, str]] = field(default_factory=list)  # (gate, up)
    outputs: list[Origin] = field(default_factory=list)
    macs: dict[str, int] = field(default_factory=dict)
    other_macs: int = 0

    def consumed(self) -> Names:
        """Return the layers whose output reaches another layer."""
        return frozenset().union(*(origin.layers for origin in self.feeds.values()))


def follow(
    module: nn.Module,
    layers: Mapping[str, nn.Module],
    example: Mapping[str, Tensor],
    forward: Callable[[nn.Module, dict[str, Tensor]], Any] | None = None,
    parameters: Mapping[str, Tensor] | None = None,
) -> Flow:
    """Run `module` once on `example` (inputs by name) without gradients and return what was seen.

    `layers` are the linear, convolution and embedding modules to follow, by name; `parameters` such as stand outside of
    them and count as layers that write what they hold. The module is left as it was.

    >>> follow(model, {"fc": model.fc}, {"x": torch.zeros(1, 8)}).macs  # doctest: +SKIP
    {'fc': 32}
    """
    watcher = _Watcher(parameters or {})
    with evaluating(module), ExitStack() as hooks:
        for name, layer in layers.items():
            enter, leave = watcher.hooks(name)
            for handle in (
                layer.register_forward_pre_hook(enter, with_kwargs=True),
                layer.register_forward_hook(leave, with_kwargs=True),
            ):
                hooks.callback(handle.remove)
        with watcher:
            result = forward(module, dict(example)) if forward is not None else module(**example)
    watcher.flow.outputs = [watcher.origin(tensor) for tensor in tensors_in(result)]
    return watcher.flow


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put every module into eval mode without gradients, and give each its own training flag back."""
    flags = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in flags:
            part.training = training


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists and dicts, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors_in(part)


class _Watcher(TorchFunctionMode):
    """Give each tensor its Origin as the pass goes by."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.flow = Flow()
        self._origins = WeakTensorKeyDictionary()
        for name, values in parameters.items():
            self._origins[values] = Origin(layers=frozenset((name,)))
        self._inside = 0

    def origin(self, tensor: Tensor) -> Origin:
        found = self._origins.get(tensor, NOWHERE)  # type: ignore[no-untyped-call]
        assert isinstance(found, Origin)
        return found

    def hooks(self, name: str) -> tuple[Callable[..., None], Callable[..., None]]:
        """Return the hooks that note what a layer reads and mark what it writes."""

        def enter(layer: nn.Module, args: Any, kwargs: Any) -> None:
            fed = next(tensors_in([args, kwargs]), None)
            origin = NOWHERE if fed is None else self.origin(fed)
            seen = self.flow.feeds.get(name)
            self.flow.feeds[name] = origin if seen is None else _merged([seen, origin], 0)
            self._inside += 1

        def leave(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self._inside -= 1
            for tensor in tensors_in(output):
                self._origins[tensor] = Origin(layers=frozenset((name,)))
                fed = next(tensors_in([args, kwargs]), None)
                self.flow.macs[name] = self.flow.macs.get(name, 0) + _layer_macs(layer, fed, tensor)

        return enter, leave

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        matrix = next((value for value in args if isinstance(value, Matrix)), None)
        if matrix is not None:  # one of several layers' making: what happens inside is seen too
            with self:
                return matrix.multiplied(func, args, kwargs)
        result = func(*args, **kwargs)
        if self._inside:
            return result
        name = getattr(func, "__name__", "")
        operands = list(tensors_in([args, kwargs]))
        if name == "__setitem__":
            self._origins[operands[0]] = _merged([self.origin(tensor) for tensor in operands], 1)
            return result
        outputs = list(tensors_in(result)) if isinstance(result, (Tensor, tuple, list)) else []
        if outputs:
            origin = self._origin_after(name, operands, outputs[0])
            if origin.layers or origin.scores:
                for tensor in outputs:
                    self._origins[tensor] = origin
        return result

    def _origin_after(self, name: str, operands: list[Tensor], output: Tensor) -> Origin:
        origins = [self.origin(tensor) for tensor in operands]
        merged = _merged(origins, 0 if name in VIEWS else 1)
        if name == "scaled_dot_product_attention":
            queries, keys, values = operands[:3]
            self.flow.other_macs += (
                math.prod(queries.shape[:-1]) * keys.shape[-2] * (queries.shape[-1] + values.shape[-1])
            )
            return self._attended(origins[0], origins[1], origins[2], (queries.shape[-1], values.shape[-1]))
        if name == "linear":  # a weight that no layer of its own holds
            self.flow.other_macs += output.numel() * operands[0].shape[-1]
        if name in MATMULS and len(operands) >= 2:
            return self._multiplied(name, operands[-2:], output, merged)
        if name in SOFTMAXES and merged.scores:
            return Origin(layers=merged.layers, weights=merged.scores)
        if name in PRODUCTS and len(operands) == 2:
            return self._gated(origins, merged)
        if name in SUMS and sum(bool(origin.layers) for origin in origins) > 1:
            return Origin(merged.layers, merged.steps, merged.scores)
        return merged

    def _multiplied(self, name: str, operands: list[Tensor], output: Tensor, merged: Origin) -> Origin:
        left, right = operands if name != "__rmatmul__" else operands[::-1]
        self.flow.other_macs += _product_macs(left, right, output)
        first, second = self.origin(left), self.origin(right)
        for weights, values in ((first, second), (second, first)):
            if weights.weights:
                for index in weights.weights:
                    self.flow.products[index].values |= values.layers
                    self.flow.products[index].value_size = 0 if name == "einsum" else output.shape[-1]
                return Origin(layers=values.layers, mixed=weights.weights)
        if first.layers and second.layers:
            size = 0 if name == "einsum" else left.shape[-1]
            self.flow.products.append(Product(first.layers, second.layers, key_size=size))
            return Origin(merged.layers, merged.steps, frozenset((len(self.flow.products) - 1,)))
        return merged

    def _attended(self, queries: Origin, keys: Origin, values: Origin, sizes: tuple[int, int]) -> Origin:
        self.flow.products.append(Product(queries.layers, keys.layers, values.layers, *sizes))
        return Origin(layers=values.layers, mixed=frozenset((len(self.flow.products) - 1,)))

    def _gated(self, origins: list[Origin], merged: Origin) -> Origin:
        left, right = origins
        if len(left.layers) == len(right.layers) == 1 and left.layers != right.layers and not merged.mixed:
            gate, up = (left, right) if left.steps >= right.steps else (right, left)
            self.flow.gates.append((next(iter(gate.layers)), next(iter(up.layers))))
            return Origin(merged.layers, merged.steps, gated=frozenset((len(self.flow.gates) - 1,)))
        return merged


def _merged(origins: Iterable[Origin], step: int) -> Origin:
    known = [origin for origin in origins if origin is not NOWHERE]
    if not known:
        return NOWHERE
    if len(known) == 1 and not step:
        return known[0]
    return Origin(
        layers=frozenset().union(*(origin.layers for origin in known)),
        steps=max(origin.steps for origin in known) + step,
        scores=frozenset().union(*(origin.scores for origin in known)),
        weights=frozenset().union(*(origin.weights for origin in known)),
        mixed=frozenset().union(*(origin.mixed for origin in known)),
        gated=frozenset().union(*(origin.gated for origin in known)),
    )


def _layer_macs(layer: nn.Module, fed: Tensor | None, output: Tensor) -> int:
    weight = layer.weight
    if isinstance(layer, nn.Embedding) or fed is None:
        return 0
    assert isinstance(weight, Tensor)
    if weight.dim() > 2:  # convolution: one output value needs a window of [in / groups, kernel...]
        return output.numel() * math.prod(weight.shape[1:])
    return output.numel() * fed.shape[-1]


def _product_macs(left: Tensor, right: Tensor, output: Tensor) -> int:
    """Return the MACs of a matrix product: every size that occurs, once: outputs times the shared dimension."""
    outer = output.shape[-2] * output.shape[-1] if output.dim() > 1 else output.numel()
    batch = max(output.numel() // outer, 1) if outer else 0
    rows, columns = math.prod(left.shape[-2:]), math.prod(right.shape[-2:])
    return batch * math.isqrt(outer * rows * columns)  # sqrt(MN * MK * KN) = MNK
