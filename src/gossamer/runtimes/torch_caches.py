"""The scales of keys and values in a Hugging Face folder, as vLLM and compressed-tensors read them.

`quantization_config.kv_cache_scheme` in config.json says how they are kept, and each attention `p` has

    p.k_scale, p.v_scale   [1], or [H, 1, 1] with one scale for each key/value head     dtype of the folder's floats

Stock transformers keeps caches in floats whatever the scheme says. compressed-tensors rounds what goes into them, but
0.20 looks for an argument `past_key_values` that transformers 5.24 calls `cache`, and finds none. So a folder that is
opened to be judged has its keys and values rounded by `models/caches.py`, where compressed-tensors does not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor, nn

from gossamer.errors import ArtifactError
from gossamer.models.caches import Cache, CacheSpec
from gossamer.models.shards import Entry, Shards

SUFFIXES = (".k_scale", ".v_scale")
STRATEGIES = {"tensor": "tensor", "head": "attn_head"}
TYPES = {"fp8": "float", "int8": "int"}


def cache_scheme(caches: Mapping[str, Cache]) -> dict[str, Any] | None:
    """Return `kv_cache_scheme`, None where no cache is rounded; all caches of a candidate are of one spec."""
    if not caches:
        return None
    spec = next(iter(caches.values())).spec
    arguments = QuantizationArgs(
        num_bits=8, type=TYPES[spec.format], symmetric=True, strategy=STRATEGIES[spec.scope], dynamic=False
    )
    found: dict[str, Any] = arguments.model_dump(mode="json")
    return found


def cache_tensors(name: str, cache: Cache, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors of one attention by the names that they have in the file."""
    parts = (cache.key_scale, cache.value_scale)
    return {f"{name}{suffix}": scale.to(dtype) for suffix, scale in zip(SUFFIXES, parts, strict=True)}


def cache_entries(name: str, cache: Cache, dtype: torch.dtype) -> list[Entry]:
    """Return what `cache_tensors` will hold."""
    tensors = cache_tensors(name, cache, dtype)
    return [Entry(key, tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()]


def spec_of(config: Mapping[str, Any]) -> CacheSpec | None:
    """Return how a folder's config.json says that keys and values are kept; None where it says nothing.

    Raises ArtifactError for a scheme that was not written here.
    """
    scheme = (config.get("quantization_config") or {}).get("kv_cache_scheme")
    if scheme is None:
        return None
    formats = {kind: form for form, kind in TYPES.items()}
    scopes = {strategy: scope for scope, strategy in STRATEGIES.items()}
    known = scheme["num_bits"] == 8 and scheme["symmetric"] and scheme["type"] in formats
    if not known or scheme["strategy"] not in scopes:
        raise ArtifactError(
            f"kv_cache_scheme of config.json is none of those known here: {scheme['num_bits']} bits, "
            f"{scheme['type']}, {scheme['strategy']}",
            "known are 8 bits, symmetric, float or int, for tensors or heads",
        )
    return CacheSpec.model_validate({"format": formats[scheme["type"]], "scope": scopes[scheme["strategy"]]})


def stored_caches(folder: Path) -> dict[str, Cache]:
    """Return how each attention of a folder keeps its keys and values, by the attention's name.

    Raises ArtifactError where a scheme has no scales.
    """
    spec = spec_of(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    if spec is None:
        return {}
    shards = Shards(folder)
    return read_caches(spec, list(shards.held), shards.read)


def read_caches(spec: CacheSpec, names: Collection[str], read: Callable[[str], Tensor]) -> dict[str, Cache]:
    """Return the caches whose scales are among the tensors `names`."""
    owners = sorted(name.removesuffix(SUFFIXES[0]) for name in names if name.endswith(SUFFIXES[0]))
    lacking = [owner for owner in owners if f"{owner}{SUFFIXES[1]}" not in names]
    if lacking or not owners:
        raise ArtifactError(
            f"kv_cache_scheme asks for {spec}, but {lacking[0] if lacking else 'every attention'} lacks its scales",
            "write the artifact again",
        )
    return {owner: Cache(spec, *(read(f"{owner}{suffix}").float() for suffix in SUFFIXES)) for owner in owners}


def simulate_caches(module: nn.Module, caches: Mapping[str, Cache]) -> None:
    """Let attentions compute with keys and values as the caches give them back, where they do not yet."""
    for name, cache in caches.items():
        attention = module.get_submodule(name)
        if not hasattr(attention, "kv_cache"):  # then compressed-tensors rounds them
            cache.simulate(attention)
