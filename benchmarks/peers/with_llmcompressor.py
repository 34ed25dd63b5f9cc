"""llm-compressor: round to nearest, GPTQ, AWQ and SmoothQuant, written as a compressed-tensors folder.

It computes in bfloat16, or in float32 where the processor is faster in that; what it leaves unrounded (head, embedding,
norms) is saved in bfloat16. Groups have 64 inputs, as 128 does not divide a hidden size of 576.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from script import Job, faster_dtype, run, torch_logits

RECIPES = {
    "rtn-w4-g64": {"method": "rtn", "bits": 4, "symmetric": True},
    "gptq-w4-g64-asym": {"method": "gptq", "bits": 4, "symmetric": False},
    "gptq-w4-g64-sym": {"method": "gptq", "bits": 4, "symmetric": True},
    "gptq-w3-g64-asym": {"method": "gptq", "bits": 3, "symmetric": False},
    "smoothquant-w8a8": {"method": "smoothquant"},
    "awq-w4-g64-asym": {"method": "awq", "bits": 4, "symmetric": False},
}
GROUP_SIZE = 64


def quantize(job: Job) -> None:
    """Write a compressed-tensors folder."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(job.model, dtype=faster_dtype())
    given: dict[str, Any] = {}
    if job.recipe["method"] != "rtn":
        ids = job.calibration_NT
        rows = {"input_ids": ids.tolist(), "attention_mask": [[1] * ids.shape[1]] * len(ids)}
        given = {"dataset": Dataset.from_dict(rows), "num_calibration_samples": len(ids)}
        given |= {"max_seq_length": ids.shape[1], "shuffle_calibration_samples": False}
    with job.timed():
        oneshot(model=network, recipe=modifiers(job), **given)
    for module in network.modules():
        if not hasattr(module, "quantization_scheme"):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.bfloat16()
    network.save_pretrained(job.out, save_compressed=True)


def modifiers(job: Job) -> list[Any]:
    """Return the recipe in the tool's own words."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    method, recipe = job.recipe["method"], job.recipe
    if method == "smoothquant":
        return [
            SmoothQuantModifier(smoothing_strength=0.8),
            QuantizationModifier(targets=["Linear"], scheme="W8A8", ignore=["lm_head"]),
        ]
    weights = QuantizationArgs(
        num_bits=recipe["bits"], type="int", symmetric=recipe["symmetric"], strategy="group", group_size=GROUP_SIZE
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    grid: dict[str, Any] = {"config_groups": {"group_0": scheme}, "ignore": ["lm_head"]}
    if method == "gptq":
        return [GPTQModifier(**grid)]
    if method == "awq":
        leave_memory_unpinned()
        return [AWQModifier(duo_scaling="both", n_grid=4 if job.quick else 20), QuantizationModifier(**grid)]
    return [QuantizationModifier(**grid)]


def leave_memory_unpinned() -> None:
    """Let AWQ run without an accelerator: version 0.14 pins memory for one in any case, and fails where none is."""
    import torch
    from llmcompressor.pipelines.cache import IntermediatesCache

    if not torch.accelerator.is_available():
        IntermediatesCache.pin_memory = lambda *_, **__: None


def reopen(job: Job) -> Callable[[Any], Any]:
    """Open the folder with transformers, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    return torch_logits(AutoModelForCausalLM.from_pretrained(job.out, dtype=torch.float32))


if __name__ == "__main__":
    sys.exit(run(RECIPES, quantize, reopen, packages=("llmcompressor", "compressed-tensors")))
