"""Experts in an ONNX file: one node for all experts of a block, which multiplies codes as they are.

An exporter cannot follow a loop over the experts that were chosen. So while a graph is exported each block's experts
are one node of ours (`gossamer::Experts`), and it is then replaced by an operator of ONNX Runtime, com.microsoft

    QMoE    where all experts of the block have codes: they stay packed in memory, and only chosen ones are multiplied
    MoE     where none has: float32

Both compute, for each token, sum over the k chosen experts of  m_e W2_e (G sigmoid(alpha G) (U + beta)) with
G, U = W1_e x, each clamped to +-limit where there is one. They choose experts themselves, by the k largest of a row of
scores. The model has chosen already (in whatever way its router does), so a row is made that says so:

    QMoE    scores 1 at the chosen experts and 0 elsewhere; the weights m of the sum are an input of their own
    MoE     log(m / sum m) at the chosen experts, -1e30 elsewhere, whose softmax is m / sum m; the result times sum m

The CPU kernels take gate and up in turns, g0 u0 g1 u1 ..., and 2, 4 or 8 bits. Seen on the kernels themselves (ONNX
Runtime 1.32, random codes, against float64): 4 and 2 bits in blocks or per channel, with and without zero points, 8
bits per channel, biases and clamps agree to 6e-7; 8 bits in blocks differ by 1e-2, since that kernel rounds its inputs:
it is not used. 3 bits lie in 4-bit containers, 5 to 7 bits in 8-bit ones.

Left out: experts without a gate, other activations than the above, blocks of which some experts have codes and some
have not.

Shape suffixes: E experts, N output channels of the stack, K inputs, G groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from gossamer.errors import ArtifactError
from gossamer.models.candidate import Candidate
from gossamer.models.experts import DOWN, GATED, Layout, SwiGlu, layouts, swiglu_of
from gossamer.models.quantized import Quantized
from gossamer.models.roles import EXPERT_ROLES, ModelMap
from gossamer.runtimes.onnx_storage import add_initializer, expert_container, pack_bits

if TYPE_CHECKING:
    import onnx_ir as ir

    from gossamer.models.quantized import QuantSpec
    from gossamer.runtimes.onnx_rewrite import Rewriter

EXPORTED = "gossamer"  # our own implementation of transformers' experts interface, while a graph is exported
DOMAIN = "gossamer"
NEVER = np.float32(-1e30)  # the score of an expert that was not chosen
SMALLEST = np.float32(1e-37)  # of a weight, so that its logarithm is a number


def _one_node(part: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Stand for the experts of a block as one node of the exported graph."""
    biases = [part._parameters.get(f"{name}_bias") for name in (GATED, DOWN)]
    inputs = (hidden, index, weights, part._parameters[GATED], part._parameters[DOWN], *biases)
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::Experts", inputs, {"k": int(index.shape[-1])}, dtype=hidden.dtype, shape=hidden.shape, version=1
    )


ALL_EXPERTS_FUNCTIONS.register(EXPORTED, _one_node)


def refusal_of_experts(model: ModelMap, chosen: Mapping[str, QuantSpec]) -> str | None:
    """Return why ONNX Runtime's operators cannot hold the model's experts with these grids by layer, or None."""
    for experts in model.experts:
        if not experts.stacked:
            continue
        if not experts.gated_by_silu:
            return f"{experts.name} computes something else than a gated network with SiLU, which QMoE and MoE do not"
        inside = [layer for layer in model.layers if layer.experts == experts.name and layer.role in EXPERT_ROLES]
        left = [layer.name for layer in inside if layer.name not in chosen]
        if left and len(left) < len(inside):
            return f"{left[0]} is one of {len(inside)} layers of one operator: all of them are rounded, or none"
        for roles in (("expert_gate", "expert_up"), ("expert_down",)):
            grids = {chosen[layer.name] for layer in inside if layer.role in roles and layer.name in chosen}
            if len(grids) > 1:
                return f"{experts.name} has one grid for each of its two stacks, the recipe has {len(grids)} for one"
        groups = {chosen[layer.name].group_size for layer in inside if layer.name in chosen}
        if len(groups) > 1:
            return f"{experts.name} has one group size, the recipe has {sorted(map(str, groups))}"
    return None


def lower_experts(rewriter: Rewriter, candidate: Candidate) -> tuple[dict[str, Any], list[str]]:
    """Replace every node of ours; return the ledger's entries for layers with codes, and the names of float stacks."""
    stacks = {f"{holder}.{layout.parameter}": (holder, layout) for holder, layout in layouts(candidate.module)}
    ledger: dict[str, Any] = {}
    floats: list[str] = []
    for node in [node for node in rewriter.graph if node.domain == DOMAIN]:
        names = [value.name or "" for value in node.inputs[3:5] if value is not None]
        pieces = [_codes(candidate, *stacks[name]) for name in names]
        swiglu = swiglu_of(candidate.module.get_submodule(stacks[names[0]][0]))
        if swiglu is None or any(codes is None for codes in pieces) != all(codes is None for codes in pieces):
            raise ArtifactError(
                f"the experts in {stacks[names[0]][0]} cannot be held by one operator",
                "quantize all of them or none, or use the runtime torch",
            )
        if pieces[0] is None:
            _replace_by_floats(rewriter, node, names, [stacks[name][1] for name in names], swiglu)
            floats += names
            continue
        for name, codes in zip(names, pieces, strict=True):
            assert codes is not None
            ledger |= _store(rewriter.graph, name, *stacks[name], codes)
        firsts = [next(iter(codes.values())) for codes in pieces if codes]
        _replace_by_codes(rewriter, node, names, stacks[names[0]][1].num_experts, firsts, swiglu)
        for name in names:
            del rewriter.graph.initializers[name]
    return ledger, floats


def _codes(candidate: Candidate, holder: str, layout: Layout) -> dict[str, Quantized] | None:
    """Return the codes of every layer of a stack by parameter, or None where no layer has any."""
    names = [name for expert in layout.names(holder) for name in expert]
    have = [name for name in names if name in candidate.quantized]
    if have and len(have) < len(names):
        raise ArtifactError(f"{len(have)} of {len(names)} layers of {holder} have codes", "quantize all or none")
    return {name: candidate.quantized[name] for name in names} if have else None


def _in_turns(parts: list[NDArray[Any]]) -> NDArray[Any]:
    """Return the rows of gate and up in turns; those of one layer as they are."""
    return np.stack(parts, axis=1).reshape(-1, *parts[0].shape[1:])


def _store(
    graph: ir.Graph, stack: str, holder: str, layout: Layout, codes: Mapping[str, Quantized]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Add the initializers of a stack's codes and yield the ledger's entry of each layer."""
    first = next(iter(codes.values()))
    bits, spec = expert_container(first.spec), first.spec
    experts = [[codes[name] for name in names] for names in layout.names(holder)]
    codes_ENK = np.stack([_in_turns([one.codes.numpy() for one in layers]) for layers in experts])
    scale_ENG = np.stack([_in_turns([one.scale.float().numpy() for one in layers]) for layers in experts])
    unsigned = (codes_ENK.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)
    add_initializer(graph, f"{stack}.codes", pack_bits(unsigned, bits))
    add_initializer(graph, f"{stack}.scale", scale_ENG if spec.group_size else scale_ENG[..., 0])
    if not spec.symmetric:
        zeros = [[one.zero_point for one in layers] for layers in experts]
        zero_ENG = np.stack([_in_turns([z.numpy() for z in layers if z is not None]) for layers in zeros])
        unsigned = (zero_ENG.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)
        add_initializer(
            graph, f"{stack}.zero_point", pack_bits(unsigned if spec.group_size else unsigned[..., 0], bits)
        )
    for expert, names in enumerate(layout.names(holder)):
        for number, name in enumerate(names):
            yield name, {
                "bits": spec.bits, "group_size": spec.group_size, "symmetric": spec.symmetric,
                "shape": list(codes[name].shape), "matrix": list(codes[name].shape), "container": bits, "block": 0,
                "stack": stack, "expert": expert, "number": number, "of": len(names),
            }  # fmt: skip


def _choices(rewriter: Rewriter, node: ir.Node, fill: np.float32, values: ir.Value, num_experts: int) -> ir.Value:
    """Return a row of scores [tokens, experts] for each token: `values` at the chosen experts, `fill` elsewhere."""
    import onnx_ir as ir

    count = rewriter.before(node, "Shape", [node.inputs[1]], start=0, end=1)
    shape = rewriter.before(node, "Concat", [count, rewriter.ints([num_experts])], axis=0)
    filled = rewriter.before(node, "ConstantOfShape", [shape], value=ir.tensor(np.array([fill], np.float32)))
    return rewriter.before(node, "ScatterElements", [filled, node.inputs[1], values], axis=1)


def _settings(node: ir.Node, swiglu: SwiGlu) -> dict[str, Any]:
    limit = {} if swiglu.limit is None else {"swiglu_limit": swiglu.limit}
    return {
        "k": node.attributes["k"].as_int(), "activation_type": "swiglu", "swiglu_fusion": 1,
        "activation_alpha": swiglu.alpha, "activation_beta": swiglu.beta, **limit,
    }  # fmt: skip


def _biases(rewriter: Rewriter, node: ir.Node, interleaved: bool) -> list[ir.Value | None]:
    """Return both biases, that of gate and up in turns."""
    import onnx_ir as ir

    first, second = [*node.inputs[5:7], None, None][:2]
    if first is None or interleaved:
        return [first, second]
    assert first.const_value is not None
    bias_EN = first.const_value.numpy()
    halves = np.split(bias_EN, 2, axis=1)
    first.const_value = ir.tensor(np.stack(halves, axis=2).reshape(bias_EN.shape).copy(), name=first.name)
    return [first, second]


def _replace_by_codes(
    rewriter: Rewriter,
    node: ir.Node,
    stacks: list[str],
    num_experts: int,
    codes: list[Quantized],
    swiglu: SwiGlu,
) -> None:
    """Put QMoE in the place of a node of ours."""
    import onnx_ir as ir

    held = rewriter.graph.initializers
    weights = node.inputs[2]
    assert weights is not None
    shape = rewriter.before(node, "Shape", [weights])
    ones = rewriter.before(node, "ConstantOfShape", [shape], value=ir.tensor(np.array([1], np.float32)))
    chosen = _choices(rewriter, node, np.float32(0), ones, num_experts)
    mixed = _choices(rewriter, node, np.float32(0), weights, num_experts)
    biases = _biases(rewriter, node, swiglu.interleaved)
    parts = [[held[f"{stack}.codes"], held[f"{stack}.scale"], bias] for stack, bias in zip(stacks, biases, strict=True)]
    zeros = [held.get(f"{stack}.zero_point") for stack in stacks]
    inputs = [node.inputs[0], chosen, *parts[0], *parts[1], None, None, None, *zeros, None, mixed]
    bits = [expert_container(one.spec) for one in codes]
    block = {"block_size": codes[0].spec.group_size} if codes[0].spec.group_size else {}
    made = rewriter.before(
        node, "QMoE", inputs, "com.microsoft", **_settings(node, swiglu), **block, expert_weight_bits=bits[0],
        fc2_expert_weight_bits=bits[1], normalize_routing_weights=0, accuracy_level=1,
    )  # fmt: skip
    rewriter.replace(node, made)


def _replace_by_floats(
    rewriter: Rewriter, node: ir.Node, stacks: list[str], held: list[Layout], swiglu: SwiGlu
) -> None:
    """Put MoE in the place of a node of ours, its stacks turned as the kernel reads them."""
    import onnx_ir as ir

    for name, layout in zip(stacks, held, strict=True):
        value = rewriter.graph.initializers[name]
        assert value.const_value is not None
        stack_ENK = value.const_value.numpy()
        if layout.transposed:
            stack_ENK = stack_ENK.swapaxes(1, 2)
        if len(layout.layers) == 2 and not layout.interleaved:
            experts, rows, inputs = stack_ENK.shape
            stack_ENK = stack_ENK.reshape(experts, 2, rows // 2, inputs).swapaxes(1, 2).reshape(stack_ENK.shape)
        value.const_value = ir.tensor(np.ascontiguousarray(stack_ENK), name=name)
        value.shape = ir.Shape(stack_ENK.shape)
    weights = node.inputs[2]
    total = rewriter.before(node, "ReduceSum", [weights, rewriter.ints([1])], keepdims=1)
    share = rewriter.before(node, "Div", [weights, total])
    least = rewriter.before(node, "Max", [share, rewriter.scalar(SMALLEST)])
    scores = _choices(rewriter, node, NEVER, rewriter.before(node, "Log", [least]), held[0].num_experts)
    first, second = (rewriter.graph.initializers[name] for name in stacks)
    biases = _biases(rewriter, node, swiglu.interleaved)
    made = rewriter.before(
        node, "MoE", [node.inputs[0], scores, first, biases[0], second, biases[1]], "com.microsoft",
        **_settings(node, swiglu), normalize_routing_weights=1,
    )  # fmt: skip
    rewriter.replace(node, rewriter.before(node, "Mul", [made, total]))
