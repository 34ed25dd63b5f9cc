"""Every layout that the torch runtime writes, against compressed-tensors' own schema and what vLLM's schemes load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from gossamer.models.caches import Cache, CacheSpec
from gossamer.models.candidate import Candidate
from gossamer.models.quantized import ActivationSpec, QuantSpec
from gossamer.models.shards import Shards
from gossamer.models.source import Source
from gossamer.models.structure import map_model
from gossamer.runtimes.base import ExportRequest
from gossamer.runtimes.torch_folder import TorchFolder
from gossamer.runtimes.torch_served import SERVER, expected_tensors, scheme_of
from gossamer.tasks import get_task
from gossamer.techniques.quantize.grid import quantize_weight

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


def opened(folder: Path, *, tied: bool = False) -> Candidate:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "source")
    source = Source.open(folder / "source")
    return Candidate(source=source, module=source.module(get_task("causal-lm")), dtype=torch.bfloat16)


def quantize(candidate: Candidate, spec: QuantSpec, activation: ActivationSpec | None = None, only: str = "") -> None:
    for name, module in candidate.module.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head" and only in name:
            codes = quantize_weight(module.weight.detach(), spec, name=name)
            candidate.set_quantized(f"{name}.weight", codes)
            if activation is not None:
                candidate.activations[name] = activation


def written(candidate: Candidate, folder: Path) -> tuple[dict[str, Any], Shards, str]:
    """Write a folder; return its quantization_config, its tensors, and what is said of vLLM."""
    folder.mkdir()
    request = ExportRequest(get_task("causal-lm"), TEXT, {}, ("logits",), folder / "cache")
    TorchFolder().write(candidate, folder, request)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    notes = TorchFolder().notes(folder, map_model(candidate.module))
    return config.get("quantization_config", {}), Shards(folder), " ".join(notes)


def local_names(held: Shards, owner: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    found = {name.rpartition(".")[2]: stored for name, (_, stored) in held.held.items() if name.startswith(f"{owner}.")}
    return {name: (stored.dtype, tuple(stored.shape)) for name, stored in found.items()}


@pytest.mark.parametrize("name", [*SERVED, *NOT_SERVED])
def test_folders_are_of_the_published_schema(name: str, tmp_path: Path) -> None:
    spec, activation = SERVED[name] if name in SERVED else NOT_SERVED[name][:2]
    candidate = opened(tmp_path)
    quantize(candidate, spec, activation)
    settings, held, _ = written(candidate, tmp_path / "out")
    assert settings["quant_method"] == "compressed-tensors"
    parsed = QuantizationConfig.model_validate({k: v for k, v in settings.items() if k != "version"})
    assert len(parsed.config_groups) >= 1
    for group in parsed.config_groups.values():
        assert isinstance(group, QuantizationScheme)
        compressor = BaseCompressor.get_value_from_registry(str(group.format.value))
        assert compressor.can_compress(nn.Linear, group)
        for owner in group.targets:
            inputs = {name for name in local_names(held, owner) if name.startswith("input_")}
            assert set(local_names(held, owner)) - inputs == set(compressor.compression_param_names(group))


@pytest.mark.parametrize("name", SERVED)
def test_layers_are_what_a_scheme_of_vllm_loads(name: str, tmp_path: Path) -> None:
    candidate = opened(tmp_path)
    quantize(candidate, *SERVED[name])
    settings, held, note = written(candidate, tmp_path / "out")
    for group in settings["config_groups"].values():
        assert scheme_of(group) is not None
        for owner in group["targets"]:
            shape = tuple(candidate.module.get_submodule(owner).weight.shape)  # type: ignore[union-attr, arg-type]
            wanted, found = expected_tensors(group, shape), local_names(held, owner)  # type: ignore[arg-type]
            assert found.keys() == wanted.keys()
            for tensor, (dtypes, size) in wanted.items():
                assert found[tensor][0] in dtypes.split()
                assert found[tensor][1] == size
    if name != "nvfp4":  # of which layers that are fused have scales of their own
        assert note.startswith("by its published source")
        assert SERVER in note


@pytest.mark.parametrize("name", NOT_SERVED)
def test_what_vllm_does_not_load_is_said(name: str, tmp_path: Path) -> None:
    spec, activation, why = NOT_SERVED[name]
    candidate = opened(tmp_path)
    quantize(candidate, spec, activation)
    _, _, note = written(candidate, tmp_path / "out")
    assert note.startswith("loads with transformers, not with")
    assert why in note


def test_one_global_scale_for_what_is_fused(tmp_path: Path) -> None:
    candidate = opened(tmp_path)
    with torch.no_grad():
        candidate.module.get_parameter("model.layers.1.self_attn.k_proj.weight").mul_(16.0)
    quantize(candidate, SERVED["nvfp4"][0])
    _, _, note = written(candidate, tmp_path / "out")
    assert "one global scale for q_proj, k_proj, v_proj of model.layers.1.self_attn, which have 2" in note


def test_an_embedding_in_plain_int8_is_not_served(tmp_path: Path) -> None:
    candidate = opened(tmp_path, tied=True)
    quantize(candidate, QuantSpec(bits=4, group_size=32))
    table = candidate.module.get_parameter("model.embed_tokens.weight").detach()
    candidate.set_quantized("model.embed_tokens.weight", quantize_weight(table, QuantSpec(bits=8)))
    _, _, note = written(candidate, tmp_path / "out")
    assert "embedding, or shared with one" in note


def test_fused_layers_are_held_alike(tmp_path: Path) -> None:
    candidate = opened(tmp_path)
    quantize(candidate, QuantSpec(bits=4, group_size=32), only="k_proj")
    quantize(candidate, QuantSpec(bits=8, group_size=32), only="down_proj")
    _, _, note = written(candidate, tmp_path / "out")
    assert "q_proj, k_proj, v_proj of model.layers.0.self_attn, which are held in different ways (and 1 more)" in note


@pytest.mark.parametrize("scope", ["tensor", "head"])
@pytest.mark.parametrize("form", ["fp8", "int8"])
def test_scales_of_keys_and_values(form: str, scope: str, tmp_path: Path) -> None:
    candidate = opened(tmp_path)
    shape = (1,) if scope == "tensor" else (2, 1, 1)
    spec = CacheSpec.model_validate({"format": form, "scope": scope})
    for block in range(2):
        one = Cache(spec, torch.full(shape, 0.125), torch.full(shape, 0.0625))
        candidate.caches[f"model.layers.{block}.self_attn"] = one
    settings, held, note = written(candidate, tmp_path / "out")
    scheme = settings["kv_cache_scheme"]
    assert (scheme["num_bits"], scheme["symmetric"], scheme["dynamic"]) == (8, True, False)
    assert scheme["strategy"] == {"tensor": "tensor", "head": "attn_head"}[scope]
    names = {name for name in held.held if name.endswith("_scale")}
    assert names == {f"model.layers.{block}.self_attn.{part}_scale" for block in range(2) for part in "kv"}
    assert all(torch.Size(held.shape(name)).numel() in (1, 2) for name in names)
    assert note.startswith("by its published source" if form == "fp8" else "loads with transformers")


def test_floats_say_nothing(tmp_path: Path) -> None:
    assert written(opened(tmp_path), tmp_path / "out")[2] == ""


def test_packed_zero_points_are_not_opened_by_transformers(tmp_path: Path) -> None:
    """Why ours are not packed, as vLLM wants them: as soon as this fails, they can be."""
    candidate = opened(tmp_path)
    spec = QuantSpec(bits=4, symmetric=False, group_size=32)
    quantize(candidate, spec)
    _, held, _ = written(candidate, tmp_path / "out")
    tensors = {name: held.read(name) for name in held.held}
    for name in [name for name in tensors if name.endswith("weight_zero_point")]:
        tensors[name] = pack_to_int32(tensors[name], spec.bits, packed_dim=0).contiguous()
    save_file(tensors, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    for group in config["quantization_config"]["config_groups"].values():
        group["weights"] |= {"strategy": "group", "group_size": 32, "block_structure": None}
    (tmp_path / "out" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert all(scheme_of(group) is not None for group in config["quantization_config"]["config_groups"].values())
    with pytest.raises(RuntimeError, match=r"size mismatch|mismatched"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
