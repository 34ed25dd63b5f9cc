"""In which precision calibration samples pass a block: bfloat16 where the device has it and nobody can tell.

Products of bfloat16 numbers take a fraction of the time of float32 ones where the device multiplies them natively;
sums stay float32, and so do norms, residual sums and what is handed from block to block (PyTorch's autocast). It is
used by the passes that observe a block, that hand its outputs on, and that rounding is learned from. Solvers, and the
passes that errors are measured on, compute in float32 or float64.

Whether it does is tried out before each block is solved, on NUM_TRIED samples: the outputs of the block as it was, in
bfloat16 and in float32, may differ by DRIFT of the error that plain rounding makes on the same samples (`token_error`),
or by DRIFT_ALONE of the tokens' size where nothing is rounded. What was chosen is remembered with the block's codes, so
that a killed run goes on with the same bytes.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

from gossamer.measure.machine import multiplies_bf16
from gossamer.models.spilled import tensors_changed
from gossamer.models.walker import Output
from gossamer.run.device import CPU

CalibrationDtype = Literal["auto", "float32", "bfloat16"]
FLOAT32, BFLOAT16 = "float32", "bfloat16"
NUM_TRIED = 2
DRIFT = 0.01
DRIFT_ALONE = 1e-5


def computing(dtype: str, device: torch.device = CPU) -> AbstractContextManager[object]:
    """Let products on a device be computed in a dtype while the `with` lasts; weights must not change meanwhile."""
    return torch.autocast(device.type, torch.bfloat16) if dtype == BFLOAT16 else nullcontext()


def full_precision(output: Output) -> Output:
    """Return a block's output with what is left in bfloat16 (a block without a residual sum) as float32."""
    widened: Output = tensors_changed(output, lambda part: part.float() if part.dtype == torch.bfloat16 else part)
    return widened


def allowed_drift(plain_error: float | None) -> float:
    """Return how far outputs in bfloat16 may be from those in float32, given the error of plain rounding."""
    return DRIFT_ALONE if plain_error is None else DRIFT * plain_error


def worth_trying(wanted: CalibrationDtype, device: torch.device = CPU) -> bool:
    """Say whether the precision has to be found out: nobody has set it, and bfloat16 would be faster on a device."""
    if device.type == "cpu":
        return wanted == "auto" and multiplies_bf16()
    return wanted == "auto" and bool(torch.cuda.is_bf16_supported(including_emulation=False))
