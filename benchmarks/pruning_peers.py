"""Torch-Pruning on models of transformers, as its documentation says: groups from the traced graph, cut at once.

Its importances are tried on three scopes: channels of the feed-forward networks, those and heads, and everything that
its graph couples (the hidden width too). What needs gradients has them of the task's loss on our calibration rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from peer import GRAPH, Material, Peer

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from gossamer.models.source import Source
    from gossamer.tasks.base import Batch, Task

WIDENING = ("up_proj", "gate_proj", "intermediate.dense")
HEADS = ("classifier", "lm_head", "score")


@dataclass(frozen=True)
class TorchPruning(Peer):
    """Cut `share` of the units of a scope, the same share in every layer, chosen by one of its importances."""

    importance: Literal["magnitude", "taylor", "hessian"]
    scope: Literal["ffn", "ffn+heads", "all"]
    share: float
    served_by: Literal["onnxruntime", "torch"] = "onnxruntime"  # torch: where the config can say the smaller shapes

    needs: ClassVar[tuple[str, ...]] = ("torch_pruning",)

    @property
    def label(self) -> str:
        """Return its row's name."""
        return f"Torch-Pruning {self.importance}, {self.scope} less {100 * self.share:g} %"

    @property
    def runtime(self) -> str:
        """Return the plain session, or our opener of Hugging Face folders."""
        return "peer:OnnxFile" if self.served_by == "onnxruntime" else "torch"

    def quantize(self, material: Material, out: Path) -> float:
        """Cut and write the graph, or a Hugging Face folder; return the seconds of choosing and cutting."""
        import torch

        from gossamer.plan.prepare import Inputs, prepare

        prepared = prepare(
            Inputs(
                model=material.model,
                task=material.task,
                data=material.data,
                evaluation=material.evaluation,
                task_settings=material.task_settings,
                calibration_rows=material.calibration_rows,
                evaluation_rows=8,
            )
        )
        task, source = prepared.task, prepared.source
        rows = task.calibration(prepared.calibration, source, material.calibration_rows)
        module: Any = source.module(task).eval().requires_grad_(True)
        torch.manual_seed(0)
        began = time.monotonic()
        self.cut(module, task, rows)
        seconds = time.monotonic() - began
        module.zero_grad(set_to_none=True)
        module.requires_grad_(False)
        if self.served_by == "torch":
            module.config.intermediate_size = next(linear_of(module, WIDENING)).out_features
            module.save_pretrained(out)
        else:
            write_graph(module, source, task, rows[0], out)
        return seconds

    def cut(self, module: PreTrainedModel, task: Task, rows: Sequence[Batch]) -> None:
        """Cut a module in place."""
        import torch_pruning as tp

        kinds: Mapping[str, Callable[[], Any]] = {
            "magnitude": tp.importance.GroupMagnitudeImportance,
            "taylor": tp.importance.GroupTaylorImportance,
            "hessian": tp.importance.GroupHessianImportance,
        }
        importance = kinds[self.importance]()
        heads = {} if self.scope == "ffn" else dict(heads_of(module))
        pruner = tp.pruner.BasePruner(
            module,
            example_inputs=tensors(rows[0]),
            importance=importance,
            pruning_ratio=self.share if self.scope == "all" else 0.0,
            pruning_ratio_dict={} if self.scope == "all" else dict.fromkeys(linear_of(module, WIDENING), self.share),
            ignored_layers=list(self.left_alone(module)),
            num_heads=heads,
            prune_num_heads=bool(heads),
            prune_head_dims=False,
            head_pruning_ratio=self.share if heads else 0.0,
            forward_fn=lambda network, inputs: network(**inputs)[task.output],
            output_transform=lambda logits: logits.sum(),
        )
        if self.importance != "magnitude":
            for row in rows:
                task.loss(module(**tensors(row)), row).backward()
                if self.importance == "hessian":
                    importance.accumulate_grad(module)
                    module.zero_grad(set_to_none=False)  # it puts its sums into gradients that are there
        for group in pruner.step(interactive=True):
            group.prune()
        for part in module.modules():
            if (query := getattr(part, "query", None)) in pruner.num_heads:
                part.num_attention_heads = pruner.num_heads[query]
                part.all_head_size = query.out_features

    def left_alone(self, module: nn.Module) -> Iterator[nn.Module]:
        """Yield what no group is looked for from: of a language model's stream that takes more than eight minutes."""
        from torch import nn

        yield from (part for name in HEADS if (part := getattr(module, name, None)) is not None)
        if self.scope == "ffn":
            widening = set(linear_of(module, WIDENING))
            yield from (part for part in module.modules() if isinstance(part, nn.Linear) and part not in widening)


def tensors(batch: Batch) -> dict[str, Any]:
    """Return a batch's inputs as tensors."""
    import torch

    return {name: torch.from_numpy(array) for name, array in batch.inputs.items()}


def heads_of(module: nn.Module) -> Iterator[tuple[nn.Module, int]]:
    """Yield the projections whose outputs are heads, with how many."""
    for part in module.modules():
        if hasattr(part, "num_attention_heads") and hasattr(part, "query"):
            for projection in (part.query, part.key, part.value):
                yield projection, part.num_attention_heads


def linear_of(module: nn.Module, endings: tuple[str, ...]) -> Iterator[nn.Linear]:
    """Yield the linear layers whose name ends so."""
    from torch import nn

    for name, part in module.named_modules():
        if isinstance(part, nn.Linear) and name.endswith(endings):
            yield part


def write_graph(module: PreTrainedModel, source: Source, task: Task, row: Batch, out: Path) -> None:
    """Export the module to out/model.onnx as the original is exported, constants folded."""
    import onnx_ir
    from onnxruntime.quantization.shape_inference import quant_pre_process

    from gossamer.runtimes.base import ExportRequest
    from gossamer.runtimes.onnx_graph import base_graph

    axes = {name: task.input_axes.get(name, {0: "batch"}) for name in row.inputs}
    cache = out / "cache"
    cache.mkdir()
    request = ExportRequest(task=task, example=row.inputs, axes=axes, outputs=(task.output,), cache=cache)
    onnx_ir.save(base_graph(module, source, request), cache / GRAPH)
    quant_pre_process(cache / GRAPH, out / GRAPH, skip_symbolic_shape=True)
