"""AutoRound: rounding learned by signed gradient descent, block by block, on 64 calibration windows.

Head and embedding stay as they are, in float32. 0.16.1 cannot compute here with the asymmetric codes that it packs:
what is opened, with transformers in float32, are its weights multiplied out, as they are in memory before it packs
them. They are not counted in its bytes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
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
PACKED = "auto_round:auto_gptq"  # by default it packs asymmetric 4 bits as AWQ, and fails there


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
        rounded, _ = rounding.quantize()
    rounded.save_pretrained(floats_of(job))  # scales and zero points lie beside the weights, and are not read again
    rounding.save_quantized(str(job.out), format=PACKED)


def floats_of(job: Job) -> Path:
    """Return where the weights lie that were multiplied out."""
    return job.out.with_name("floats")


def reopen(job: Job) -> Callable[[Any], Any]:
    """Open the weights that were multiplied out."""
    import torch
    from transformers import AutoModelForCausalLM

    return torch_logits(AutoModelForCausalLM.from_pretrained(floats_of(job), dtype=torch.float32))


if __name__ == "__main__":
    sys.exit(run(RECIPES, quantize, reopen, packages=("auto-round",)))
