"""The float32 ONNX graph that all ONNX and OpenVINO peers start from: torch's export, as ours starts from it too."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from peer import EXPORTED, GRAPH, Material, Peer


@dataclass(frozen=True)
class OnnxFloat32(Peer):
    """Export as gossamer does, before it changes anything; then ONNX Runtime's own preparation for quantization.

    Folding puts each weight straight beside its MatMul, where ONNX Runtime's quantizers look for it (and makes a second
    copy of a table that embedding and head share); OpenVINO needs no folding and reads the export as it came.
    """

    needs: ClassVar[tuple[str, ...]] = ("onnx", "onnxscript", "onnxruntime")

    @property
    def label(self) -> str:
        """Return its row's name."""
        return "ONNX Runtime fp32"

    @property
    def runtime(self) -> str:
        """Return the plain session."""
        return "peer:OnnxFile"

    def quantize(self, material: Material, out: Path) -> None:
        """Write model.onnx."""
        import onnx_ir
        from onnxruntime.quantization.shape_inference import quant_pre_process

        from gossamer.models.source import Source
        from gossamer.runtimes.base import ExportRequest
        from gossamer.runtimes.onnx_graph import base_graph
        from gossamer.tasks import get_task

        task = get_task(material.task, **material.task_settings)
        example = material.calibration()[0]
        exported, cache = out / EXPORTED, out / EXPORTED / "cache"
        cache.mkdir(parents=True)
        axes = {name: task.input_axes.get(name, {0: "batch"}) for name in example}
        request = ExportRequest(task=task, example=example, axes=axes, outputs=(task.output,), cache=cache)
        source = Source.open(material.model)
        onnx_ir.save(base_graph(source.module(task), source, request), exported / GRAPH)
        # symbolic shape inference fails on graphs of torch's new exporter, and the quantizers do not need it
        quant_pre_process(exported / GRAPH, out / GRAPH, skip_symbolic_shape=True)
