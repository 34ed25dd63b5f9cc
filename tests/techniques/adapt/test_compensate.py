"""`compensate` on tiny language models: nearer to the original than codes alone, by the optimum of its own equation."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from gossamer.errors import RecipeError, TechniqueError
from gossamer.models.adapters import adapters_of
from gossamer.models.candidate import Candidate
from gossamer.run.workspace import Run
from gossamer.techniques.adapt.compensate import Compensate
from gossamer.techniques.base import Context
from gossamer.techniques.quantize.calibrated import Gptq
from gossamer.techniques.quantize.quantize import Quantize

TINY = runpy.run_path(str(Path(__file__).parents[1] / "tiny_candidates.py"))
logits, opened, carried_out = TINY["logits"], TINY["opened"], TINY["carried_out"]
SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 32,
}  # fmt: skip
THREE_BITS: dict[str, Any] = {"bits": 3, "group_size": 16}


def llama(bias: bool = False) -> torch.nn.Module:
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES)) if bias else LlamaForCausalLM(LlamaConfig(**SIZES))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(4) if parameter.ndim > 1 else None
            parameter.normal_() if name.endswith("bias") else None
    return model.eval()


def divergence(candidate: Candidate, context: Context, network: torch.nn.Module) -> float:
    total = 0.0
    for row in context.calibration:
        inputs = {"input_ids": torch.from_numpy(row.inputs["input_ids"])}
        with torch.no_grad():
            p, q = (logits(module, inputs).log_softmax(-1) for module in (network, candidate.module))
        total += float((p.exp() * (p - q)).sum(-1).mean())
    return total / len(context.calibration)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rounding", [Gptq, Quantize])
def test_outputs_come_nearer_and_codes_stay(rounding: Any, bias: bool) -> None:
    network = llama(bias)
    candidate, model, context = opened(network)
    candidate = rounding.model_validate({**THREE_BITS, "targets": ["linear"], "ignore": ["lm_head"]}).apply(
        candidate, model, context
    )
    before, codes = divergence(candidate, context, network), {n: q.codes for n, q in candidate.quantized.items()}
    step = Compensate.model_validate({"rank": 8})
    candidate = step.apply(candidate, model, context)
    assert divergence(candidate, context, network) < 0.7 * before
    assert all(torch.equal(candidate.quantized[name].codes, found) for name, found in codes.items())
    layers = dict(adapters_of(candidate.module))
    assert {f"{name}.weight" for name in layers} == set(codes)
    after = step.after(model)
    thin = {layer.name: layer.shape for layer in after.layers if layer.role == "adapter"}
    held = {n: tuple(p.shape) for n, p in candidate.module.named_parameters() if ".lora_" in n}
    assert {f"{name}.weight": shape for name, shape in thin.items()} == held
    assert after.num_parameters - model.num_parameters == sum(a * b for a, b in held.values())
    for parameter in candidate.module.parameters():
        if parameter.ndim == 2 and min(parameter.shape) == 8:
            assert torch.equal(parameter.half().float(), parameter)


def test_the_first_layer_has_the_optimum() -> None:
    """Of all corrections of its rank: the rest of the error is the tail of the singular values, seen by its input."""
    network = llama()
    candidate, model, context = opened(network)
    name = "model.layers.0.self_attn.q_proj"
    candidate = Quantize.model_validate({**THREE_BITS, "targets": [name]}).apply(candidate, model, context)
    codes = candidate.quantized[f"{name}.weight"].dequantize()
    settings = {"rank": 4, "targets": [name], "damping": 1e-9, "calibration_dtype": "float32"}
    candidate = Compensate.model_validate(settings).apply(candidate, model, context)
    rows: list[torch.Tensor] = []
    hook = network.get_submodule(name).register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0][0]))
    for row in context.calibration:
        with torch.no_grad():
            network(input_ids=torch.from_numpy(row.inputs["input_ids"]))
    hook.remove()
    inputs_NI = torch.cat(rows).double()
    error_NO = inputs_NI @ (network.get_submodule(name).weight.detach().double() - codes.double()).t()
    layer = dict(adapters_of(candidate.module))[name].requires_grad_(False)
    fixed_NO = inputs_NI @ (layer.lora_B.weight.double() @ layer.lora_A.weight.double()).t()
    tail = torch.linalg.svdvals(error_NO)[4:].square().sum()
    assert float((error_NO - fixed_NO).square().sum()) == pytest.approx(float(tail), rel=2e-3)


def test_it_goes_on_from_a_run_and_names_what_does_not_fit(tmp_path: Path) -> None:
    found = []
    entries = [("quantize", {**THREE_BITS, "ignore": ["lm_head"]}), ("compensate", {"rank": 4})]
    for _ in range(2):
        with Run(tmp_path / "run", {"verb": "test"}) as run:
            candidate, model, context = opened(llama(), run=run, identity={"model": "tiny"})
            candidate, _, _ = carried_out(candidate, model, context, entries)
        found.append({name: values.clone() for name, values in candidate.module.named_parameters()})
    assert all(torch.equal(found[1][name], values) for name, values in found[0].items())
    candidate, model, context = opened(llama())
    with pytest.raises(TechniqueError, match="14 of 14 layers were not rounded"):
        Compensate.model_validate({}).apply(candidate, model, context)
    with pytest.raises(RecipeError, match="rank 40 beside"):
        Compensate.model_validate({"rank": 40}).resolve(model)
    with pytest.raises(RecipeError, match="matches none"):
        Compensate.model_validate({"targets": ["nowhere"]}).resolve(model)
