"""Formats that are no integers, through every solver: plain rounding, GPTQ, refitting, descent, AWQ's clipping."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from compressed_tensors.quantization.utils.mxfp_utils import generate_mx_scales
from torch import Tensor

from gossamer.errors import RecipeError, TechniqueError
from gossamer.models.levels import tensor_scale
from gossamer.models.quantized import Quantized, QuantSpec
from gossamer.recipe import Recipe
from gossamer.techniques.quantize.awq import round_clipped
from gossamer.techniques.quantize.calibrated import Gptq
from gossamer.techniques.quantize.descend import descend
from gossamer.techniques.quantize.gptq import gptq, output_error
from gossamer.techniques.quantize.grid import quantize_weight
from gossamer.techniques.quantize.quantize import Quantize
from gossamer.techniques.quantize.refit import refit_scales
from gossamer.techniques.registry import resolve

SPECS = [
    QuantSpec(bits=8, format="fp8"),
    QuantSpec(bits=8, format="fp8", group_size=16),
    QuantSpec(bits=4, format="mxfp4", group_size=32),
    QuantSpec(bits=4, format="nvfp4", group_size=16),
    QuantSpec(bits=4, format="nf4", group_size=16),
    QuantSpec(bits=4, format="nf4"),
]


def layer(seed: int = 0, rows: int = 6, inputs: int = 64, tokens: int = 300) -> tuple[Tensor, Tensor]:
    """Return a weight with heavy tails, and second moments of inputs that are correlated and of different size."""
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=draw) * torch.logspace(0, -1.5, inputs)[:, None]
    x_tI = torch.randn(tokens, inputs, generator=draw) @ mixing
    weight_OI = 0.02 * torch.randn(rows, inputs, generator=draw) * torch.rand(rows, 1, generator=draw).exp()
    return weight_OI + weight_OI**3 * 500, x_tI.t() @ x_tI / tokens


def check_held(codes: Quantized) -> None:
    """Assert that codes lie in their grid and that scales are such as files of the format hold."""
    spec, scale = codes.spec, codes.scale.float()
    assert spec.low <= int(codes.codes.min()) <= int(codes.codes.max()) <= spec.high
    assert codes.scale.dtype == spec.scale_dtype
    assert codes.zero_point is None
    assert bool((scale > 0).all())
    if spec.format == "mxfp4":
        assert torch.equal(torch.log2(scale), torch.log2(scale).round())
    if spec.format == "nvfp4":
        under = scale / tensor_scale(float(scale.max()))
        assert torch.equal(under, under.to(torch.float8_e4m3fn).float())
    if spec.format in ("mxfp4", "nvfp4"):
        assert torch.equal(codes.dequantize().bfloat16().float(), codes.dequantize())


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_minmax_holds_every_weight_and_takes_the_nearest_level(spec: QuantSpec) -> None:
    weight, _ = layer()
    found = quantize_weight(weight, spec)
    check_held(found)
    assert spec.number_format is not None
    levels = spec.number_format.codebook.levels_K.double()
    size = spec.group_size or weight.shape[1]
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], size):
            group, scale = weight[row, start : start + size].double(), float(found.scale[row, start // size])
            # half a step of an E4M3 scale is at most a sixteenth of it: one that is rounded down may clip by as much
            assert float(group.abs().max()) / scale <= float(levels[-1]) * 1.0626
            nearest = (group[:, None] - levels * scale).abs().min(1).values
            got = (group - found.dequantize()[row, start : start + size].double()).abs()
            torch.testing.assert_close(got, nearest, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_search_never_raises_the_error(spec: QuantSpec) -> None:
    weight, _ = layer(3)
    plain, searched = quantize_weight(weight, spec), quantize_weight(weight, spec, scale="mse")
    check_held(searched)
    errors = [
        (weight - codes.dequantize()).reshape(6, plain.num_groups, -1).square().sum(-1) for codes in (plain, searched)
    ]
    assert bool((errors[1] <= errors[0] * (1 + 1e-5)).all())
    assert bool((errors[1] < errors[0]).any())


@pytest.mark.parametrize("spec", SPECS[:4], ids=str)
def test_compressed_tensors_rounds_alike_with_these_scales(spec: QuantSpec) -> None:
    weight, _ = layer(4)
    found = quantize_weight(weight, spec)
    scale, unit = found.scale.float(), None
    strategy = "group" if spec.group_size else "channel"
    if spec.format == "nvfp4":
        strategy = "tensor_group"
        unit = torch.tensor([1 / tensor_scale(float(scale.max()))])
        scale = scale * unit
    args = QuantizationArgs(num_bits=spec.bits, type="float", strategy=strategy, group_size=spec.group_size)
    codes = quantize(weight, scale, None, args, global_scale=unit)
    values = dequantize(codes, scale, args=args, global_scale=unit, dtype=torch.float32)
    torch.testing.assert_close(found.dequantize(), values, rtol=1e-6, atol=0)


def test_mxfp4_scales_are_those_of_the_standard_or_their_neighbours() -> None:
    # section 6.3 of the standard lets the largest weights clip; min-max here does not, so it is once or twice as large
    weight, _ = layer(5)
    theirs = 2.0 ** (generate_mx_scales(weight.reshape(-1, 32).abs().amax(1)) - 127)
    ratio = quantize_weight(weight, SPECS[2]).scale.float().flatten() / theirs
    assert set(ratio.tolist()) <= {0.5, 1.0, 2.0}


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_gptq_with_equal_inputs_is_plain_rounding(spec: QuantSpec) -> None:
    weight, _ = layer(6)
    found = gptq(weight, 3.0 * torch.eye(64), spec)
    plain = quantize_weight(weight, spec, scale="mse")
    assert torch.equal(found.codes, plain.codes)
    assert torch.equal(found.scale, plain.scale)


@pytest.mark.parametrize("order", ["static", "none"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_gptq_refitting_and_descent_lower_the_output_error(spec: QuantSpec, order: Any) -> None:
    weight, second_II = layer(7)
    plain = output_error(weight, quantize_weight(weight, spec, scale="mse").dequantize(), second_II)
    found = gptq(weight, second_II, spec, order=order)
    check_held(found)
    solved = output_error(weight, found.dequantize(), second_II)
    assert solved < 0.9 * plain
    for improve in (refit_scales, descend, refit_scales):
        found = improve(weight, second_II, found)
        check_held(found)
        after = output_error(weight, found.dequantize(), second_II)
        assert after <= solved * (1 + 1e-4)
        solved = after


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_zeros_stay_zero(spec: QuantSpec) -> None:
    weight, second_II = layer(8)
    weight[:, ::3] = 0
    found = descend(weight, second_II, gptq(weight, second_II, spec))
    assert bool((found.dequantize()[:, ::3] == 0).all())
    assert bool((quantize_weight(torch.zeros(2, 64), spec, scale="mse").dequantize() == 0).all())


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_clipping_by_outputs_never_raises_their_error(spec: QuantSpec) -> None:
    weight, second_II = layer(9)
    plain, clipped = (round_clipped(weight, second_II, spec, clip=clip) for clip in ("none", "full"))  # type: ignore[arg-type]
    check_held(clipped)
    before, after = (output_error(weight, codes.dequantize(), second_II) for codes in (plain, clipped))
    assert after <= before * (1 + 1e-5)


def test_a_group_that_does_not_divide_is_an_error_with_a_way_out() -> None:
    with pytest.raises(TechniqueError, match="group_size 32 does not divide in_features 48") as caught:
        quantize_weight(torch.ones(2, 48), SPECS[2])
    assert "nf4" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("step", "spec"),
    [
        (Quantize(format="fp8"), SPECS[0]),
        (Quantize(format="mxfp4"), SPECS[2]),
        (Gptq(format="nvfp4"), SPECS[3]),
        (Gptq(format="nf4"), QuantSpec(bits=4, format="nf4", group_size=64)),
        (Gptq(format="fp8", group_size=128), QuantSpec(bits=8, format="fp8", group_size=128)),
        (Quantize(format="nf4", group_size=None), SPECS[5]),
        (Quantize(bits=4), QuantSpec(bits=4)),
    ],
    ids=str,
)
def test_bits_and_groups_follow_from_the_format(step: Quantize | Gptq, spec: QuantSpec) -> None:
    assert set(step.entry()[step.name]) <= {"format", "group_size", "bits"}
    assert QuantSpec(bits=step.bits, symmetric=step.symmetric, group_size=step.group_size, format=step.format) == spec
    assert resolve(
        Recipe.model_validate({"steps": [{"technique": step.name, "settings": step.entry()[step.name]}]})
    ) == [step]
    assert (spec.format if spec.format != "int" else "int4") in step.label()


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("- quantize: {format: nvfp4, bits: 8}", "has 4 bits, symmetric, groups of 16; asked for were 8 bits"),
        ("- gptq: {format: mxfp4, group_size: 64}", "groups of 32; asked for were 4 bits, symmetric, groups of 64"),
        ("- gptq: {format: nf4, symmetric: false}", "asymmetric"),
        ("- quantize: {format: fp8, activations: dynamic}", "needs weights of 8 or 7 bits"),
        ("- gptq: {format: fp8, bits_of: [[4, [v]]]}", "bits_of"),
        ("- learned_rounding: {format: nf4}", "equal steps"),
        ("- quantize: {format: fp5}", "format"),
        ("- quantize: {format: [fp8]}", "format"),
    ],
)
def test_contradictions_are_refused(recipe: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        resolve(Recipe.from_yaml(recipe))
    assert words in str(caught.value)
