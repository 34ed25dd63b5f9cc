"""Structure is shown on tiny random models of many families; no test names an architecture to the code under test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gossamer.errors import ModelError
from gossamer.models.example import made_up_example
from gossamer.models.roles import ModelMap
from gossamer.models.structure import layer_kind, map_model

TEXT: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 99,
}  # fmt: skip
VISION = {name: value for name, value in TEXT.items() if name != "vocab_size"} | {"image_size": 32, "patch_size": 8}
SPEECH: dict[str, Any] = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "vocab_size": 99,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
}  # fmt: skip


def bert() -> nn.Module:
    return hf.BertForSequenceClassification(hf.BertConfig(num_labels=3, **TEXT))


def distilbert() -> nn.Module:
    config = hf.DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=64, vocab_size=99, num_labels=3)
    return hf.DistilBertForSequenceClassification(config)


def llama() -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(num_key_value_heads=2, tie_word_embeddings=True, **TEXT))


def qwen3() -> nn.Module:
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(num_key_value_heads=2, head_dim=8, **TEXT))


def phi3() -> nn.Module:
    return hf.Phi3ForCausalLM(hf.Phi3Config(pad_token_id=0, eos_token_id=1, **TEXT))


def gpt2() -> nn.Module:
    return hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=99, n_positions=64))


def t5() -> nn.Module:
    config = hf.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=99)
    return hf.T5ForConditionalGeneration(config)


def whisper() -> nn.Module:
    config = hf.WhisperConfig(
        num_mel_bins=8, max_source_positions=20, max_target_positions=32, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1, **SPEECH,
    )  # fmt: skip
    return hf.WhisperForConditionalGeneration(config)


def vit() -> nn.Module:
    return hf.ViTForImageClassification(hf.ViTConfig(num_labels=3, **VISION))


def resnet() -> nn.Module:
    config = hf.ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 32], depths=[2, 3], layer_type="basic", image_size=32, num_labels=3
    )
    return hf.ResNetForImageClassification(config)


ATTENTION = {"q": 2, "k": 2, "v": 2, "o": 2}
PLAIN = {"up": 2, "down": 2}
GATED = {"gate": 2, "up": 2, "down": 2}
FAMILIES: dict[Callable[[], nn.Module], tuple[dict[str, int], dict[str, int]]] = {
    bert: (
        {**ATTENTION, **PLAIN, "embedding": 3, "norm": 5, "linear": 1, "classifier": 1},
        {"bert.encoder.layer": 2},
    ),
    distilbert: (
        {**ATTENTION, **PLAIN, "embedding": 2, "norm": 5, "linear": 1, "classifier": 1},
        {"distilbert.transformer.layer": 2},
    ),
    llama: ({**ATTENTION, **GATED, "embedding": 1, "norm": 5, "head": 1}, {"model.layers": 2}),
    qwen3: ({**ATTENTION, **GATED, "embedding": 1, "norm": 9, "head": 1}, {"model.layers": 2}),
    phi3: ({"qkv": 2, "o": 2, **PLAIN, "embedding": 1, "norm": 5, "head": 1}, {"model.layers": 2}),
    gpt2: ({"qkv": 2, "o": 2, **PLAIN, "embedding": 2, "norm": 5, "head": 1}, {"transformer.h": 2}),
    t5: (
        {"q": 6, "k": 6, "v": 6, "o": 6, "up": 4, "down": 4, "embedding": 5, "norm": 12, "head": 1},
        {"encoder.block": 2, "decoder.block": 2},
    ),
    whisper: (
        {
            "q": 6,
            "k": 6,
            "v": 6,
            "o": 6,
            "up": 4,
            "down": 4,
            "embedding": 2,
            "positions": 1,
            "norm": 12,
            "convolution": 2,
            "head": 1,
        },
        {"model.encoder.layers": 2, "model.decoder.layers": 2},
    ),
    vit: ({**ATTENTION, **PLAIN, "norm": 5, "convolution": 1, "other": 1, "classifier": 1}, {"vit.layers": 2}),
    resnet: (
        {"convolution": 13, "norm": 13, "classifier": 1},
        {"resnet.encoder.stages.0.layers": 2, "resnet.encoder.stages.1.layers": 3},
    ),
}


def count_roles(model: ModelMap) -> dict[str, int]:
    roles = [layer.role for layer in model.layers]
    return {role: roles.count(role) for role in sorted(set(roles))}


@pytest.fixture(scope="module", params=list(FAMILIES), ids=lambda family: family.__name__)
def family(request: pytest.FixtureRequest) -> tuple[nn.Module, ModelMap, dict[str, int], dict[str, int]]:
    torch.manual_seed(0)
    module = request.param().eval()
    module.set_attn_implementation("eager")
    return module, map_model(module, made_up_example(module)), *FAMILIES[request.param]


Family = tuple[nn.Module, ModelMap, dict[str, int], dict[str, int]]


def test_every_layer_finds_its_role(family: Family) -> None:
    _, model, roles, _ = family
    assert count_roles(model) == dict(sorted(roles.items()))


def test_stacks_of_like_blocks_are_found(family: Family) -> None:
    module, model, _, stacks = family
    assert {stack.name: stack.num_blocks for stack in model.stacks} == stacks
    for layer in model.layers:
        if layer.stack is not None:
            assert f"{layer.stack}.{layer.block}.{layer.path}" == layer.name
            module.get_submodule(layer.name)


def test_parameters_and_bytes_count_tied_tensors_once(family: Family) -> None:
    module, model, _, _ = family
    distinct = {tensor.data_ptr(): tensor.numel() for tensor in module.parameters()}
    assert model.num_parameters == sum(distinct.values()) == sum(layer.num_parameters for layer in model.layers)
    assert model.num_bytes == 4 * model.num_parameters


def test_macs_agree_with_torchs_own_counter(family: Family) -> None:
    module, model, _, _ = family
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        module(**made_up_example(module))
    assert 2 * model.macs == counter.get_total_flops()


class Misnamed(nn.Module):
    """A block of a gated transformer whose layers all carry another layer's name."""

    def __init__(self) -> None:
        super().__init__()
        self.down_proj, self.o_proj, self.q_proj, self.gate_proj = (nn.Linear(16, 16) for _ in range(4))
        self.k_proj, self.v_proj, self.up_proj = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)
        self.head = nn.LayerNorm(16)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        read = self.head(x)
        scores = torch.einsum("bid,bjd->bij", self.down_proj(read), self.o_proj(memory)) / 4
        x = x + self.gate_proj(torch.bmm(scores.softmax(-1), self.q_proj(memory)))
        return x + self.up_proj(self.v_proj(x) * torch.sigmoid(self.k_proj(x)))


class MisnamedModel(nn.Module):
    """Two misnamed blocks that look at another sequence, and an output layer called embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Misnamed() for _ in range(2))
        self.embedding = nn.Linear(16, 3)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x, memory)
        return self.embedding(x[:, 0])


def test_roles_come_from_the_flow_not_from_names() -> None:
    model = map_model(MisnamedModel(), {"x": torch.randn(2, 5, 16), "memory": torch.randn(2, 7, 16)})
    assert {layer.path: layer.role for layer in model.layers} == {
        "down_proj": "q", "o_proj": "k", "q_proj": "v", "gate_proj": "o", "k_proj": "gate", "v_proj": "up",
        "up_proj": "down", "head": "norm", "embedding": "classifier",
    }  # fmt: skip
    rows, other = 2 * 5, 2 * 7
    layers = rows * (2 * 16 * 16 + 3 * 16 * 24) + other * 2 * 16 * 16
    assert model.macs == 2 * (layers + 2 * (2 * 5 * 7 * 16)) + 2 * 16 * 3


def test_without_an_example_shapes_and_names_say_the_same() -> None:
    for build in (bert, llama, gpt2, distilbert):
        module = build()
        holder = nn.Sequential(module)  # not a transformers model: no example can be made up
        model = map_model(holder)
        assert model.macs == 0
        assert any("no example" in note for note in model.notes)
        expected = {f"0.{layer.name}": layer.role for layer in map_model(module).layers}
        assert {layer.name: layer.role for layer in model.layers} == expected


def test_grouped_heads_and_tied_head() -> None:
    model = map_model(llama())
    assert model.layer("model.layers.0.self_attn.k_proj").shape == (16, 32)
    head = model.layer("lm_head")
    assert (head.tied_to, head.num_parameters, head.role) == ("model.embed_tokens.weight", 0, "head")
    untied = map_model(hf.LlamaForCausalLM(hf.LlamaConfig(tie_word_embeddings=False, **TEXT))).layer("lm_head")
    assert (untied.tied_to, untied.num_parameters, untied.role) == (None, 99 * 32, "head")


def test_a_turned_weight_is_reported_as_out_by_in() -> None:
    layer = map_model(gpt2()).layer("transformer.h.1.attn.c_attn")
    assert (layer.transposed, layer.shape, layer.kind) == (True, (96, 32), "linear")


def test_fused_scaled_dot_product_attention_is_read_too() -> None:
    module = llama()
    module.set_attn_implementation("sdpa")
    model = map_model(module)
    assert count_roles(model) == dict(sorted(FAMILIES[llama][0].items()))
    module.set_attn_implementation("eager")
    assert map_model(module).macs == model.macs


class Rows(nn.Module):
    """A linear layer of a home-made class, with the weight either way round."""

    def __init__(self, size: int, turned: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size, size))
        self.bias = nn.Parameter(torch.randn(size))
        self.turned = turned

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight if self.turned else self.weight.t()) + self.bias


class Unlike(nn.Module):
    """A weight of two dimensions that is no linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.sum(0)


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (Rows(5, turned=True), ("linear", True)),
        (Rows(5, turned=False), ("linear", False)),
        (nn.Linear(3, 4), ("linear", False)),
        (nn.Conv1d(3, 4, 2), ("conv", False)),
        (nn.ConvTranspose1d(3, 4, 2), ("other", False)),
        (nn.Embedding(3, 4), ("embedding", False)),
        (nn.GroupNorm(2, 4), ("norm", False)),
        (nn.PReLU(), ("other", False)),
        (nn.LSTM(3, 4), ("other", False)),
        (Unlike(), ("other", False)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_kinds_are_told_by_what_a_layer_computes(module: nn.Module, kind: tuple[str, bool]) -> None:
    assert layer_kind(module) == kind


def test_what_is_not_understood_is_named_not_hidden() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(7))
            self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)
            self.mixer = nn.LSTM(4, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.mixer(self.used(x))[0] * self.scale.sum()

    model = map_model(Odd(), {"x": torch.randn(1, 3, 4)})
    notes = "\n".join(model.notes)
    assert "no stack of like blocks" in notes
    assert "167 parameters" in notes  # 7 of the model itself, 160 of the LSTM
    assert "the model itself, mixer" in notes
    assert "the example does not reach idle" in notes
    assert model.layer("used").role == "linear"


def test_an_example_that_does_not_fit_is_an_error_with_its_shapes() -> None:
    with pytest.raises(ModelError, match=r"does not run on the example \(x \[1, 5\]\)"):
        map_model(nn.Sequential(nn.Linear(4, 2)), {"x": torch.ones(1, 5)}, lambda module, inputs: module(inputs["x"]))


def test_the_model_is_left_as_it_was() -> None:
    module = bert().train()
    module.bert.encoder.eval()
    flags = [part.training for part in module.modules()]
    map_model(module)
    assert [part.training for part in module.modules()] == flags
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
