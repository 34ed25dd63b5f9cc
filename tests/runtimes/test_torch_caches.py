"""Folders that say how keys and values are kept: what is in the file, and that what is opened computes with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from gossamer.errors import ArtifactError, RuntimeUnavailable
from gossamer.models.caches import Cache, CacheSpec
from gossamer.models.candidate import Candidate
from gossamer.models.quantized import QuantSpec
from gossamer.models.source import Source
from gossamer.runtimes import get_runtime
from gossamer.runtimes.base import ExportRequest
from gossamer.runtimes.torch_caches import stored_caches
from gossamer.runtimes.torch_folder import TorchFolder
from gossamer.tasks import get_task
from gossamer.techniques.quantize.grid import quantize_weight

IDS = np.array([[1, 2, 3, 4, 5], [5, 4, 3, 2, 1]])
TEXT = {"input_ids": IDS, "attention_mask": np.ones_like(IDS)}
NAMES = ("model.layers.0.self_attn", "model.layers.1.self_attn")
PACKED = "model.layers.0.mlp.up_proj.weight"


def written(folder: Path, spec: CacheSpec, *, codes: bool, dtype: torch.dtype = torch.float32) -> Candidate:
    """Write a folder below `folder`, its scales so coarse that nobody can overlook them; return what was decided."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "source")
    source, task = Source.open(folder / "source"), get_task("causal-lm")
    candidate = Candidate(source=source, module=source.module(task), dtype=dtype)
    if codes:
        weight = candidate.module.get_parameter(PACKED).detach()
        candidate.set_quantized(PACKED, quantize_weight(weight, QuantSpec(bits=4, group_size=16)))
    candidate.replace_floats(lambda _, values: values.to(dtype).float())
    shape = (1,) if spec.scope == "tensor" else (2, 1, 1)
    for name in NAMES:
        candidate.caches[name] = Cache(spec, torch.full(shape, 0.125), torch.full(shape, 0.0625))
    (folder / "out").mkdir()
    request = ExportRequest(task=task, example=TEXT, axes={}, outputs=("logits",), cache=folder / "cache")
    TorchFolder().write(candidate, folder / "out", request)
    return candidate


def logits_of(candidate: Candidate) -> np.ndarray[Any, Any]:
    with candidate.simulated() as module, torch.no_grad():
        return module(**{name: torch.from_numpy(values) for name, values in TEXT.items()}).logits.numpy()


@pytest.mark.parametrize("codes", [True, False], ids=["packed", "floats"])
@pytest.mark.parametrize("scope", ["tensor", "head"])
@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_a_folder_computes_with_the_caches_that_were_decided(
    tmp_path: Path, format: Any, scope: Any, codes: bool
) -> None:
    spec = CacheSpec(format=format, scope=scope)
    candidate = written(tmp_path, spec, codes=codes)
    folder, task = tmp_path / "out", get_task("causal-lm")
    wanted = logits_of(candidate)
    candidate.caches = {}
    plain = logits_of(candidate)
    assert np.std(wanted - plain) > 1e-2 * np.std(plain)
    for session in (
        TorchFolder().open(folder, threads=1, task=task),
        TorchFolder().open_streamed(folder, threads=1, task=task, budget=1 << 20),
    ):
        np.testing.assert_allclose(session.run(TEXT)["logits"], wanted, rtol=1e-3, atol=1e-4)
    stored = {tensor.name: tensor for tensor in TorchFolder().stored_tensors(folder)}
    for name in NAMES:
        assert stored[f"{name}.k_scale"].dtype == stored[f"{name}.v_scale"].dtype == str(spec)
    assert (PACKED in stored and stored[PACKED].bits == 4) == codes
    assert sum(tensor.bytes for tensor in stored.values()) == sum(
        tensor.nbytes for tensor in load_file(folder / "model.safetensors").values()
    )


def test_the_scheme_is_one_that_compressed_tensors_reads(tmp_path: Path) -> None:
    written(tmp_path, CacheSpec(format="fp8"), codes=True)
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    found = QuantizationConfig.model_validate(settings).kv_cache_scheme
    assert found is not None
    assert (found.num_bits, found.type, found.symmetric, found.dynamic) == (8, "float", True, False)
    # stock transformers opens the folder too; whether it rounds keys and values is compressed-tensors' matter
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert bool(torch.isfinite(model(input_ids=torch.from_numpy(IDS)).logits).all())


def test_scales_are_the_same_numbers_in_16_bits(tmp_path: Path) -> None:
    candidate = written(tmp_path, CacheSpec(format="fp8"), codes=False, dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors[f"{NAMES[0]}.k_scale"].dtype == torch.bfloat16
    found = stored_caches(tmp_path / "out")
    assert list(found) == list(NAMES)
    for name, cache in found.items():
        torch.testing.assert_close(cache.key_scale, candidate.caches[name].key_scale, rtol=0, atol=0)


def test_files_that_say_less_than_they_should(tmp_path: Path) -> None:
    written(tmp_path, CacheSpec(format="int8"), codes=False)
    folder = tmp_path / "out"
    tensors = load_file(folder / "model.safetensors")
    without = {name: values for name, values in tensors.items() if name != f"{NAMES[1]}.v_scale"}
    save_file(without, folder / "model.safetensors", {"format": "pt", "written_by": "gossamer"})
    with pytest.raises(ArtifactError, match=r"model.layers.1.self_attn lacks its scales"):
        stored_caches(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"]["num_bits"] = 4
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="none of those known here: 4 bits, int, tensor"):
        TorchFolder().stored_tensors(folder)


def test_other_runtimes_refuse(tmp_path: Path) -> None:
    assert TorchFolder().cache_refusal is None
    for name in ("onnxruntime", "gguf", "torchscript", "torch-export"):
        refusal = get_runtime(name).cache_refusal
        assert refusal is not None
        assert name in refusal
    candidate = written(tmp_path, CacheSpec(format="int8"), codes=False)
    request = ExportRequest(
        task=get_task("causal-lm"), example=TEXT, axes={}, outputs=("logits",), cache=tmp_path / "cache"
    )
    with pytest.raises(RuntimeUnavailable, match="self_attn is quantized"):
        get_runtime("torch-export").write(candidate, tmp_path / "out", request)
