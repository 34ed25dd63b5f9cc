"""Describe a model for a reader: what it is, what it is made of, and what can be done to it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from gossamer.models import checkpoint
from gossamer.models.purpose import named
from gossamer.models.roles import Dimension, LayerInfo, ModelMap
from gossamer.models.source import Purpose, Source
from gossamer.models.structure import map_model

TASK_OF_HEAD = {  # the ending of a class name in `architectures` -> what the model is for
    "ForSequenceClassification": "text-classification",
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForImageClassification": "image-classification",
    "ForSpeechSeq2Seq": "speech-recognition",
    "ForCTC": "speech-recognition",
    "ForAudioClassification": "audio-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "masked-lm",
    "ForObjectDetection": "object-detection",
    "ForConditionalGeneration": "sequence-to-sequence",
    "Model": "feature-extraction",
}
QUANTIZABLE = ("linear", "conv", "embedding")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RoleRow(_Frozen):
    """Hold one row of the table of layers: everything of one role. `share` is of all parameters, 0 to 1."""

    role: str
    num_layers: int
    num_parameters: int
    num_bytes: int
    share: float
    macs: int
    shapes: dict[str, int]  # "384x1536" -> how many layers have it
    example: str


class StackRow(_Frozen):
    """Describe a stack of like blocks; `share` is its part of all parameters, 0 to 1."""

    name: str
    kind: str
    num_blocks: int
    num_parameters_per_block: int
    share: float


class Option(_Frozen):
    """Say how many layers and parameters a technique can take hold of in this model; `share` is 0 to 1."""

    family: str
    num_layers: int
    num_parameters: int
    share: float


class CutRow(_Frozen):
    """Say what can be cut out: `places` that have `units` each, and the numbers of config.json that say how many.

    `said_by` is empty where no config says it: then only a runtime that holds a graph can hold the smaller model.
    """

    what: str
    where: str
    places: int
    units: int
    said_by: tuple[str, ...]
    example: str


class ModelCard(_Frozen):
    """Describe a model: all fields are JSON-able.

    `num_bytes` is the size in memory as float32, `dtypes` and `shipped_bytes` what lies in the files; `macs` are the
    multiply-accumulates of one `request` (its shapes by input; None when it was made up, then a note says it).
    """

    name: str
    path: str | None
    fingerprint: str
    architecture: str
    task: str | None
    labels: tuple[str, ...] | None
    num_parameters: int
    num_bytes: int
    shipped_bytes: int | None
    dtypes: dict[str, int]  # dtype in the file, or in memory for a network -> bytes
    quantization: str | None
    request: dict[str, tuple[int, ...]] | None
    macs: int
    roles: tuple[RoleRow, ...]
    stacks: tuple[StackRow, ...]
    tied: dict[str, str]
    options: tuple[Option, ...]
    cuts: tuple[CutRow, ...]
    left_out: dict[str, str]  # names -> why quantization leaves them as they are
    notes: tuple[str, ...]


def describe(source: Source, task: Purpose | None = None, example: Mapping[str, Tensor] | None = None) -> ModelCard:
    """Return the card of a model, opened with the task's class or else with the class that its config names.

    MACs are of `example` (inputs by name), or of a request made up from the config, which a note then names.
    Raises ModelError when the model cannot be opened.

    >>> describe(Source.open("./my-bert")).task  # doctest: +SKIP
    'text-classification'
    """
    module = source.native_module() if task is None else source.module(task)
    model = map_model(module, example, source.forward_function)
    architecture = type(module).__name__
    stored = _stored_bytes(source) or dict(_bytes_in_memory(module.parameters()))
    return ModelCard(
        name=source.name,
        path=None if source.path is None else str(source.path),
        fingerprint=source.fingerprint,
        architecture=architecture,
        task=task.name if task is not None else guess_task(architecture, source),
        labels=source.labels,
        num_parameters=model.num_parameters,
        num_bytes=model.num_bytes,
        shipped_bytes=None if source.path is None else sum(path.stat().st_size for path in source.shipped_files()),
        dtypes=stored,
        quantization=source.quantization,
        request=None if example is None else {name: tuple(tensor.shape) for name, tensor in example.items()},
        macs=model.macs,
        roles=tuple(_role_rows(model)),
        stacks=tuple(_stack_rows(model)),
        tied={layer.name: layer.tied_to for layer in model.layers if layer.tied_to is not None},
        options=tuple(_options(model)),
        cuts=tuple(_cuts(model)),
        left_out=_left_out(model),
        notes=model.notes,
    )


def guess_task(architecture: str, source: Source) -> str | None:
    """Return what a model of that class is for, from the ending of the class name, or None."""
    if source.config is None:
        return None
    sound = hasattr(source.config, "num_mel_bins")
    for ending, task in TASK_OF_HEAD.items():
        if architecture.endswith(ending):
            return "speech-recognition" if sound and ending == "ForConditionalGeneration" else task
    return None


def _stored_bytes(source: Source) -> dict[str, int]:
    """Return bytes by dtype as the safetensors headers spell it."""
    total: Counter[str] = Counter()
    for path in checkpoint.weight_files(source.path) if source.path is not None else ():
        for tensor in checkpoint.read_safetensors_header(path).values():
            total[tensor.dtype] += tensor.num_bytes
    return dict(total)


def _bytes_in_memory(parameters: Iterable[Tensor]) -> Counter[str]:
    total: Counter[str] = Counter()
    for tensor in parameters:
        total[str(tensor.dtype).removeprefix("torch.")] += tensor.numel() * tensor.element_size()
    return total


def _role_rows(model: ModelMap) -> list[RoleRow]:
    width = model.num_bytes / max(model.num_parameters, 1)
    by_role: dict[str, list[LayerInfo]] = {}
    for layer in model.layers:
        by_role.setdefault(layer.role, []).append(layer)
    rows = []
    for role, layers in by_role.items():
        count = sum(layer.num_parameters for layer in layers)
        shapes = Counter("x".join(map(str, layer.shape)) for layer in layers)
        rows.append(
            RoleRow(
                role=role,
                num_layers=len(layers),
                num_parameters=count,
                num_bytes=round(count * width),
                share=count / max(model.num_parameters, 1),
                macs=sum(layer.macs for layer in layers),
                shapes=dict(shapes),
                example=layers[0].name,
            )
        )
    return sorted(rows, key=lambda row: -row.num_parameters)


def _stack_rows(model: ModelMap) -> list[StackRow]:
    inside: Counter[str] = Counter()
    for layer in model.layers:
        if layer.stack is not None:
            inside[layer.stack] += layer.num_parameters
    return [
        StackRow(
            name=stack.name,
            kind=stack.kind,
            num_blocks=stack.num_blocks,
            num_parameters_per_block=stack.num_parameters,
            share=inside[stack.name] / max(model.num_parameters, 1),
        )
        for stack in model.stacks
    ]


def _options(model: ModelMap) -> list[Option]:
    """Return what quantization and casting can take hold of: each weight once."""
    options = []
    for kind in QUANTIZABLE:
        layers = [
            layer for layer in model.layers if layer.kind == kind and layer.tied_to is None and layer.role != "router"
        ]
        if layers:
            options.append(_option(f"quantize {kind}", len(layers), sum(math.prod(x.shape) for x in layers), model))
    options.append(_option("cast to bf16 or fp16", len(model.layers), model.num_parameters, model))
    return options


def _cuts(model: ModelMap) -> list[CutRow]:
    """Return what can be cut out, alike places together."""
    alike: dict[tuple[object, ...], list[Dimension]] = {}
    for one in model.dimensions:
        alike.setdefault((one.kind, one.stack, one.size, one.attributes), []).append(one)
    return [
        CutRow(
            what=ones[0].kind,
            where=ones[0].stack,
            places=len(ones),
            units=ones[0].size,
            said_by=ones[0].attributes or (),
            example=ones[0].name,
        )
        for ones in alike.values()
    ]


def _option(family: str, num_layers: int, num_parameters: int, model: ModelMap) -> Option:
    share = num_parameters / max(model.num_parameters, 1)
    return Option(family=family, num_layers=num_layers, num_parameters=num_parameters, share=share)


def _left_out(model: ModelMap) -> dict[str, str]:
    """Return the layers that quantization leaves as they are, with the reason."""
    reasons = {
        "shares its weight with an earlier layer and follows it": [
            layer.name for layer in model.layers if layer.tied_to is not None
        ],
        "a router decides which expert a token is sent to: rounded only where a recipe names it": [
            layer.name for layer in model.layers if layer.role == "router"
        ],
        "a norm is one number a channel: nothing to gain below 16 bits": [
            layer.name for layer in model.layers if layer.kind == "norm"
        ],
        "no linear layer, convolution or embedding: not rounded below 16 bits": [
            layer.name or "the model itself"
            for layer in model.layers
            if layer.kind == "other" and not layer.tied_to and layer.role != "router"
        ],
    }
    return {named(names): reason for reason, names in reasons.items() if names}
