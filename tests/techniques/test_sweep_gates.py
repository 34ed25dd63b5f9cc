"""Gates: what a solver cannot do is done more safely, step by step, and said; what the model breaks is an error."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gossamer.errors import ModelError, TechniqueError
from gossamer.models.candidate import Candidate
from gossamer.models.quantized import QuantSpec
from gossamer.models.roles import LayerInfo, ModelMap
from gossamer.models.source import Source
from gossamer.models.structure import map_model
from gossamer.run.progress import Silent
from gossamer.run.team import ALONE
from gossamer.run.workspace import Run
from gossamer.tasks import get_task
from gossamer.tasks.base import Batch
from gossamer.techniques.base import Context, Technique
from gossamer.techniques.block import Block
from gossamer.techniques.prune.sparsify import Sparsify
from gossamer.techniques.quantize.calibrated import Gptq
from gossamer.techniques.quantize.grid import quantize_weight
from gossamer.techniques.quantize.quantize import Quantize
from gossamer.techniques.quantize.scaled import Awq
from gossamer.techniques.sweep_gates import JUMP, Found, expected_error, layer_error, weight_error, wider

SWEEP = runpy.run_path(str(Path(__file__).parent / "test_blockwise.py"))
SPEAK = get_task("causal-lm")
Change = Callable[[Any], None]
PLAIN = Quantize(bits=4, group_size=16, symmetric=False)


def opened(change: Change, run: Run | None = None) -> tuple[Candidate, ModelMap, Context]:
    """Return a tiny Llama with something done to its weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=32, tie_word_embeddings=False, initializer_range=0.2,
        attn_implementation="eager",
    )  # fmt: skip
    network = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        change(network)
    draw = np.random.default_rng(0)
    batches = [Batch({"input_ids": draw.integers(1, 64, (1, 12))}, np.array([index])) for index in range(8)]
    source = Source.open(network, forward=SWEEP["run_model"])
    candidate = Candidate(source=source, module=source.module(SPEAK))
    example = {"input_ids": torch.from_numpy(batches[0].inputs["input_ids"])}
    context = Context(
        task=SPEAK, example=batches[0].inputs, calibration=batches, progress=Silent(), run=run, identity={"of": "test"}
    )
    return candidate, map_model(candidate.module, example, source.forward), context


def applied(step: Technique, change: Change, *, later: Change | None = None, **more: Any) -> Candidate:
    """Apply a step to a tiny Llama; `later` changes what opening a model would refuse."""
    candidate, model, context = opened(change)
    with torch.no_grad():
        if later is not None:
            later(candidate.module)
    return step.apply(candidate, model, replace(context, **more))


def plainly(change: Change) -> Candidate:
    return applied(PLAIN, change)


def same_codes(one: Candidate, other: Candidate, parameter: str) -> bool:
    return torch.equal(one.quantized[parameter].codes, other.quantized[parameter].codes)


def nothing(network: Any) -> None:
    del network


def a_dead_channel(network: Any) -> None:
    network.model.layers[1].input_layernorm.weight[:16] = 0


def a_huge_channel(network: Any) -> None:
    """Let one input of an MLP be so large that its square overflows, and be read by nobody."""
    block = network.model.layers[1]
    block.post_attention_layernorm.weight[3] = 1e25
    for layer in (block.mlp.gate_proj, block.mlp.up_proj):
        layer.weight[:, 3] = 0


def one_direction(network: Any) -> None:
    """Let every token be a multiple of one vector: moments of rank one."""
    network.model.embed_tokens.weight[:] = torch.randn(64, 1)


def two_that_cancel(network: Any) -> None:
    """Let two large inputs be equal and their weights opposite: any rounding of them is seen a thousand times."""
    network.model.embed_tokens.weight[:, 9] = network.model.embed_tokens.weight[:, 2]
    block = network.model.layers[0]
    block.input_layernorm.weight[[2, 9]] = 1000.0
    for layer in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj):
        layer.weight[:, 9] = -layer.weight[:, 2]


def not_a_number(network: Any) -> None:
    network.model.layers[2].mlp.down_proj.weight[0, 0] = torch.nan


def test_channels_that_no_token_excites_need_no_fallback() -> None:
    found = applied(Gptq(group_size=16), a_dead_channel)
    assert found.fallbacks == []
    codes = found.quantized["model.layers.1.self_attn.q_proj.weight"]
    assert torch.isfinite(codes.dequantize()).all()


@pytest.mark.parametrize("step", [Gptq(group_size=16), Awq(group_size=16)], ids=["gptq", "awq"])
def test_a_layer_whose_moments_overflow_is_rounded_plainly_alone(step: Technique) -> None:
    found, plain = applied(step, a_huge_channel), plainly(a_huge_channel)
    for name in ("gate", "up"):
        parameter = f"model.layers.1.mlp.{name}_proj.weight"
        # awq divides the rows of `up` by what it multiplies the columns of `down` with
        assert same_codes(found, plain, parameter) or (name, step.name) == ("up", "awq")
        (told,) = [note for note in found.fallbacks if parameter in note]
        assert "rounded plainly: the squares of its inputs overflow (the largest is" in told
    assert not same_codes(found, plain, "model.layers.1.mlp.down_proj.weight")


def test_what_is_cut_where_moments_overflow_is_cut_by_magnitude() -> None:
    found, wanted = (applied(Sparsify(by=by), a_huge_channel) for by in ("sparsegpt", "magnitude"))
    name = "model.layers.1.mlp.gate_proj.weight"
    assert torch.equal(found.module.get_parameter(name), wanted.module.get_parameter(name))
    assert any(f"{name} was cut by magnitude" in note for note in found.fallbacks)


@pytest.mark.parametrize("step", [Gptq(group_size=16, damping=1e-17), Sparsify(damping=1e-17)], ids=["gptq", "sparse"])
def test_moments_without_a_factor_get_more_damping(step: Technique) -> None:
    found = applied(step, one_direction)
    (told,) = [note for note in found.fallbacks if "layers.0.self_attn.q_proj" in note]
    assert "had no factor, so damping 1e-1" in told


def test_moments_that_no_damping_helps_are_not_used() -> None:
    found, plain = applied(Gptq(group_size=16, damping=1e-25), one_direction), plainly(one_direction)
    assert same_codes(found, plain, "model.layers.0.self_attn.q_proj.weight")
    (told,) = [note for note in found.fallbacks if "layers.0.self_attn.q_proj" in note]
    assert "no factor with damping 1e-25, nor 1000 times as much: rounded plainly" in told


@pytest.mark.parametrize("step", [Gptq(group_size=16), Sparsify()], ids=["gptq", "sparsify"])
def test_what_the_model_itself_breaks_is_an_error_that_names_the_layer(step: Technique) -> None:
    wanted = r"model\.layers\.2\.mlp\.down_proj is the first in model\.layers\.2; 1 of its own weights are"
    with pytest.raises(ModelError, match=wanted):
        applied(step, nothing, later=not_a_number)


def test_layers_whose_outputs_overflow_are_named_too() -> None:
    def too_large(network: Any) -> None:
        network.model.layers[1].self_attn.o_proj.weight[:] = 3e38

    with pytest.raises(ModelError, match=r"model\.layers\.1\.self_attn\.o_proj is the first in model\.layers\.1\n"):
        applied(Gptq(group_size=16), too_large)


def test_what_reaches_the_first_block_broken_is_not_blamed_on_it() -> None:
    def no_embedding(network: Any) -> None:
        network.model.embed_tokens.weight[:, 3] = torch.nan

    with pytest.raises(ModelError, match=r"what comes into model\.layers\.0 is so already"):
        applied(Gptq(group_size=16), nothing, later=no_embedding)


def test_inputs_that_only_some_samples_break_are_an_error_before_their_block_is_solved() -> None:
    candidate, model, context = opened(nothing)
    with torch.no_grad():
        candidate.module.get_parameter("model.embed_tokens.weight")[7] = torch.inf
    samples = [np.where(batch.inputs["input_ids"] == 7, 8, batch.inputs["input_ids"]) for batch in context.calibration]
    samples[6][0, 3] = 7  # the gate looks at the first four
    calibration = [Batch({"input_ids": ids}, np.array([index])) for index, ids in enumerate(samples)]
    with pytest.raises(ModelError, match=r"32 of 32 inputs of model\.layers\.0\.self_attn\.q_proj are NaN or infinite"):
        Gptq(group_size=16).apply(candidate, model, replace(context, calibration=calibration))


class Damped(Gptq):
    """Plain rounding that spoils a block, or what is outside of blocks, unless damping was raised."""

    name: ClassVar[str] = "damped"
    spoil: str = ""

    def solve(self, block: Block) -> None:
        for parameter, codes in self.plain_codes(block).items():
            spoilt = block.name == self.spoil and self.damping < 0.05
            block.set_quantized(parameter, replace(codes, codes=-codes.codes) if spoilt else codes)


def test_a_block_that_comes_out_worse_is_solved_with_more_damping_first() -> None:
    found = applied(Damped(group_size=16, spoil="model.layers.1"), nothing)
    plain = plainly(nothing)
    assert all(same_codes(found, plain, name) for name in found.quantized)
    (told,) = found.fallbacks
    assert told.startswith("model.layers.1: damped gave ")
    assert "with ten times the damping" in told


def test_a_layer_outside_of_blocks_that_comes_out_worse_is_rounded_plainly() -> None:
    found = applied(Damped(group_size=16, spoil="layers outside of blocks"), nothing)
    assert same_codes(found, plainly(nothing), "lm_head.weight")
    (told,) = found.fallbacks
    assert told.startswith("layers outside of blocks: lm_head.weight: damped gave ")
    assert told.endswith("so it was rounded plainly")


def test_the_error_of_a_layer_counts_what_its_bias_takes() -> None:
    torch.manual_seed(0)
    weight, inputs = torch.randn(6, 16), [torch.randn(20, 16) + 2, torch.randn(9, 16) + 2]
    codes = quantize_weight(weight, QuantSpec(bits=3))
    change = codes.dequantize() - weight
    x_tI = torch.cat(inputs)
    shift_O = -(x_tI @ change.t()).mean(0)
    wanted = [(x_tI @ change.t() + shift).square().sum() / (x_tI @ weight.t()).square().sum() for shift in (0, shift_O)]
    found = [layer_error(ALONE, inputs, weight, codes, shift) for shift in (None, shift_O)]
    assert found == pytest.approx([float(share) for share in wanted], rel=1e-5)
    assert found[1] < found[0]


def holds_8(layer: LayerInfo, spec: QuantSpec) -> bool:
    del layer
    return spec.bits == 8


def error_behind(candidate: Candidate, change: Change) -> float:
    """Return the squared error of the logits of a candidate as a share of the original's."""
    original, _, context = opened(change)
    ids = torch.from_numpy(context.calibration[0].inputs["input_ids"])
    with torch.no_grad():
        wanted, found = (one.module(ids).logits for one in (original, candidate))
    return float((found - wanted).square().sum() / wanted.square().sum())


def test_where_plain_rounding_is_far_beyond_what_was_expected_grids_are_widened(tmp_path: Path) -> None:
    assert applied(Gptq(group_size=16), two_that_cancel, holds=holds_8).fallbacks == []  # which makes up for that
    step = Damped(group_size=16)
    narrow = applied(step, two_that_cancel)
    assert narrow.widened == {}  # this runtime holds no other
    assert any(note.startswith("model.layers.0: warning: error ") for note in narrow.fallbacks)
    assert all("widened" not in note for note in applied(step, nothing, holds=holds_8).fallbacks)
    found = []
    for _ in range(2):  # the second time everything is read from the run folder
        with Run(tmp_path / "run", {"verb": "test"}) as run:
            candidate, model, context = opened(two_that_cancel, run)
            found.append(step.apply(candidate, model, replace(context, holds=holds_8)))
            noted = [entry for entry in run.journal() if entry["event"] == "fallback"]
    wide = {name: codes.spec.bits for name, codes in found[0].quantized.items()}
    assert {bits for name, bits in wide.items() if "layers.0" in name} == {8}
    assert {bits for name, bits in wide.items() if "lm_head" in name} == {4}
    assert {name for name, bits in wide.items() if bits == 8} == set(found[0].widened)
    assert found[1].widened == found[0].widened
    assert found[1].fallbacks == found[0].fallbacks
    assert len(noted) == len(found[0].fallbacks)
    assert any("so its grids were widened from int4" in note for note in found[0].fallbacks)
    assert error_behind(found[0], two_that_cancel) < error_behind(narrow, two_that_cancel)


def test_the_next_width_is_one_that_the_files_hold() -> None:
    layer = LayerInfo(name="up", kind="linear", role="up", shape=(8, 8), num_parameters=64)
    spec = QuantSpec(bits=4)
    assert wider(spec, layer, lambda _, held: held.bits in (2, 8)) == QuantSpec(bits=8)
    assert wider(spec, layer, lambda _, held: held.bits < 4) is None
    assert wider(QuantSpec(bits=8), layer, lambda *_: True) is None
    assert wider(QuantSpec(format="fp8", bits=8), layer, lambda *_: True) is None
    assert wider(spec, replace(layer, experts="moe"), lambda *_: True) is None


def test_what_is_expected_is_the_error_in_front_and_that_of_the_weights() -> None:
    weight = torch.randn(8, 32)
    codes = quantize_weight(weight, QuantSpec(bits=4))
    change = codes.dequantize() - weight
    assert weight_error(weight, codes) == pytest.approx(float(change.square().sum() / weight.square().sum()), rel=1e-4)
    assert expected_error(0.25, [0.5]) == 0.75
    assert expected_error(0.0, []) is None
    assert Found(0.5, 0.5, 0.6 / JUMP).beyond_expected is False
    assert Found(0.5, 0.5, 0.4 / JUMP).beyond_expected
    assert Found(1e-5, None, 1e-12).beyond_expected is False  # nothing sees so small an error
    assert Found(float("nan"), None, None).beyond_plain


def test_a_technique_without_plain_rounding_says_that_it_failed() -> None:
    class Spoiling(Sparsify):
        def solve(self, block: Block) -> None:
            for parameter in block.decisions:
                block.set_weight(parameter, block.weight(parameter) * torch.nan)

    with pytest.raises(TechniqueError, match=r"the outputs of model\.layers\.0 are not finite after sparsify"):
        applied(Spoiling(), nothing)
