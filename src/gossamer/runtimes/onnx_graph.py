"""The ONNX graph of a model before anything is lowered: exported once for each structure, filled for each candidate.

torch's own exporter takes most of the time that writing an artifact costs (13 s for a six-layer encoder), and what it
finds does not depend on the weights. So the graph is kept without weights in the request's cache folder, keyed by
everything that shapes it, and each candidate only puts its values in (a fraction of a second).

What a caller may rely on:

- every parameter and buffer that the graph uses is an initializer under its own name in the module
  (`bert.encoder.layer.0.attention.self.query.weight`); a tied parameter is one initializer, under the name that
  `named_parameters()` gives it, with several consumers;
- a linear layer is still weight -> Transpose -> MatMul -> Add (or Gemm), an embedding Gather, a convolution Conv;
- the experts of a block are one node, `gossamer::Experts`, that reads their stacked parameters (`onnx_experts.py`);
- arithmetic on shapes and other constants is folded, arithmetic on parameters is not;
- inputs carry the names of the model's arguments and the axis names of the request, outputs the names asked for.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from gossamer.errors import ArtifactError, ModelError, RuntimeUnavailable
from gossamer.models.experts import stacked_again
from gossamer.runtimes.base import ExportRequest
from gossamer.runtimes.onnx_experts import EXPORTED
from gossamer.tasks.base import Arrays

if TYPE_CHECKING:
    import onnx_ir as ir

    from gossamer.models.source import Source

LAYOUT = 3  # counts up when this file changes what it stores, so that older cache entries are not read


def base_graph(module: nn.Module, source: Source, request: ExportRequest) -> ir.Model:
    """Return the float32 graph of `module` as an onnx_ir model whose initializers hold the module's values.

    The graph is exported with `torch.onnx.export(dynamo=True, optimize=False)` and cached under `request.cache`.
    The values are views of the module's tensors: change the model, not them. Raises ModelError when torch cannot
    export the module, RuntimeUnavailable when onnx or onnxscript is missing.

    >>> model = base_graph(candidate.module, candidate.source, request)  # doctest: +SKIP
    >>> model.graph.initializers["classifier.weight"].const_value.numpy().shape  # doctest: +SKIP
    (2, 384)
    """
    try:
        import onnx_ir as ir
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise RuntimeUnavailable(
            f"exporting to ONNX needs the package {error.name}", 'pip install "gossamer[onnxruntime]"'
        ) from error
    with stacked_again(module, EXPORTED):
        path = request.cache / f"graph-{structure_key(module, source, request)}.onnx"
        if not path.exists():
            model = export_structure(module, source, request)
            drop_values(model, tensors_of(module))
            _publish(model, path)
        model = ir.load(path)
        fill_values(model, tensors_of(module))
    return model


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer by name; tied ones once, under their first name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def structure_key(module: nn.Module, source: Source, request: ExportRequest) -> str:
    """Return a hash of all that shapes the graph: modules, tensor shapes, settings, inputs, axes, versions."""
    config: Any = getattr(module, "config", None)
    described = {
        "layout": LAYOUT,
        "source": source.fingerprint,
        "modules": repr(module),
        "tensors": {name: [str(t.dtype), list(t.shape)] for name, t in tensors_of(module).items()},
        "config": config.to_json_string() if hasattr(config, "to_json_string") else "",
        "inputs": {
            name: [str(a.dtype), [n for i, n in enumerate(a.shape) if i not in request.axes.get(name, {})]]
            for name, a in request.example.items()
        },
        "axes": {name: {str(i): axis for i, axis in axes.items()} for name, axes in request.axes.items()},
        "outputs": list(request.outputs),
        "versions": [version(package) for package in ("torch", "onnxscript", "onnx-ir")],
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:32]


class _Outputs(nn.Module):
    """Call the model with a dict of inputs and return only the outputs asked for."""

    def __init__(self, module: nn.Module, source: Source, request: ExportRequest) -> None:
        super().__init__()
        self.model = module
        self.source = source
        self.outputs = request.outputs
        self.alike = _axes_alike(request)
        settings = inspect.signature(module.forward).parameters
        self.settings = {"use_cache": False} if source.config is not None and "use_cache" in settings else {}
        self.eval()

    def forward(self, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        for (name, axis), (other, other_axis) in self.alike:
            torch._check(inputs[name].shape[axis] == inputs[other].shape[other_axis])  # type: ignore[no-untyped-call]
        arguments: dict[str, Any] = {**inputs, **self.settings}
        return tuple(self.source.forward(self.model, arguments, output) for output in self.outputs)


def _axes_alike(request: ExportRequest) -> list[tuple[tuple[str, int], tuple[str, int]]]:
    """Return pairs of (input, axis) that bear one name: telling torch that they are equal keeps the graph small."""
    first: dict[str, tuple[str, int]] = {}
    pairs = []
    for name in request.example:
        for axis, label in sorted(request.axes.get(name, {}).items()):
            if label in first:
                pairs.append((first[label], (name, axis)))
            else:
                first[label] = (name, axis)
    return pairs


def export_structure(module: nn.Module, source: Source, request: ExportRequest) -> ir.Model:
    """Return the exported graph with names in place and constants (but no parameter) folded; costs seconds."""
    inputs = {name: torch.from_numpy(array) for name, array in _traceable(request).items()}
    axes = {name: dict.fromkeys(request.axes.get(name, {}), torch.export.Dim.DYNAMIC) for name in inputs}
    wrapper = _Outputs(module, source, request)
    try:
        with torch.no_grad(), _quiet():
            program = torch.onnx.export(
                wrapper, (), kwargs={"inputs": inputs}, dynamic_shapes={"inputs": axes}, dynamo=True, optimize=False,
                verbose=False,
            )  # fmt: skip
    except torch.onnx.OnnxExporterError as error:
        raise ModelError(
            f"torch cannot export {source.name} to ONNX: {str(error).strip().splitlines()[-1][:300]}",
            "choose the runtime torch, or change the model's forward so that torch.export can trace it",
        ) from error
    assert program is not None
    model = program.model
    _name_tensors(model, module)
    _name_axes(model, request)
    _fold_shapes(model, tensors_of(module))
    _drop_notes(model)
    return model


def _traceable(request: ExportRequest) -> Arrays:
    """Return the example with every varying axis at least 2 long: torch.export freezes axes of length 1."""
    arrays = {}
    for name, array in request.example.items():
        for axis in request.axes.get(name, {}):
            if array.shape[axis] < 2:
                array = np.concatenate([array, array], axis=axis)
        arrays[name] = np.ascontiguousarray(array)
    return arrays


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's notes (torchvision is absent, side effects seen) off the user's screen."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _name_tensors(model: ir.Model, module: nn.Module) -> None:
    """Give initializers the names of the module's own tensors; a tied one gets the first of its names."""
    first = {id(tensor): name for name, tensor in reversed(list(tensors_of(module).items()))}
    every = {
        name: first[id(tensor)]
        for named in (module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
        for name, tensor in named
    }
    initializers = model.graph.initializers
    for name in list(initializers):
        own = every.get(name.removeprefix("model."), name)
        if own != name and own not in initializers:
            value = initializers.pop(name)
            value.name = own
            if value.const_value is not None:
                value.const_value.name = own
            initializers[own] = value
        elif own != name:
            initializers[name].replace_all_uses_with(initializers[own])
            del initializers[name]


def _name_axes(model: ir.Model, request: ExportRequest) -> None:
    """Name inputs, outputs and their axes as the request does instead of `inputs_input_ids`, `s72`."""
    import onnx_ir as ir

    labels: dict[str, str] = {}
    for value in model.graph.inputs:
        name = (value.name or "").removeprefix("inputs_")
        value.name = name
        for axis, label in request.axes.get(name, {}).items():
            assert value.shape is not None
            if isinstance(value.shape[axis], ir.SymbolicDim):
                labels.setdefault(str(value.shape[axis]), label)
    for value in [*model.graph.inputs, *model.graph.outputs]:
        if value.shape is not None:
            dims = [labels.get(str(d), str(d)) if isinstance(d, ir.SymbolicDim) else d for d in value.shape]
            value.shape = ir.Shape(dims)
    for value, name in zip(model.graph.outputs, request.outputs, strict=True):
        value.name = name


def _fold_shapes(model: ir.Model, tensors: Mapping[str, Tensor]) -> None:
    """Fold everything that no parameter, buffer or input enters, and drop what nothing uses."""
    from onnxscript import optimizer

    held = {}
    for name, value in model.graph.initializers.items():
        if name in tensors:
            held[name], value.const_value = value.const_value, None
    with _quiet():
        optimizer.optimize_ir(model, input_size_limit=1 << 16, output_size_limit=1 << 20)
    for name, const in held.items():
        if name in model.graph.initializers:
            model.graph.initializers[name].const_value = const


def _drop_notes(model: ir.Model) -> None:
    """Drop the exporter's notes (a stack trace for each node, with paths of this machine)."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()


def drop_values(model: ir.Model, tensors: Mapping[str, Tensor]) -> None:
    """Replace the values of the module's tensors by references to nothing: what is left is the structure."""
    import onnx_ir as ir

    for name, value in model.graph.initializers.items():
        if name in tensors and value.const_value is not None:
            kept = value.const_value
            value.const_value = ir.ExternalTensor(
                "module", 0, kept.nbytes, kept.dtype, shape=ir.Shape(kept.shape.numpy()), name=name, base_dir=""
            )


def fill_values(model: ir.Model, tensors: Mapping[str, Tensor]) -> None:
    """Put the module's values into the initializers that bear their names. Raises ArtifactError for a gap."""
    import onnx_ir as ir

    for name, value in model.graph.initializers.items():
        if not isinstance(value.const_value, ir.ExternalTensor):
            continue
        if name not in tensors or tuple(tensors[name].shape) != tuple(value.const_value.shape):
            found = f"is {tuple(tensors[name].shape)}" if name in tensors else "does not exist"
            raise ArtifactError(
                f"the cached graph wants {name} as {tuple(value.const_value.shape)}, in the model it {found}",
                "delete the cache folder of this run",
            )
        array = tensors[name].detach()
        array = array.float() if array.is_floating_point() else array
        value.const_value = ir.tensor(array.cpu().contiguous().numpy(), name=name)


def _publish(model: ir.Model, path: Path) -> None:
    """Write the cache entry beside its place, then rename: a killed run leaves no half graph behind."""
    import onnx_ir as ir

    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(ir.to_proto(model).SerializeToString(deterministic=True))
        Path(name).replace(path)
    except OSError as error:
        raise ArtifactError(
            f"cannot write {path}: {error.strerror}", "free space there, or choose another folder"
        ) from error
    finally:
        Path(name).unlink(missing_ok=True)
