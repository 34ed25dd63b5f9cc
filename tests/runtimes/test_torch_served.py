"""Every layout that the torch runtime writes, against compressed-tensors' own schema and what vLLM's schemes load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.naive_quantized import NaiveQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from gossamer.models.caches import Cache, CacheSpec
from gossamer.models.candidate import Candidate
from gossamer.models.quantized import ActivationSpec, QuantSpec
from gossamer.models.roles import ModelMap
from gossamer.models.shards import Shards
from gossamer.models.source import Source
from gossamer.models.structure import map_model
from gossamer.runtimes.base import ExportRequest
from gossamer.runtimes.torch_folder import TorchFolder
from gossamer.runtimes.torch_served import SERVER, expected_tensors, scheme_of
from gossamer.tasks import get_task
from gossamer.techniques.quantize.grid import quantize_weight

TASK = get_task("causal-lm")
IDS = np.array([[1, 2, 3, 4, 5], [5, 4, 3, 2, 1]])
TEXT = {"input_ids": IDS, "attention_mask": np.ones_like(IDS)}
STATIC = ActivationSpec(kind="static", low=-2.0, high=3.0)
TOKEN = ActivationSpec(kind="dynamic", scope="token")
BITS = (8, 4, 3, 2)
Layout = tuple[QuantSpec, ActivationSpec | None]
SERVED: dict[str, Layout] = {
    **{f"int{bits} group": (QuantSpec(bits=bits, group_size=32), None) for bits in (8, 7, 6, 5, 4, 3, 2)},
    **{f"int{bits} channel": (QuantSpec(bits=bits), None) for bits in BITS},
    "int8 token": (QuantSpec(bits=8), TOKEN),
    "int8 static": (QuantSpec(bits=8), STATIC),
    "int8 static symmetric": (QuantSpec(bits=8), STATIC.model_copy(update={"symmetric": True})),
    "int4 token": (QuantSpec(bits=4), TOKEN),
    "fp8 channel": (QuantSpec(bits=8, format="fp8"), None),
    "mxfp4": (QuantSpec(bits=4, format="mxfp4", group_size=32), None),
    "nvfp4": (QuantSpec(bits=4, format="nvfp4", group_size=16), None),
}
NOT_SERVED: dict[str, tuple[QuantSpec, ActivationSpec | None, str]] = {
    **{
        f"int{bits} asymmetric {group}": (QuantSpec(bits=bits, symmetric=False, group_size=group), None, "zero points")
        for bits in BITS
        for group in (32, None)
    },
    "fp8 group": (QuantSpec(bits=8, format="fp8", group_size=32), None, "no scheme for float8 group 32"),
    "int7 token": (QuantSpec(bits=7), TOKEN, "no scheme for int7 per channel with rounded inputs"),
    "int8 whole tensor": (QuantSpec(bits=8), ActivationSpec(kind="dynamic"), "no scheme for int8 per channel with"),
    "int8 asymmetric token": (QuantSpec(bits=8, symmetric=False), TOKEN, "asymmetric per channel with rounded inputs"),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, tuple[Source, ModelMap]]:
    """Tiny language models without and with a tied head, and their maps."""
    found = {}
    for tied in (False, True):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=50, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=tied, initializer_range=0.2,
        )  # fmt: skip
        folder = tmp_path_factory.mktemp("source")
        LlamaForCausalLM(config).save_pretrained(folder)
        source = Source.open(folder)
        found[tied] = (source, map_model(source.module(TASK)))
    return found


Sources = dict[bool, tuple[Source, ModelMap]]


def opened(sources: Sources, *, tied: bool = False) -> tuple[Candidate, ModelMap]:
    source, model = sources[tied]
    return Candidate(source=source, module=source.module(TASK), dtype=torch.bfloat16), model


def quantize(candidate: Candidate, spec: QuantSpec, activation: ActivationSpec | None = None, only: str = "") -> None:
    for name, module in candidate.module.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head" and only in name:
            codes = quantize_weight(module.weight.detach(), spec, name=name)
            candidate.set_quantized(f"{name}.weight", codes)
            if activation is not None:
                candidate.activations[name] = activation


def written(candidate: Candidate, model: ModelMap, folder: Path) -> tuple[dict[str, Any], Shards, str]:
    """Write a folder; return its quantization_config, its tensors, and what is said of vLLM."""
    request = ExportRequest(TASK, TEXT, {}, ("logits",), folder / "cache")
    TorchFolder().write(candidate, folder, request)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config.get("quantization_config", {}), Shards(folder), " ".join(TorchFolder().notes(folder, model))


def local_names(held: Shards, owner: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    found = {name.rpartition(".")[2]: stored for name, (_, stored) in held.held.items() if name.startswith(f"{owner}.")}
    return {name: (stored.dtype, tuple(stored.shape)) for name, stored in found.items()}


@pytest.mark.parametrize("name", [*SERVED, *NOT_SERVED])
def test_folders_are_of_the_published_schemas(name: str, sources: Sources, tmp_path: Path) -> None:
    spec, activation = SERVED[name] if name in SERVED else NOT_SERVED[name][:2]
    candidate, model = opened(sources)
    quantize(candidate, spec, activation)
    settings, held, note = written(candidate, model, tmp_path)
    assert settings["quant_method"] == "compressed-tensors"
    parsed = QuantizationConfig.model_validate({k: v for k, v in settings.items() if k != "version"})
    assert len(parsed.config_groups) >= 1
    for group in parsed.config_groups.values():
        assert isinstance(group, QuantizationScheme)
        compressor = BaseCompressor.get_value_from_registry(group.format)
        # weight-only fp8 is what compressed-tensors itself would call naive: one and the same code
        able = issubclass(compressor, NaiveQuantizationCompressor) or compressor.can_compress(nn.Linear, group)
        assert able
        for owner in group.targets:
            inputs = {tensor for tensor in local_names(held, owner) if tensor.startswith("input_")}
            assert set(local_names(held, owner)) - inputs == set(compressor.compression_param_names(group))
    if name in SERVED:
        check_vllm(candidate, settings, held)
        if name != "nvfp4":  # of which layers that are fused have scales of their own
            assert note.startswith("by its published source")
            assert SERVER in note
    else:
        assert note.startswith("loads with transformers, not with")
        assert NOT_SERVED[name][2] in note


def check_vllm(candidate: Candidate, settings: dict[str, Any], held: Shards) -> None:
    """Every layer has the tensors that a scheme of vLLM loads, and no other, in its dtypes and shapes."""
    for group in settings["config_groups"].values():
        assert scheme_of(group) is not None
        for owner in group["targets"]:
            shape = tuple(candidate.module.get_submodule(owner).weight.shape)  # type: ignore[union-attr, arg-type]
            wanted, found = expected_tensors(group, shape), local_names(held, owner)  # type: ignore[arg-type]
            assert found.keys() == wanted.keys()
            for tensor, (dtypes, size) in wanted.items():
                assert found[tensor][0] in dtypes.split()
                assert found[tensor][1] == size


def test_one_global_scale_for_what_is_fused(sources: Sources, tmp_path: Path) -> None:
    candidate, model = opened(sources)
    with torch.no_grad():
        candidate.module.get_parameter("model.layers.0.self_attn.k_proj.weight").mul_(16.0)
    quantize(candidate, SERVED["nvfp4"][0])
    _, _, note = written(candidate, model, tmp_path)
    assert "one global scale for q_proj, k_proj, v_proj of model.layers.0.self_attn, which have" in note


def test_an_embedding_in_plain_int8_is_not_served(sources: Sources, tmp_path: Path) -> None:
    candidate, model = opened(sources, tied=True)
    quantize(candidate, QuantSpec(bits=4, group_size=32))
    table = candidate.module.get_parameter("model.embed_tokens.weight").detach()
    candidate.set_quantized("model.embed_tokens.weight", quantize_weight(table, QuantSpec(bits=8)))
    _, _, note = written(candidate, model, tmp_path)
    assert "embedding, or shared with one" in note


def test_fused_layers_are_held_alike(sources: Sources, tmp_path: Path) -> None:
    candidate, model = opened(sources)
    quantize(candidate, QuantSpec(bits=4, group_size=32), only="k_proj")
    quantize(candidate, QuantSpec(bits=8, group_size=32), only="down_proj")
    _, _, note = written(candidate, model, tmp_path)
    assert "q_proj, k_proj, v_proj of model.layers.0.self_attn, which are held in different ways (and 1 more)" in note


@pytest.mark.parametrize("scope", ["tensor", "head"])
@pytest.mark.parametrize("form", ["fp8", "int8"])
def test_scales_of_keys_and_values(form: str, scope: str, sources: Sources, tmp_path: Path) -> None:
    candidate, model = opened(sources)
    shape = (1,) if scope == "tensor" else (2, 1, 1)
    spec = CacheSpec.model_validate({"format": form, "scope": scope})
    for block in range(2):
        one = Cache(spec, torch.full(shape, 0.125), torch.full(shape, 0.0625))
        candidate.caches[f"model.layers.{block}.self_attn"] = one
    settings, held, note = written(candidate, model, tmp_path)
    scheme = settings["kv_cache_scheme"]
    assert (scheme["num_bits"], scheme["symmetric"], scheme["dynamic"]) == (8, True, False)
    assert scheme["strategy"] == {"tensor": "tensor", "head": "attn_head"}[scope]
    names = {name for name in held.held if name.endswith("_scale")}
    assert names == {f"model.layers.{block}.self_attn.{part}_scale" for block in range(2) for part in "kv"}
    assert all(torch.Size(held.shape(name)).numel() in (1, 2) for name in names)
    assert note.startswith("by its published source" if form == "fp8" else "loads with transformers")


def test_floats_say_nothing(sources: Sources, tmp_path: Path) -> None:
    assert written(*opened(sources), tmp_path)[2] == ""


def test_packed_zero_points_are_not_opened_by_transformers(sources: Sources, tmp_path: Path) -> None:
    """Why ours are not packed, as vLLM wants them: as soon as this fails, they can be."""
    candidate, model = opened(sources)
    spec = QuantSpec(bits=4, symmetric=False, group_size=32)
    quantize(candidate, spec)
    _, held, _ = written(candidate, model, tmp_path)
    tensors = {name: held.read(name) for name in held.held}
    for name in [name for name in tensors if name.endswith("weight_zero_point")]:
        tensors[name] = pack_to_int32(tensors[name], spec.bits, packed_dim=0).contiguous()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    for group in config["quantization_config"]["config_groups"].values():
        group["weights"] |= {"strategy": "group", "group_size": 32, "block_structure": None}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert all(scheme_of(group) is not None for group in config["quantization_config"]["config_groups"].values())
    with pytest.raises(RuntimeError, match=r"size mismatch|mismatched"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
