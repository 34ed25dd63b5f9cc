from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from gossamer.errors import RecipeError, TechniqueError
from gossamer.models.candidate import Candidate
from gossamer.models.quantized import ActivationSpec, QuantSpec
from gossamer.models.roles import ModelMap
from gossamer.models.source import Source
from gossamer.models.structure import map_model
from gossamer.run.progress import Silent
from gossamer.runtimes import get_runtime
from gossamer.tasks import get_task
from gossamer.tasks.base import Batch, Task
from gossamer.techniques.base import Context, SearchSpace
from gossamer.techniques.quantize.grid import quantize_weight
from gossamer.techniques.quantize.quantize import Quantize

CLASSIFY, SPEAK = get_task("text-classification"), get_task("causal-lm")


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=32, initializer_range=0.2, attn_implementation="eager",
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=32, tie_word_embeddings=True, initializer_range=0.2,
        attn_implementation="eager",
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def batches(count: int) -> list[Batch]:
    draw = np.random.default_rng(0)
    rows = [draw.integers(1, 60, (1, int(draw.integers(4, 12)))) for _ in range(count)]
    return [
        Batch({"input_ids": ids, "attention_mask": np.ones_like(ids)}, np.array([index]))
        for index, ids in enumerate(rows)
    ]


def opened(network: nn.Module, task: Task = CLASSIFY, rows: int = 8) -> tuple[Candidate, ModelMap, Context]:
    """Return a model as a candidate, its map, and a context with calibration rows."""
    calibration = batches(rows)
    example = batches(1)[0].inputs
    tensors = {name: torch.from_numpy(values) for name, values in example.items()}
    source = Source.open(network, forward=lambda module, inputs: module(**inputs).logits)
    candidate = Candidate(source=source, module=source.module(task))
    context = Context(task=task, example=example, calibration=calibration, progress=Silent())
    return candidate, map_model(candidate.module, tensors, source.forward), context


def decided(steps: Sequence[Quantize], model: ModelMap) -> dict[str, str]:
    return {
        decision.parameter: " ".join(str(part) for part in (decision.weight, decision.activation) if part)
        for step in steps
        for decision in step.resolve(model)
    }


BERT_LINEAR = [
    *(
        f"bert.encoder.layer.{block}.{name}.weight"
        for block in range(2)
        for name in (
            *(f"attention.self.{part}" for part in ("query", "key", "value")),
            *("attention.output.dense", "intermediate.dense", "output.dense"),
        )
    ),
    "bert.pooler.dense.weight",
    "classifier.weight",
]


def test_the_table_names_every_linear_layer_once_in_order() -> None:
    _, model, _ = opened(bert())
    assert list(decided([Quantize()], model)) == BERT_LINEAR
    assert set(decided([Quantize()], model).values()) == {"int8 symmetric per channel"}
    dynamic = decided([Quantize(activations="dynamic")], model)
    assert set(dynamic.values()) == {"int8 symmetric per channel uint8 dynamic per tensor"}


def test_ignored_layers_are_left_out_by_role_name_and_pattern() -> None:
    _, model, _ = opened(bert())
    step = Quantize(bits=4, symmetric=False, group_size=16, ignore=("classifier", "pooler.dense", "*.layer.0.*"))
    table = decided([step], model)
    assert list(table) == [name for name in BERT_LINEAR if ".layer.1." in name]
    assert set(table.values()) == {"int4 asymmetric group 16"}


def test_embeddings_are_rounded_when_named_and_their_inputs_are_not() -> None:
    _, model, _ = opened(bert())
    table = decided([Quantize(targets=("embedding",), activations="dynamic")], model)
    names = ("word", "position", "token_type")
    assert table == {f"bert.embeddings.{name}_embeddings.weight": "int8 symmetric per channel" for name in names}


def test_a_tied_head_follows_its_embedding() -> None:
    candidate, model, context = opened(llama(), SPEAK)
    assert "lm_head.weight" not in decided([Quantize()], model)
    assert "model.embed_tokens.weight" not in decided([Quantize()], model)
    step = Quantize(bits=4, group_size=16, targets=("embedding",))
    assert list(decided([step], model)) == ["model.embed_tokens.weight"]
    candidate = step.apply(candidate, model, context)
    assert list(candidate.quantized) == ["model.embed_tokens.weight"]
    head, embedding = (candidate.module.get_parameter(f"{name}.weight") for name in ("lm_head", "model.embed_tokens"))
    assert head.data_ptr() == embedding.data_ptr()
    assert torch.equal(head, candidate.quantized["model.embed_tokens.weight"].dequantize())


def test_a_tied_head_named_alone_means_the_shared_weight() -> None:
    _, model, _ = opened(llama(), SPEAK)
    assert list(decided([Quantize(targets=("lm_head",))], model)) == ["model.embed_tokens.weight"]


def test_a_pattern_that_matches_nothing_is_an_error_with_what_comes_close() -> None:
    _, model, _ = opened(bert())
    with pytest.raises(RecipeError, match="ignore: 'clasifier' matches none of") as caught:
        Quantize(ignore=("clasifier",)).resolve(model)
    assert "classifier" in caught.value.hint
    with pytest.raises(RecipeError, match="targets: 'convolution' matches none"):
        Quantize(targets=("convolution",)).resolve(model)
    with pytest.raises(RecipeError, match="all ignored or tied"):
        Quantize(ignore=("linear",)).resolve(model)


def test_a_group_that_does_not_divide_says_both_numbers_and_the_remedy() -> None:
    _, model, _ = opened(bert())
    with pytest.raises(TechniqueError) as caught:
        Quantize(bits=4, group_size=32).resolve(model)
    assert "group_size 32 does not divide in_features 48 of bert.encoder.layer.0.output.dense" in caught.value.message
    assert caught.value.hint == "use group_size 16, or name the layer under `ignore`"
    assert len(Quantize(bits=4, group_size=16, targets=("down",)).resolve(model)) == 2


@pytest.mark.parametrize("settings", [{"bits": 4}, {"symmetric": False}, {"group_size": 16}])
def test_rounded_inputs_want_weights_that_integer_kernels_take(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="needs weights of 8 or 7 bits, symmetric, one scale a channel"):
        Quantize(activations="dynamic", **settings)


def test_weights_become_the_codes_of_their_own_grid_and_the_rest_stays() -> None:
    candidate, model, context = opened(bert())
    before = {name: values.clone() for name, values in candidate.module.named_parameters()}
    step = Quantize(bits=4, symmetric=False, group_size=16, ignore=("classifier",))
    candidate = step.apply(candidate, model, context)
    spec = QuantSpec(bits=4, symmetric=False, group_size=16)
    for name, values in candidate.module.named_parameters():
        if name in BERT_LINEAR[:-1]:
            codes = quantize_weight(before[name], spec, scale="mse")
            assert torch.equal(candidate.quantized[name].codes, codes.codes)
            assert torch.equal(values, codes.dequantize())
            assert not torch.equal(values, before[name])
        else:
            assert torch.equal(values, before[name]), name
    assert sorted(candidate.quantized) == sorted(BERT_LINEAR[:-1])
    assert candidate.applied == [step.entry()]


def test_a_parameter_is_rounded_once_only() -> None:
    candidate, model, context = opened(bert())
    candidate = Quantize(targets=("q", "k")).apply(candidate, model, context)
    with pytest.raises(TechniqueError, match="4 parameters were rounded by an earlier step") as caught:
        Quantize(bits=4).apply(candidate, model, context)
    assert "ignore" in caught.value.hint
    Quantize(bits=4, ignore=("q", "k")).apply(candidate, model, context)
    assert {codes.spec.bits for codes in candidate.quantized.values()} == {8, 4}


def test_static_ranges_need_rows() -> None:
    candidate, model, context = opened(bert(), rows=7)
    step = Quantize(activations="static")
    assert (step.rows_needed(), Quantize().rows_needed(), Quantize(activations="dynamic").rows_needed()) == (8, 0, 0)
    with pytest.raises(TechniqueError, match="need 8 calibration rows, 7 were given"):
        step.apply(candidate, model, context)


def test_static_ranges_are_what_the_layers_saw() -> None:
    candidate, model, context = opened(bert())
    seen: dict[str, list[float]] = {}

    def note(name: str) -> Any:
        return lambda _, inputs: seen.setdefault(name, []).extend([float(inputs[0].min()), float(inputs[0].max())])

    names = [name.removesuffix(".weight") for name in BERT_LINEAR]
    original = bert()
    for name in names:
        original.get_submodule(name).register_forward_pre_hook(note(name))
    with torch.no_grad():
        for batch in context.calibration:
            original(**{name: torch.from_numpy(values) for name, values in batch.inputs.items()})
    candidate = Quantize(activations="static", observer="minmax").apply(candidate, model, context)
    assert sorted(candidate.activations) == sorted(names)
    for name in names:
        found = candidate.activations[name]
        assert found.low == pytest.approx(min(0.0, *seen[name]), abs=1e-5)
        assert found.high == pytest.approx(max(0.0, *seen[name]), abs=1e-5)


def slow_round(values: Tensor, spec: ActivationSpec) -> Tensor:
    """Round to uint8 as ONNX DynamicQuantizeLinear and QuantizeLinear define it, in numpy."""
    x = values.numpy()
    low, high = (spec.low, spec.high) if spec.kind == "static" else (x.min(), x.max())
    low, high = min(0.0, float(low or 0)), max(0.0, float(high or 0))
    scale = np.float32((high - low) / 255)
    zero = np.clip(np.round(-low / scale), 0, 255)
    codes = np.clip(np.round(x / scale) + zero, 0, 255)
    return torch.from_numpy(((codes - zero) * scale).astype(np.float32))


def slow_bert(candidate: Candidate, original: nn.Module, ids: Tensor) -> Tensor:
    """Return the logits of a quantized tiny BERT, written out: every linear layer as codes times rounded inputs."""
    hidden_size, num_heads = 32, 2
    state = original.state_dict()

    def layer_norm(x: Tensor, name: str) -> Tensor:
        return functional.layer_norm(x, (hidden_size,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-12)

    def linear(x: Tensor, name: str) -> Tensor:
        codes = candidate.quantized[f"{name}.weight"]
        weight = codes.codes.float() * codes.scale  # symmetric, one scale a row
        if name in candidate.activations:
            x = slow_round(x, candidate.activations[name])
        return functional.linear(x, weight, state[f"{name}.bias"])

    embeddings = "bert.embeddings"
    positions = torch.arange(ids.shape[1])
    x = (
        state[f"{embeddings}.word_embeddings.weight"][ids]
        + state[f"{embeddings}.position_embeddings.weight"][positions]
    )
    x = layer_norm(x + state[f"{embeddings}.token_type_embeddings.weight"][0], f"{embeddings}.LayerNorm")
    for block in (f"bert.encoder.layer.{index}" for index in range(2)):
        q, k, v = (
            linear(x, f"{block}.attention.self.{part}").view(1, -1, num_heads, hidden_size // num_heads).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        weights = torch.softmax(q @ k.transpose(-1, -2) / (hidden_size // num_heads) ** 0.5, dim=-1)
        mixed = (weights @ v).transpose(1, 2).reshape(1, -1, hidden_size)
        out = linear(mixed, f"{block}.attention.output.dense")
        x = layer_norm(x + out, f"{block}.attention.output.LayerNorm")
        inner = functional.gelu(linear(x, f"{block}.intermediate.dense"))
        x = layer_norm(x + linear(inner, f"{block}.output.dense"), f"{block}.output.LayerNorm")
    return linear(torch.tanh(linear(x[:, 0], "bert.pooler.dense")), "classifier")


@pytest.mark.parametrize("activations", ["none", "dynamic", "static"])
def test_simulated_computes_what_the_rounding_written_out_computes(activations: Any) -> None:
    candidate, model, context = opened(bert())
    candidate = Quantize(activations=activations).apply(candidate, model, context)
    original = bert()
    change = 0.0
    with candidate.simulated() as module, torch.no_grad():
        for batch in batches(4):
            ids = torch.from_numpy(batch.inputs["input_ids"])
            found = module(input_ids=ids).logits
            # a value between two codes may fall to either side: a step of one input, not more
            torch.testing.assert_close(found, slow_bert(candidate, original, ids), rtol=1e-3, atol=2e-3)
            change = max(change, float((found - original(input_ids=ids).logits).abs().max()))
    assert change > 4e-3  # rounding is seen: the comparison above would notice if it were left out
    inputs = {"input_ids": torch.from_numpy(batches(1)[0].inputs["input_ids"])}
    with torch.no_grad():
        after = candidate.module(**inputs).logits
        with candidate.simulated() as module:
            inside = module(**inputs).logits
    assert torch.equal(after, inside) == (activations == "none")  # the grids last as long as the `with`


class ConvNet(nn.Module):
    """Convolution, batch norm, pooling, a linear classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.classifier = nn.Linear(8, 4)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.classifier(torch.relu(self.norm(self.conv(pixel_values))).mean((2, 3)))


def test_batch_norms_are_folded_before_convolutions_are_rounded() -> None:
    torch.manual_seed(0)
    network = ConvNet().eval()
    with torch.no_grad():
        for values in (network.norm.weight, network.norm.running_var):
            values.uniform_(0.2, 3.0)
        network.norm.running_mean.normal_()
    pixels = np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)
    source = Source.open(network, forward=lambda module, inputs: module(**inputs))
    task = get_task("image-classification")
    candidate = Candidate(source=source, module=source.module(task))
    tensors = {"pixel_values": torch.from_numpy(pixels)}
    model = map_model(candidate.module, tensors, source.forward)
    context = Context(task=task, example={"pixel_values": pixels}, calibration=[], progress=Silent())
    candidate = Quantize().apply(candidate, model, context)
    factor = network.norm.weight / torch.sqrt(network.norm.running_var + network.norm.eps)
    folded = (network.conv.weight * factor[:, None, None, None]).detach()
    expected = quantize_weight(folded, QuantSpec(bits=8), scale="mse")
    torch.testing.assert_close(candidate.quantized["conv.weight"].scale, expected.scale)
    torch.testing.assert_close(candidate.module.get_parameter("conv.weight").data, expected.dequantize())
    assert candidate.module.get_submodule("norm").weight.tolist() == [1.0] * 8
    with torch.no_grad():
        torch.testing.assert_close(
            candidate.module(**tensors), network(**tensors), atol=0.05, rtol=0.05
        )  # 8 bits change little


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
@pytest.mark.parametrize(("network", "task"), [(bert, CLASSIFY), (llama, SPEAK)], ids=["bert", "llama"])
def test_what_is_proposed_is_held_by_the_runtime_and_divides(network: Any, task: Task, runtime: str) -> None:
    _, model, _ = opened(network(), task)
    space = SearchSpace(model=model, runtime=get_runtime(runtime), task=task, calibration_rows=32)
    proposals = list(Quantize.candidates(space))
    assert len(proposals) == len(set(proposals)) > 10
    for steps in proposals:
        parameters = [decision.parameter for step in steps for decision in step.resolve(model)]
        assert len(parameters) == len(set(parameters))
        for step in steps:
            for decision in step.resolve(model):
                layer, weight = decision.layer, decision.weight
                assert weight is not None
                assert space.runtime.refusal(layer.role, layer.shape, weight, decision.activation) is None
                assert weight.group_size is None or layer.shape[1] % weight.group_size == 0
    kinds = {step.activations for steps in proposals for step in steps}
    assert kinds == {"none", "dynamic", "static"}
    assert {step.bits for steps in proposals for step in steps} >= {8, 4}
    assert any("embedding" in step.targets for steps in proposals for step in steps)


def test_no_static_recipe_is_proposed_without_rows() -> None:
    _, model, _ = opened(bert())
    space = SearchSpace(model=model, runtime=get_runtime("onnxruntime"), task=CLASSIFY, calibration_rows=7)
    assert {step.activations for steps in Quantize.candidates(space) for step in steps} == {"none", "dynamic"}


def test_a_folder_and_a_network_in_memory_resolve_alike(tmp_path: Path) -> None:
    network = bert()
    network.save_pretrained(tmp_path)  # type: ignore[operator]
    source = Source.open(tmp_path)
    inputs = {name: torch.from_numpy(values) for name, values in batches(1)[0].inputs.items()}
    from_folder = map_model(source.module(CLASSIFY), inputs, source.forward)
    _, in_memory, _ = opened(network)
    assert decided([Quantize()], from_folder) == decided([Quantize()], in_memory)
