"""Rotating the stream of tiny models changes their weights and not what they compute; others are refused and whole."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from gossamer.errors import RecipeError, TechniqueError
from gossamer.recipe import Recipe, Step
from gossamer.techniques.quantize.quantize import Quantize
from gossamer.techniques.quantize.rotate import Rotate
from gossamer.techniques.registry import resolve

tiny = runpy.run_path(str(Path(__file__).parent / "test_calibrated.py"))
SIZES, bert, opened, logits = (tiny[name] for name in ("SIZES", "bert", "opened", "logits"))


def llama(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    chosen = {**SIZES, "num_key_value_heads": 2, "tie_word_embeddings": False, "mlp_bias": True} | settings
    return uneven(hf.LlamaForCausalLM(hf.LlamaConfig(**chosen)).eval())


def gemma() -> nn.Module:
    torch.manual_seed(0)
    chosen = {**SIZES, "num_key_value_heads": 1, "head_dim": 8, "tie_word_embeddings": False}
    return uneven(hf.GemmaForCausalLM(hf.GemmaConfig(**chosen)).eval())


def qwen3() -> nn.Module:
    torch.manual_seed(0)
    chosen = {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": False}
    return uneven(hf.Qwen3ForCausalLM(hf.Qwen3Config(**chosen)).eval())


def uneven(network: nn.Module) -> nn.Module:
    """Give every norm weights of its own and every bias a value, and make two channels of the stream loud."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, values in network.named_parameters():
            if values.dim() == 1:
                values.add_(torch.rand(values.shape, generator=draw))
            if name.endswith(("embed_tokens.weight", "lm_head.weight")):
                values[:, [3, 17]] *= 10
    return network


def ids() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(1, 64, (2, 16), generator=torch.Generator().manual_seed(2))}


@pytest.mark.parametrize("family", [llama, gemma, qwen3], ids=lambda family: family.__name__)
def test_a_rotated_model_computes_the_same_and_its_norms_are_plain(family: Callable[[], nn.Module]) -> None:
    network = family()
    candidate, model, context = opened(network)
    found = Rotate().apply(candidate, model, context).module
    with torch.no_grad():
        wanted = logits(network, ids())
        torch.testing.assert_close(logits(found, ids()), wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
    before, after = dict(network.named_parameters()), dict(found.named_parameters())
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert all("q_norm" in name or "k_norm" in name or name.endswith("bias") for name in same)
    for name, values in after.items():
        if "layernorm" in name or name == "model.norm.weight":
            assert bool((values == (0 if family is gemma else 1)).all())
    table = found.model.embed_tokens.weight.detach()
    size = table.abs().amax(0) / table.abs().amax(0).mean()
    assert float(size.max()) < 2  # the loud channels are spread over all of them
    assert candidate.applied == [{"rotate": {}}]


def test_seeds_give_different_weights() -> None:
    found = []
    for seed in (0, 0, 1):
        candidate, model, context = opened(llama())
        found.append(Rotate(seed=seed).apply(candidate, model, context).module.model.embed_tokens.weight)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_a_tied_model_is_rotated_where_the_last_norm_has_one_factor() -> None:
    network = llama(tie_word_embeddings=True)
    with torch.no_grad():
        network.model.norm.weight.fill_(1.7)
    candidate, model, context = opened(network)
    found = Rotate().apply(candidate, model, context).module
    assert found.lm_head.weight is found.model.embed_tokens.weight
    with torch.no_grad():
        torch.testing.assert_close(logits(found, ids()), logits(network, ids()), rtol=1e-3, atol=1e-3)
    assert not torch.equal(found.lm_head.weight, network.lm_head.weight)


def refused(network: nn.Module, words: str) -> None:
    candidate, model, context = opened(network)
    before = {name: values.clone() for name, values in candidate.module.named_parameters()}
    with pytest.raises(TechniqueError, match=words):
        Rotate().apply(candidate, model, context)
    assert all(torch.equal(values, before[name]) for name, values in candidate.module.named_parameters())


def test_other_models_are_refused_and_left_as_they_were() -> None:
    refused(llama(tie_word_embeddings=True), "head shares the embedding's weight, and model.norm .* factors from")
    refused(bert(), "writes the residual stream and is no linear|takes the mean away")
    torch.manual_seed(0)
    settings = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 32}
    refused(hf.GPT2LMHeadModel(hf.GPT2Config(**settings)).eval(), "takes the mean away")


def test_a_stream_that_is_also_read_channel_by_channel_is_put_back() -> None:
    class Gated(nn.Module):
        """Stand around a block and multiply its output by a vector that no layer owns."""

        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block
            self.gain = nn.Parameter(torch.linspace(0.5, 2, 32))
            self.attention_type = getattr(block, "attention_type", None)

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.block(*args, **kwargs) * self.gain

    network = llama()
    network.model.layers[0] = Gated(network.model.layers[0])
    refused(network, "outputs change by")


def test_rounded_models_are_refused() -> None:
    candidate, model, context = opened(llama())
    Quantize(bits=4).apply(candidate, model, context)
    with pytest.raises(TechniqueError, match="rounded by an earlier step"):
        Rotate().apply(candidate, model, context)


def test_rotating_stands_before_what_rounds() -> None:
    steps = (Step(technique="rotate", settings={"seed": 1}), Step(technique="gptq", settings={"bits": 4}))
    assert [step.name for step in resolve(Recipe(steps=steps))] == ["rotate", "gptq"]
    with pytest.raises(RecipeError, match="must come after"):
        resolve(Recipe(steps=steps[::-1]))
