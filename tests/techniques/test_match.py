from __future__ import annotations

import pytest

from gossamer.errors import RecipeError
from gossamer.models.roles import LayerInfo, ModelMap
from gossamer.techniques.match import layers_matching


def layer(name: str, kind: str = "linear", role: str = "linear") -> LayerInfo:
    return LayerInfo(name=name, kind=kind, role=role, shape=(8, 8), num_parameters=64)  # type: ignore[arg-type]


MODEL = ModelMap(
    layers=(
        layer("model.embed_tokens", "embedding", "embedding"),
        layer("model.layers.0.self_attn.q_proj", role="q"),
        layer("model.layers.0.mlp.down_proj", role="down"),
        layer("model.layers.1.self_attn.q_proj", role="q"),
        layer("model.layers.10.mlp.down_proj", role="down"),
        layer("lm_head", role="head"),
    ),
    stacks=(),
    num_parameters=384,
    num_bytes=1536,
    macs=0,
)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("q", ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]),
        ("embedding", ["model.embed_tokens"]),
        ("lm_head", ["lm_head"]),
        ("down_proj", ["model.layers.0.mlp.down_proj", "model.layers.10.mlp.down_proj"]),
        ("model.layers.1", ["model.layers.1.self_attn.q_proj"]),  # not layers.10
        ("*.mlp.*", ["model.layers.0.mlp.down_proj", "model.layers.10.mlp.down_proj"]),
        (r"re:model\.layers\.\d\..*", [n.name for n in MODEL.layers[1:4]]),
        ("linear", [n.name for n in MODEL.layers[1:]]),
    ],
)
def test_patterns_name_layers_in_the_order_of_the_model(pattern: str, names: list[str]) -> None:
    assert [found.name for found in layers_matching(MODEL, [pattern], "targets")] == names


def test_a_pattern_that_matches_nothing_is_an_error_with_what_comes_close() -> None:
    with pytest.raises(RecipeError) as found:
        layers_matching(MODEL, ["lm_haed"], "ignore")
    assert found.value.message == "ignore: 'lm_haed' matches none of 6 layers"
    assert "lm_head" in found.value.hint


def test_a_kind_may_be_absent_beside_another_but_not_alone() -> None:
    assert len(layers_matching(MODEL, ["linear", "convolution"], "targets")) == 5
    with pytest.raises(RecipeError):
        layers_matching(MODEL, ["convolution"], "targets")


def test_a_broken_regular_expression_is_an_error() -> None:
    with pytest.raises(RecipeError, match="not a regular expression"):
        layers_matching(MODEL, ["re:["], "targets")
