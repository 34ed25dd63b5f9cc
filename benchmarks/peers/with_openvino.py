"""OpenVINO with NNCF's weight compression: int8, or int4 in groups with first and last layer in int8, NNCF's defaults.

Opened for accuracy (float32 arithmetic, inputs not rounded on the way): weights are compared here, not kernels.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from script import Job, run

RECIPES = {
    "int8-asym": {"mode": "int8_asym"},
    "int4-asym-g64-awq-se": {"mode": "int4_asym", "group_size": 64, "awq": True, "scale_estimation": True},
}
FILE = "openvino_model.xml"


def quantize(job: Job) -> None:
    """Write an IR."""
    import nncf
    import openvino as ov

    graph = converted(job)
    recipe: dict[str, Any] = {**job.recipe, "mode": nncf.CompressWeightsMode(job.recipe["mode"])}
    if recipe.get("awq"):
        rows = [{"input_ids": ids[None]} for ids in job.calibration_NT]
        recipe |= {"dataset": nncf.Dataset(rows), "subset_size": len(rows)}
    with job.timed():
        compressed = nncf.compress_weights(graph, **recipe)
    ov.save_model(compressed, job.out / FILE)


def converted(job: Job) -> Any:
    """Return OpenVINO's graph of the original: token ids [1, tokens] to logits [1, tokens, V]."""
    import openvino as ov
    import torch
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32, attn_implementation="eager").eval()

    class Plain(torch.nn.Module):
        def __init__(self, network: torch.nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.network(input_ids=input_ids, use_cache=False).logits
            return logits

    ids = torch.from_numpy(job.calibration_NT[:1])
    with torch.inference_mode():
        graph = ov.convert_model(torch.export.export(Plain(network), (ids,), strict=False))
    graph.input(0).set_names({"input_ids"})
    return graph


def reopen(job: Job) -> Callable[[Any], Any]:
    """Compile the IR for this processor."""
    import openvino as ov

    settings = {"EXECUTION_MODE_HINT": "ACCURACY", "INFERENCE_PRECISION_HINT": "f32"}
    settings |= {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "INFERENCE_NUM_THREADS": job.threads}
    compiled = ov.Core().compile_model(job.out / FILE, "CPU", settings)

    def logits(window: Any) -> Any:
        return np.asarray(compiled([window[None]])[0])[0]

    return logits


if __name__ == "__main__":
    sys.exit(run(RECIPES, quantize, reopen, packages=("openvino", "nncf")))
