"""The command line as in `brief_gossamer.py`, for a model that is read piece by piece however small it is.

No weight stays in memory, calibration samples lie in files, and the artifact is written in many small shards.
"""

from __future__ import annotations

import runpy
from pathlib import Path

from gossamer.plan import budget, proof
from gossamer.runtimes import torch_folder

if __name__ == "__main__":
    budget.WHOLE_COPIES = 1e9
    budget.LEAST_BUDGET, budget.SHARE_OF_WEIGHTS = 0, 0.0
    proof.samples_memory = lambda job, step: 0  # type: ignore[assignment]
    torch_folder.MAX_SHARD_BYTES = 24 << 10
    runpy.run_path(str(Path(__file__).parent / "brief_gossamer.py"), run_name="__main__")
