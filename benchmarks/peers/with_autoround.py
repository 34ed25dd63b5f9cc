"""AutoRound: rounding learned by signed gradient descent, block by block, on 64 calibration windows.

Head and embedding stay as they are. Opened with transformers, in float32.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from script import Job, run, torch_logits

RECIPES = {
    "4bit-g64-asym-50": {"bits": 4, "iters": 50},
    "4bit-g64-asym-200": {"bits": 4, "iters": 200},
    "3bit-g64-asym-200": {"bits": 3, "iters": 200},
    "2bit-g64-asym-200": {"bits": 2, "iters": 200},
}
NUM_SAMPLES = 64
GROUP_SIZE = 64


def quantize(job: Job) -> None:
    """Write a folder in AutoRound's own format."""
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.bfloat16)
    windows = job.calibration_NT
    count = min(len(windows), NUM_SAMPLES)
    picked = windows[[index * len(windows) // count for index in range(count)]]
    rounding = AutoRound(
        network,
        AutoTokenizer.from_pretrained(job.model),
        bits=job.recipe["bits"],
        group_size=GROUP_SIZE,
        sym=False,
        iters=job.iterations(job.recipe["iters"]),
        nsamples=len(picked),
        seqlen=windows.shape[1],
        dataset=[{"input_ids": torch.from_numpy(ids)[None]} for ids in picked],
        batch_size=min(8, len(picked)),
        device_map="cpu",
    )
    with job.timed():
        rounding.quantize()
    rounding.save_quantized(str(job.out), format="auto_round")


def reopen(job: Job) -> Callable[[Any], Any]:
    """Open the folder."""
    import torch
    from transformers import AutoModelForCausalLM

    return torch_logits(AutoModelForCausalLM.from_pretrained(job.out, dtype=torch.float32))


if __name__ == "__main__":
    sys.exit(run(RECIPES, quantize, reopen, packages=("auto-round",)))
