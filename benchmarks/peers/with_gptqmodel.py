"""GPTQModel: GPTQ in its own file format. Head and embedding stay as they are, in bfloat16."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from script import Job, run, torch_logits

RECIPES = {"4bit-g64": {"bits": 4, "group_size": 64}}


def quantize(job: Job) -> None:
    """Write what `save` writes."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, job.threads)))
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    model = GPTQModel.load(str(job.model), QuantizeConfig(**job.recipe), dtype=torch.bfloat16, device="cpu")
    rows = [{"input_ids": ids.tolist(), "attention_mask": [1] * len(ids)} for ids in job.calibration_NT]
    with job.timed():
        model.quantize(rows, batch_size=1)
    model.save(str(job.out))


def reopen(job: Job) -> Callable[[Any], Any]:
    """Open it with its PyTorch kernel, which loads in 16 bits only, and compute in float32 what it dequantizes."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, job.threads)))
    import torch
    from gptqmodel import BACKEND, GPTQModel

    served = GPTQModel.load(str(job.out), device="cpu", backend=BACKEND.TORCH, dtype=torch.bfloat16)
    return torch_logits(served.model.float())


if __name__ == "__main__":
    sys.exit(run(RECIPES, quantize, reopen, packages=("gptqmodel",)))
