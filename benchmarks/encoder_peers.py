"""Other tools that quantize an encoder, each as its documentation says, with 7-bit weights where 8 would saturate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from peer import GRAPH, IR, Material, Peer, has_int8_dot


@dataclass(frozen=True)
class TorchDynamic(Peer):
    """PyTorch's own dynamic quantization. Nothing is written: the original's files are rounded when they are opened."""

    needs: ClassVar[tuple[str, ...]] = ("torch", "transformers")

    @property
    def label(self) -> str:
        """Return its row's name."""
        return "PyTorch dynamic int8"

    @property
    def runtime(self) -> str:
        """Return the class that rounds while opening."""
        return "peer:TorchDynamicInt8"

    def quantize(self, material: Material, out: Path) -> None:
        """Link the original's files."""
        from gossamer.models.source import Source

        for path in Source.open(material.model).shipped_files():
            (out / path.name).symlink_to(path.resolve())


@dataclass(frozen=True)
class SmallWeightsZeroed(Peer):
    """The textbook's pruning: every weight whose magnitude is below a threshold is set to zero, and the model is saved.

    `rounded`: PyTorch's dynamic quantization after it, when the files are opened.
    """

    threshold: float = 0.01
    rounded: bool = False

    needs: ClassVar[tuple[str, ...]] = ("torch", "transformers")

    @property
    def label(self) -> str:
        """Return its row's name."""
        return f"weights below {self.threshold:g} set to zero" + (", then PyTorch dynamic int8" if self.rounded else "")

    @property
    def runtime(self) -> str:
        """Return what opens a Hugging Face folder: as it is, or rounding while it opens."""
        return "peer:TorchDynamicInt8" if self.rounded else "torch"

    def quantize(self, material: Material, out: Path) -> None:
        """Write the folder."""
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        model = AutoModelForSequenceClassification.from_pretrained(material.model, local_files_only=True)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter[parameter.abs() < self.threshold] = 0
        model.save_pretrained(out)
        AutoTokenizer.from_pretrained(material.model, local_files_only=True).save_pretrained(out)


@dataclass(frozen=True)
class OnnxDynamic(Peer):
    """`onnxruntime.quantization.quantize_dynamic`, per channel, `reduce_range` where there is no VNNI.

    `optimizer`: onnxruntime.transformers fuses attention, layer norms and GELU first.
    """

    optimizer: bool = False
    reduce_range: bool = not has_int8_dot()

    needs: ClassVar[tuple[str, ...]] = ("onnx", "onnxruntime")
    uses_graph: ClassVar[bool] = True

    @property
    def label(self) -> str:
        """Return its row's name."""
        fused = " after its transformer optimizer" if self.optimizer else ""
        return f"ONNX Runtime quantize_dynamic{fused}" + (" (reduce_range)" if self.reduce_range else "")

    @property
    def runtime(self) -> str:
        """Return the plain session."""
        return "peer:OnnxFile"

    def quantize(self, material: Material, out: Path) -> None:
        """Write model.onnx."""
        from onnxruntime.quantization import quantize_dynamic

        graph: Any = material.graph_file()
        if self.optimizer:
            from onnxruntime.transformers.optimizer import optimize_model

            graph = optimize_model(str(graph), model_type="bert", opt_level=0).model
        quantize_dynamic(graph, out / GRAPH, per_channel=True, reduce_range=self.reduce_range)


@dataclass(frozen=True)
class OnnxStatic(Peer):
    """`onnxruntime.quantization.quantize_static` in QDQ format, per channel, calibrated by extremes.

    `operators` names what is rounded: empty is the library's default (nearly everything).
    """

    operators: tuple[str, ...] = ()
    reduce_range: bool = not has_int8_dot()

    needs: ClassVar[tuple[str, ...]] = ("onnx", "onnxruntime")
    uses_graph: ClassVar[bool] = True

    @property
    def label(self) -> str:
        """Return its row's name."""
        which = f", {' '.join(self.operators)}" if self.operators else ""
        return f"ONNX Runtime quantize_static QDQ{which}" + (" (reduce_range)" if self.reduce_range else "")

    @property
    def runtime(self) -> str:
        """Return the plain session."""
        return "peer:OnnxFile"

    def quantize(self, material: Material, out: Path) -> None:
        """Write model.onnx."""
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

        class Reader(CalibrationDataReader):  # type: ignore[misc]  # the library is untyped
            """Hand out calibration inputs one by one, then None."""

            def __init__(self, rows: list[dict[str, Any]]) -> None:
                self.rows: Iterator[dict[str, Any]] = iter(rows)

            def get_next(self) -> dict[str, Any] | None:
                """Return the next row."""
                return next(self.rows, None)

        quantize_static(
            material.graph_file(),
            out / GRAPH,
            Reader(material.calibration()),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=self.reduce_range,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=list(self.operators) or None,
        )


@dataclass(frozen=True)
class OpenVinoFloat32(Peer):
    """The unchanged model as OpenVINO reads it from ONNX."""

    needs: ClassVar[tuple[str, ...]] = ("openvino",)
    uses_graph: ClassVar[bool] = True

    @property
    def label(self) -> str:
        """Return its row's name."""
        return "OpenVINO fp32"

    @property
    def runtime(self) -> str:
        """Return the plain compiled model, held to float32."""
        return "peer:OpenVinoFloat32File"

    def quantize(self, material: Material, out: Path) -> None:
        """Write the IR in float32."""
        import openvino as ov

        ov.save_model(ov.convert_model(material.graph_file(folded=False)), out / IR, compress_to_fp16=False)


@dataclass(frozen=True)
class NncfQuantize(Peer):
    """`nncf.quantize` for transformers: mixed preset, SmoothQuant and fast bias correction, its defaults for these.

    `overflow_fix` keeps weights to 7 bits, as NNCF's documentation asks for on processors without VNNI.
    """

    overflow_fix: bool = not has_int8_dot()

    needs: ClassVar[tuple[str, ...]] = ("openvino", "nncf")
    uses_graph: ClassVar[bool] = True

    @property
    def label(self) -> str:
        """Return its row's name."""
        return "OpenVINO + NNCF int8" + (" (overflow fix)" if self.overflow_fix else "")

    @property
    def runtime(self) -> str:
        """Return the plain compiled model."""
        return "peer:OpenVinoFloat32File"

    def quantize(self, material: Material, out: Path) -> None:
        """Write the IR."""
        import nncf
        import openvino as ov
        from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, OverflowFix

        rows = material.calibration()
        quantized = nncf.quantize(
            ov.convert_model(material.graph_file(folded=False)),
            nncf.Dataset(rows),
            preset=nncf.QuantizationPreset.MIXED,
            target_device=nncf.TargetDevice.CPU,
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(rows),
            advanced_parameters=AdvancedQuantizationParameters(
                overflow_fix=OverflowFix.ENABLE if self.overflow_fix else OverflowFix.DISABLE
            ),
        )
        ov.save_model(quantized, out / IR, compress_to_fp16=False)
