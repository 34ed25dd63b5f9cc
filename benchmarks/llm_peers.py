"""Other tools that round the weights of a language model. One class a tool; its fields are what can be chosen.

A tool that needs an environment of its own gets its class here too: `quantize` imports it inside, `--python NAME=PATH`
names the interpreter, and `runtime` says which of our runtimes (or which class in peer.py) opens what it writes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from peer import GRAPH, IR, Material, Peer


@dataclass(frozen=True)
class OnnxNBits(Peer):
    """ONNX Runtime's MatMulNBits quantizer: round to nearest, in blocks; `embeddings` rounds the Gather's table too.

    It works on the folded graph, in which an output layer that shares the embedding's table has a copy of its own.
    """

    bits: int = 4
    block_size: int = 32
    symmetric: bool = False
    embeddings: bool = False

    needs: ClassVar[tuple[str, ...]] = ("onnx", "onnxruntime", "onnx_ir")
    uses_graph: ClassVar[bool] = True

    @property
    def label(self) -> str:
        """Return its row's name."""
        kind = "symmetric" if self.symmetric else "asymmetric"
        return f"ONNX Runtime int{self.bits} g{self.block_size} {kind}{', embeddings too' if self.embeddings else ''}"

    @property
    def runtime(self) -> str:
        """Return the plain session."""
        return "peer:OnnxFile"

    def quantize(self, material: Material, out: Path) -> None:
        """Write model.onnx."""
        import onnx
        from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

        operators = ("MatMul", "Gather") if self.embeddings else ("MatMul",)
        config = DefaultWeightOnlyQuantConfig(
            bits=self.bits, block_size=self.block_size, is_symmetric=self.symmetric, op_types_to_quantize=operators
        )
        quantizer = MatMulNBitsQuantizer(onnx.load(material.graph_file()), algo_config=config)
        quantizer.process()
        onnx.save(quantizer.model.model, out / GRAPH)


@dataclass(frozen=True)
class NncfWeights(Peer):
    """`nncf.compress_weights` on OpenVINO's graph: int8, or int4 in groups with first and last layer in int8.

    `data_aware` adds what it offers with calibration rows: AWQ and scale estimation.
    """

    mode: str = "int8_asym"
    group_size: int | None = None
    data_aware: bool = False

    needs: ClassVar[tuple[str, ...]] = ("openvino", "nncf")
    uses_graph: ClassVar[bool] = True

    @property
    def label(self) -> str:
        """Return its row's name."""
        group = f" g{self.group_size}" if self.group_size else ""
        return f"OpenVINO + NNCF {self.mode}{group}{', AWQ, scale estimation' if self.data_aware else ''}"

    @property
    def runtime(self) -> str:
        """Return the plain compiled model."""
        return "peer:OpenVinoFile"

    def quantize(self, material: Material, out: Path) -> None:
        """Write the IR."""
        import nncf
        import openvino as ov

        settings: dict[str, Any] = {"mode": nncf.CompressWeightsMode(self.mode)}
        if self.group_size:
            settings |= {"group_size": self.group_size, "ratio": 1.0}
        if self.data_aware:
            rows = material.calibration()
            settings |= {"dataset": nncf.Dataset(rows), "subset_size": len(rows), "awq": True, "scale_estimation": True}
        model = nncf.compress_weights(ov.convert_model(material.graph_file(folded=False)), **settings)
        ov.save_model(model, out / IR, compress_to_fp16=False)
