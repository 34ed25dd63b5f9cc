"""Which layers make the queries, keys and values of each self-attention, and what its map is made of.

One pass shows which layers' outputs are multiplied with which (`dataflow.py`). An attention whose queries and keys are
read from one place looks at its own sequence; one whose keys come from elsewhere (a decoder's at its encoder) is left
out.

    map = softmax(q k^T * scale + causal mask)        from what the layers q and k give out

is not what every model computes: some rotate q and k by position, add a bias, cap, or look at a window. So the rule is
tried out: it holds where the softmax that a pass takes is the one that the rule gives. Code of a user's own that calls
a fused kernel takes none that could be seen.

Left out, with an error that names them: queries, keys and values out of one layer (their order in it is the model's
business), several layers that add up to one of them, and attention that is no module's (nn.MultiheadAttention).

Shape suffixes: B samples, H heads, T tokens, D channels of a head, C channels of all heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gossamer.errors import TechniqueError
from gossamer.models.attention import written_out_attention
from gossamer.models.blocks import block_of, find_stacks
from gossamer.models.dataflow import SOFTMAXES, Flow, Names, evaluating, follow
from gossamer.models.factors import Factored
from gossamer.models.purpose import named
from gossamer.models.structure import layer_kind

Forward = Callable[[nn.Module, dict[str, Tensor]], Any]
MASKED = -1e30  # a score of what is not looked at: no probability, and no NaN where two of them are subtracted


@dataclass(frozen=True)
class SelfAttention:
    """Name the layers of one self-attention: its stack and block, q, k and v, their widths, and the channels of a head.

    `key_size` and `value_size` are 0 where the pass did not show them.
    """

    stack: str
    block: int
    q: str
    k: str
    v: str
    widths: tuple[int, int, int]
    key_size: int
    value_size: int


@dataclass(frozen=True)
class MapRule:
    """Say how an attention's map is made of its queries and keys [B, T, C]."""

    head_size: int
    scale: float
    causal: bool

    def scores(self, queries_BTC: Tensor, keys_BTC: Tensor) -> Tensor:
        """Return the scores [B, H, T, T] before their softmax; keys that queries share are repeated."""
        queries_BHTD, keys_BGTD = (
            values.reshape(*values.shape[:2], -1, self.head_size).transpose(1, 2) for values in (queries_BTC, keys_BTC)
        )
        keys_BHTD = keys_BGTD.repeat_interleave(queries_BHTD.shape[1] // keys_BGTD.shape[1], 1)
        scores_BHTT = queries_BHTD @ keys_BHTD.transpose(-1, -2) * self.scale
        if self.causal:
            seen_TT = torch.ones(scores_BHTT.shape[-2:], dtype=torch.bool, device=scores_BHTT.device).tril()
            scores_BHTT = scores_BHTT.masked_fill(~seen_TT, MASKED)
        return scores_BHTT


def find_self_attentions(
    module: nn.Module, example: Mapping[str, Tensor], forward: Forward | None = None
) -> tuple[tuple[SelfAttention, ...], str]:
    """Return the self-attentions of a model's blocks in the order of the pass, and what was seen but not understood.

    >>> find_self_attentions(model, example)[0][0].q  # doctest: +SKIP
    'model.layers.0.self_attn.q_proj'
    """
    members = find_stacks(module)[1]
    layers = {
        name: part
        for name, part in module.named_modules()
        if next(part.parameters(recurse=False), None) is not None and layer_kind(part)[0] in ("linear", "conv")
    }
    shapes: dict[str, torch.Size] = {}
    with ExitStack() as hooks:
        for name, part in layers.items():
            hooks.callback(part.register_forward_hook(partial(_note_shape, shapes, name)).remove)
        flow = follow(module, layers, example, forward)
    found: dict[str, SelfAttention] = {}
    fused: dict[str, None] = {}
    mixed: dict[str, None] = {}
    flat: dict[str, None] = {}
    for product in flow.products:
        sides = product.left, product.right, product.values
        if not all(sides):
            continue
        if any(len(side) > 1 for side in sides):
            mixed |= dict.fromkeys(sorted(product.left))
            continue
        q, k, v = (next(iter(side)) for side in sides)
        place = block_of(q, members)
        if q in (k, v) or k == v:
            fused[q] = None
        elif place is None or _read_by(flow, module, q) != _read_by(flow, module, k):
            continue
        elif any(len(shapes[name]) != 3 for name in (q, k, v)):
            flat[q] = None
        else:
            widths = shapes[q][2], shapes[k][2], shapes[v][2]
            found.setdefault(q, SelfAttention(*place[:2], q, k, v, widths, product.key_size, product.value_size))
    unclear = []
    if fused:
        unclear.append(f"queries, keys and values come out of one layer: {named(list(fused))}")
    if mixed:
        unclear.append(f"queries, keys or values come out of several layers: {named(list(mixed))}")
    if flat:
        unclear.append(f"outputs are not [batch, tokens, channels]: {named(list(flat))}")
    return tuple(found.values()), "; ".join(unclear)


def _note_shape(shapes: dict[str, torch.Size], name: str, layer: nn.Module, inputs: Any, found: Tensor) -> None:
    shapes[name] = found.shape


def _read_by(flow: Flow, module: nn.Module, name: str) -> Names:
    """Return the layers that feed one, or the pair of thin ones that stands in its place."""
    parent = name.rpartition(".")[0]
    if isinstance(module.get_submodule(parent), Factored):
        name = f"{parent}.0"
    return flow.feeds[name].layers


def find_map_rules(
    module: nn.Module,
    attentions: Sequence[SelfAttention],
    example: Mapping[str, Tensor],
    forward: Callable[[nn.Module, dict[str, Tensor]], Any],
) -> tuple[MapRule, ...]:
    """Return the rule of each attention's map, as one pass on `example` showed it.

    Raises TechniqueError where a map is made of more than queries and keys, or the pass takes no softmax.
    """
    names = list(dict.fromkeys(name for one in attentions for name in (one.q, one.k)))
    watch = _Softmaxes()
    with evaluating(module), written_out_attention(module), outputs_of(module, names) as outputs, watch:
        forward(module, dict(example))
    rules = []
    for one in attentions:
        queries, keys = outputs[one.q], outputs[one.k]
        tried = _rules(one, queries, keys)
        rule = next((rule for rule in tried if _is_taken(rule.scores(queries, keys).softmax(-1), watch.taken)), None)
        if rule is None:
            size = queries.shape[1] if queries.dim() == 3 else 0
            raise TechniqueError(
                f"none of the {len(watch.taken)} softmaxes of a pass over {size} tokens is that of {one.q} and {one.k}:"
                " positions are rotated in or added behind them, the row is too short, or the kernel is fused",
                "follow the original's attention by `relations` instead of `attention`",
            )
        rules.append(rule)
    return tuple(rules)


def _rules(one: SelfAttention, queries: Tensor, keys: Tensor) -> Iterator[MapRule]:
    """Yield the rules that may be an attention's."""
    size = one.key_size
    fits = queries.dim() == keys.dim() == 3 and queries.shape[1] > 1 and size > 0  # of one token every map is 1
    if not fits or queries.shape[2] % size or keys.shape[2] % size or queries.shape[2] % keys.shape[2]:
        return
    for causal in (False, True):
        for scale in (size**-0.5, 1.0):
            yield MapRule(size, scale, causal)


def _is_taken(map_BHTT: Tensor, taken: Sequence[Tensor]) -> bool:
    return any(
        other.numel() == map_BHTT.numel()
        and other.shape[-2:] == map_BHTT.shape[-2:]
        and torch.allclose(other.reshape(map_BHTT.shape).float(), map_BHTT.float(), rtol=1e-3, atol=1e-4)
        for other in taken
    )


class _Softmaxes(TorchFunctionMode):
    """Keep what softmaxes give out."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in SOFTMAXES and isinstance(found, Tensor):
            self.taken.append(found)
        return found


@contextmanager
def outputs_of(module: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Yield what the named layers gave out in the last pass, by name, while the `with` lasts."""
    outputs: dict[str, Tensor] = {}

    def keep(_: nn.Module, inputs: Any, found: Tensor, name: str) -> None:
        outputs[name] = found

    with ExitStack() as hooks:
        for name in names:
            hooks.callback(module.get_submodule(name).register_forward_hook(partial(keep, name=name)).remove)
        yield outputs
