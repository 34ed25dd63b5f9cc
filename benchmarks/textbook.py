"""The textbook's exercise on a BERT (small weights to zero, then quantize) beside what does make it small and fast.

    python benchmarks/textbook.py --model DIR --data train.jsonl --eval test.jsonl [--tokens 128] [--rows 500]

The same table as encoder.py's, with other entries, and what zeros do to the bytes of a file, plain and compressed.
docs/guides/bert.md tells the story.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from encoder import compare, parsed
from encoder_peers import SmallWeightsZeroed, TorchDynamic
from ours import GossamerOnGraph
from peer import Peer, has_int8_dot
from results import table
from safetensors import safe_open

THRESHOLDS = (0.01, 0.05)


def contenders() -> list[Peer]:
    """Return the textbook's steps alone and together, then ours: rounding, and cutting with distillation before it."""
    bits = 8 if has_int8_dot() else 7
    rounding = (
        {"quantize": {"bits": bits, "activations": "dynamic"}},
        {"quantize": {"bits": 8, "targets": ["embedding"]}},
    )
    cutting = ({"prune": {"what": "heads", "to": "50%"}}, {"prune": {"what": "ffn", "to": "62%"}}, {"distill": {}})
    return [
        *(SmallWeightsZeroed(threshold) for threshold in THRESHOLDS),
        TorchDynamic(),
        SmallWeightsZeroed(THRESHOLDS[0], rounded=True),
        GossamerOnGraph("onnxruntime", rounding, f"int{bits}, embeddings int8"),
        GossamerOnGraph("onnxruntime", (*cutting, *rounding), f"heads 50%, ffn 62%, distilled, int{bits}"),
    ]


def bytes_of_zeros(model: Path) -> str:
    """Return a table of what share of the weights is below each threshold, and the bytes with them set to zero."""
    rows = []
    for threshold in (0.0, *THRESHOLDS):
        total = zeros = plain = packed = 0
        for values in weights(model):
            kept = torch.where(values.abs() < threshold, 0.0, values)
            content = kept.numpy().tobytes()
            total, zeros = total + kept.numel(), zeros + int((kept == 0).sum())
            plain, packed = plain + len(content), packed + len(zlib.compress(content, 6))
        name = f"below {threshold:g} set to zero" if threshold else "as they are"
        rows.append([name, f"{100 * zeros / total:.1f} %", f"{plain / 1e6:.1f}", f"{packed / 1e6:.1f}"])
    return table(("weights", "zeros", "MB", "MB, zlib"), rows)


def weights(model: Path) -> Iterator[torch.Tensor]:
    """Yield the floating-point tensors of a folder, one at a time."""
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - the file is no mapping
                values = file.get_tensor(name)
                if values.is_floating_point():
                    yield values.float()


def main() -> int:
    """Run the benchmark."""
    arguments = parsed(__doc__)
    note = "What zeros do to the bytes of the weights:\n\n" + bytes_of_zeros(arguments.model)
    return compare(arguments, contenders(), "Textbook", [note])


if __name__ == "__main__":
    sys.exit(main())
