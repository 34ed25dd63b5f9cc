"""Find where a block may be scaled channel by channel without changing what it computes.

A producer writes channels that consumers read; between them stands nothing but what commutes with a positive factor
for each channel. Then for any factors f > 0

    consumer(W, producer(x)) = consumer(W diag(f), producer(x) / f)

and difficulty moves from one tensor to another while the function stays (SmoothQuant, Xiao et al. 2022, equation 3;
AWQ, Lin et al. 2023, section 3.2). The places, by what one pass through the block shows (`dataflow.py`):

    norm -> all that reads it        its weight and bias are divided; a norm that computes x (1 + w) keeps its one
    v -> o                           softmax weights mix tokens, not channels; query heads of a group read one v head,
                                     so their factors are equal: one producer channel feeds several consumer channels
    up -> down of a gated MLP        act(gate) * up is linear in up
    up -> down through ReLU          max(0, x / f) = max(0, x) / f

What the pass shows is only a proposal. Each place is tried out with random factors on a real call: the block's output
must not change, compared with how much it changes when only the producer is scaled. So a norm that a residual sum reads
too (BERT), GELU, SiLU, or a fused layout other than the one proposed is never offered, whatever the model is called.

Left out: queries against keys (rotary positions tie pairs of channels), one block's output against the next block.

Shape suffixes: I inputs of the consumers, P outputs of the producer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.models.dataflow import Flow, evaluating, follow
from gossamer.models.structure import layer_kind
from gossamer.models.walker import Call, hidden_states

EXACT = 1e-3  # a change of the output that rounding explains, relative to that of scaling the producer alone
LARGEST_TRIED = 4.0  # random factors lie between its inverse and itself


@dataclass(frozen=True)
class Scaling:
    """Name the parameters of one place, all relative to the block.

    `producers` are divided, `consumers` (weights) multiplied. `channels[i]` is the producer's output channel that feeds
    input i of every consumer; channels that occur `repeat` times are read by that many heads. `turned` parameters are
    stored [in, out]; a norm that multiplies by `offset` + weight has `offset` 1.
    """

    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    channels: tuple[int, ...]
    turned: frozenset[str] = frozenset()
    offset: float = 0.0

    @property
    def repeat(self) -> int:
        """Return how many consumer inputs one producer channel feeds."""
        return len(self.channels) // len(set(self.channels))

    def shared(self, values_I: Tensor) -> Tensor:
        """Return `values_I` averaged over the inputs that one producer channel feeds, [I]."""
        channels_I = torch.tensor(self.channels, device=values_I.device)
        size = max(self.channels) + 1
        sums_P = torch.zeros(size, dtype=values_I.dtype, device=values_I.device).index_add_(0, channels_I, values_I)
        return (sums_P / torch.bincount(channels_I, minlength=size).clamp(min=1))[channels_I]

    def __str__(self) -> str:
        return f"{self.producers[0]} -> {', '.join(self.consumers)}"


def find_scalings(block: nn.Module, call: Call) -> list[Scaling]:
    """Return the places of a block where scaling is exact, each tried out on `call`.

    A block that the call does not change the output of is not scaled there: what cannot be tried is not offered.

    >>> [str(place) for place in find_scalings(block, call)]  # doctest: +SKIP
    ['input_layernorm.weight -> self_attn.q_proj.weight, self_attn.k_proj.weight, self_attn.v_proj.weight', ...]
    """
    leaves = {name: part for name, part in block.named_modules() if name and _has_weight(part)}
    kinds = {name: layer_kind(part) for name, part in leaves.items()}
    watched = {name: part for name, part in leaves.items() if kinds[name][0] in ("linear", "norm")}
    found: list[Scaling] = []
    with evaluating(block):
        flow = follow(block, watched, {}, lambda module, _: call(module))
        before = hidden_states(call(block))
        for options in _proposals(block, watched, {name: kinds[name] for name in watched}, flow):
            exact = (option for option in options if _is_exact(block, call, before, option))
            if (scaling := next(exact, None)) is not None:
                found.append(scaling)
    return found


def scaled_weights(module: nn.Module, scaling: Scaling, factors_I: Tensor) -> dict[str, Tensor]:
    """Return new values for the parameters of a place: producers divided, consumers' input columns multiplied.

    `factors_I` are positive and equal over inputs that one producer channel feeds. The module is left as it is, and the
    values are found where its own lie.
    """
    device = module.get_parameter(scaling.producers[0]).device
    factors_I = factors_I.detach().float().to(device)
    assert bool((factors_I > 0).all()), "factors are positive"
    channels_I = torch.tensor(scaling.channels, device=device)
    scaled: dict[str, Tensor] = {}
    for name in scaling.producers:
        values = module.get_parameter(name).detach()
        axis = values.dim() - 1 if name in scaling.turned else 0
        factors_P = torch.ones(values.shape[axis], device=device)
        factors_P[channels_I] = factors_I
        assert torch.equal(factors_P[channels_I], factors_I), f"{name}: inputs of one channel have different factors"
        wide = factors_P.reshape([-1 if dim == axis else 1 for dim in range(values.dim())])
        offset = scaling.offset if name.endswith("weight") else 0.0
        scaled[name] = ((values.float() + offset) / wide - offset).to(values.dtype)
    for name in scaling.consumers:
        values = scaled.get(name, module.get_parameter(name).detach())
        wide = factors_I.unsqueeze(1) if name in scaling.turned else factors_I
        scaled[name] = (values.float() * wide).to(values.dtype)
    return scaled


def apply_scaling(module: nn.Module, scaling: Scaling, factors_I: Tensor) -> None:
    """Scale a place in the module itself; see `scaled_weights`."""
    with torch.no_grad():
        for name, values in scaled_weights(module, scaling, factors_I).items():
            module.get_parameter(name).copy_(values)


def _has_weight(module: nn.Module) -> bool:
    return isinstance(module._parameters.get("weight"), Tensor)


def _is_exact(block: nn.Module, call: Call, before: Tensor, scaling: Scaling) -> bool:
    """Say whether random factors leave the block's output as it was, where scaling one side alone changes it."""
    draw = torch.Generator().manual_seed(0)
    spread = 2 * torch.log(torch.tensor(LARGEST_TRIED))
    by_channel_P = torch.exp((torch.rand(max(scaling.channels) + 1, generator=draw) - 0.5) * spread)
    scaled = scaled_weights(block, scaling, by_channel_P[torch.tensor(scaling.channels)])
    half = {name: values for name, values in scaled.items() if name in scaling.producers}
    changed = _difference(hidden_states(call(block, scaled)), before)
    alone = _difference(hidden_states(call(block, half)), before)
    return alone > 0 and changed <= EXACT * alone


def _difference(found: Tensor, wanted: Tensor) -> float:
    """Return the root mean square of the change, each token by its own size, so that no large token hides others."""
    found, wanted = found.double(), wanted.double()
    size = wanted.square().mean(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return float(((found - wanted).square() / size).mean().sqrt())


Kinds = Mapping[str, tuple[Any, bool]]


def _proposals(block: nn.Module, layers: Mapping[str, nn.Module], kinds: Kinds, flow: Flow) -> Iterator[list[Scaling]]:
    """Yield for each place what may be exact there: the first option that is will be taken."""
    linears = [name for name in layers if kinds[name][0] == "linear"]
    for norm in (name for name in layers if kinds[name][0] == "norm"):
        readers = [
            name
            for name in linears
            if name in flow.feeds and flow.feeds[name].layers == {norm} and flow.feeds[name].steps == 0
        ]
        width = layers[norm].get_parameter("weight").numel()
        # an expert that this call did not reach may read the norm in another
        idle = [
            name
            for name in linears
            if name not in flow.feeds
            and _num_inputs(layers[name], kinds[name]) == width
            and _may_read(name, norm, flow)
        ]
        if readers and not idle and all(_num_inputs(layers[name], kinds[name]) == width for name in readers):
            plain = _place(layers, kinds, norm, readers, range(width))
            yield [plain, _place(layers, kinds, norm, readers, range(width), offset=1.0)]
    for name in linears:
        if name not in flow.feeds:
            continue
        origin, wide = flow.feeds[name], _num_inputs(layers[name], kinds[name])
        if origin.mixed:
            feeders = frozenset().union(*(flow.products[index].values for index in origin.mixed))
            layouts = _value_layouts
        elif origin.gated:
            feeders = frozenset(flow.gates[index][1] for index in origin.gated)
            others = frozenset(flow.gates[index][0] for index in origin.gated)
            if len(feeders) == len(others) == 1:
                options = [
                    _place(layers, kinds, feeder, [name], range(wide))
                    for feeder in (*feeders, *others)
                    if kinds[feeder][0] == "linear" and _num_outputs(layers[feeder], kinds[feeder]) == wide
                ]
                yield options
            continue
        else:
            feeders, layouts = origin.layers, _half_layouts
        if len(feeders) != 1:
            continue
        (feeder,) = feeders
        if kinds[feeder][0] == "linear":
            outputs = _num_outputs(layers[feeder], kinds[feeder])
            yield [_place(layers, kinds, feeder, [name], channels) for channels in layouts(outputs, wide)]


def _may_read(name: str, norm: str, flow: Flow) -> bool:
    """Say whether a layer that was not reached may read a norm: what its like in a list do (experts), it does too."""
    like = re.sub(r"\.\d+\.", ".*.", name)
    reached = [origin for other, origin in flow.feeds.items() if re.sub(r"\.\d+\.", ".*.", other) == like]
    return not reached or any(norm in origin.layers for origin in reached)


def _value_layouts(outputs: int, wide: int) -> Iterator[range | list[int]]:
    """Yield which of `outputs` channels of v (or a fused qkv) may feed each of `wide` inputs of o.

    A fused layer holds q, k, v one after another, or head by head; grouped heads are tried for every head size.
    """
    if outputs == wide:
        yield range(wide)
        return
    fused = outputs > wide
    values = (outputs - wide) // 2 if fused else outputs
    if values <= 0 or wide % values or (fused and values * 2 + wide != outputs):
        return
    repeat, first = wide // values, outputs - values
    sizes = [size for size in range(values, 0, -1) if values % size == 0]
    if repeat == 1:
        yield range(first, outputs)
        for size in sizes:  # q, k, v of the first head, of the second head, ...
            yield [3 * size * (i // size) + 2 * size + i % size for i in range(wide)]
        return
    for size in sizes:
        yield [first + (i // (size * repeat)) * size + i % size for i in range(wide)]


def _half_layouts(outputs: int, wide: int) -> Iterator[range]:
    """Yield which channels of up may feed down: all of them, or one half of a fused gate and up."""
    if outputs == wide:
        yield range(wide)
    elif outputs == 2 * wide:
        yield from (range(wide, outputs), range(wide))


def _place(
    layers: Mapping[str, nn.Module],
    kinds: Kinds,
    producer: str,
    consumers: list[str],
    channels: range | list[int],
    offset: float = 0.0,
) -> Scaling:
    owned = layers[producer]._parameters
    named = [f"{producer}.{key}" for key in ("weight", "bias") if isinstance(owned.get(key), Tensor)]
    return Scaling(
        producers=tuple(named),
        consumers=tuple(f"{name}.weight" for name in consumers),
        channels=tuple(channels),
        turned=frozenset(f"{name}.weight" for name in (producer, *consumers) if kinds[name][1]),
        offset=offset,
    )


def _num_inputs(layer: nn.Module, kind: tuple[Any, bool]) -> int:
    return layer.get_parameter("weight").shape[0 if kind[1] else 1]


def _num_outputs(layer: nn.Module, kind: tuple[Any, bool]) -> int:
    return layer.get_parameter("weight").shape[1 if kind[1] else 0]
