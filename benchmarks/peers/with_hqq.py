"""HQQ: half-quadratic rounding of weights, without data, in groups along the inputs (axis 1).

The tied head and the embedding are left alone, as HQQ does, and saved in bfloat16.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from script import Job, run, torch_logits

RECIPES = {"4bit-g64": {"bits": 4, "group_size": 64}, "3bit-g64": {"bits": 3, "group_size": 64}}


def quantize(job: Job) -> None:
    """Write what `AutoHQQHFModel.save_quantized` writes."""
    import torch
    from hqq.core.quantize import BaseQuantizeConfig
    from hqq.models.hf.base import AutoHQQHFModel
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.bfloat16)
    config = BaseQuantizeConfig(nbits=job.recipe["bits"], group_size=job.recipe["group_size"], axis=1)
    with job.timed():
        AutoHQQHFModel.quantize_model(network, quant_config=config, compute_dtype=torch.bfloat16, device="cpu")
    AutoHQQHFModel.save_quantized(network, str(job.out))


def reopen(job: Job) -> Callable[[Any], Any]:
    """Open it with float32 arithmetic."""
    import torch
    from hqq.models.hf.base import AutoHQQHFModel

    network = AutoHQQHFModel.from_quantized(str(job.out), compute_dtype=torch.float32, device="cpu")
    return torch_logits(network.float())


if __name__ == "__main__":
    sys.exit(run(RECIPES, quantize, reopen, packages=("hqq",)))
