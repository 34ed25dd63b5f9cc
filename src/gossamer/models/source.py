"""Where a model comes from: a Hugging Face folder or hub id (safetensors), or an nn.Module and its forward function."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PretrainedConfig

from gossamer.errors import ModelError, first_line
from gossamer.models import checkpoint
from gossamer.models.beside import Beside, processor_class
from gossamer.models.config import local_folder, quiet_transformers, read_config
from gossamer.models.experts import take_apart
from gossamer.models.lazy import load_buffers, without_values
from gossamer.models.places import Place, find_places, reader
from gossamer.models.shards import DTYPES, Shards

Forward = Callable[[nn.Module, dict[str, Tensor]], Tensor]


class Purpose(Protocol):
    """Name what a model is opened for: a task's name and the transformers Auto class that opens its models."""

    @property
    def name(self) -> str:
        """Return the task's name."""

    @property
    def auto_class(self) -> str:
        """Return the name of the Auto class in transformers."""


class Source:
    """Say where a model comes from, and open it as often as needed. Cheap to make: `module` reads the weights.

    `name` is the folder's name, the hub id or the class; `path` the local folder; `fingerprint` a sha256 over config
    and weights; `config` transformers' config; `labels` the class names in order, when the config names them.

    >>> source = Source.open("./my-bert")  # doctest: +SKIP
    >>> module = source.module(get_task("text-classification"))  # doctest: +SKIP
    """

    def __init__(
        self,
        name: str,
        *,
        path: Path | None = None,
        config: PretrainedConfig | None = None,
        raw_config: Mapping[str, Any] | None = None,
        trust_remote_code: bool = False,
        network: nn.Module | None = None,
        forward: Forward | None = None,
    ) -> None:
        self.name = name
        self.path = path
        self.config = config
        self.trust_remote_code = trust_remote_code
        self._raw_config = dict(raw_config or {})
        self._network = network
        self._forward = forward
        self._places: dict[str, Place] = {}  # found when the model is opened: they are the same for every head of it
        self._files: Mapping[str, bytes] = {}  # beside the weights, in place of those of the folder
        self._kept: tuple[int, ...] | None = None  # what its tokens are called by the weights, where some are gone

    @classmethod
    def open(
        cls,
        model: str | Path | nn.Module,
        *,
        forward: Forward | None = None,
        trust_remote_code: bool = False,
        name: str | None = None,
    ) -> Source:
        """Open a model folder, a hub id, or a network with the function that runs it on named inputs.

        Raises ModelError when folder, config or weights are missing or damaged, when the weights are a pickle, or when
        the model's own code would have to run and `trust_remote_code` was not given.
        """
        if isinstance(model, nn.Module):
            config = getattr(model, "config", None)
            return cls(
                name or type(model).__name__,
                config=config if isinstance(config, PretrainedConfig) else None,
                network=model,
                forward=forward,
            )
        folder = local_folder(model)
        raw = checkpoint.read_config(folder)
        config = read_config(folder, raw, trust_remote_code)
        checkpoint.weight_files(folder)
        label = name or (folder.resolve().name if Path(model).expanduser().exists() else str(model))
        return cls(label, path=folder, config=config, raw_config=raw, trust_remote_code=trust_remote_code)

    @classmethod
    def companions(cls, folder: str | Path, *, trust_remote_code: bool = False) -> Source:
        """Open what lies beside an artifact (config, labels, tokenizer, image processor), whatever holds its weights.

        `module` and `shipped_files` are not for such a source: the artifact's runtime opens its weights. Raises
        ModelError when there is a config and it cannot be read.
        """
        path = Path(folder).expanduser()
        if not (path / "config.json").exists():
            return cls(path.resolve().name, path=path, trust_remote_code=trust_remote_code)
        raw = checkpoint.read_config(path)
        config = read_config(path, raw, trust_remote_code)
        return cls(path.resolve().name, path=path, config=config, raw_config=raw, trust_remote_code=trust_remote_code)

    @cached_property
    def fingerprint(self) -> str:
        """Return the sha256 over config and weight files, or over a network's structure and state dict."""
        if self.path is not None:
            return checkpoint.hash_files([self.path / "config.json", *checkpoint.weight_files(self.path)])
        assert self._network is not None
        structure = torch.frombuffer(bytearray(repr(self._network).encode()), dtype=torch.uint8)
        return checkpoint.hash_tensors({"": structure, **self._network.state_dict()})

    @property
    def labels(self) -> tuple[str, ...] | None:
        """Return the class names in the order of the logits, or None when the config does not name them."""
        named = self._raw_config.get("id2label")
        if named is None and self._network is not None and self.config is not None:
            named = self.config.to_diff_dict().get("id2label")
        if not named:
            return None
        ordered = sorted((int(index), str(label)) for index, label in dict(named).items())
        if [index for index, _ in ordered] != list(range(len(ordered))):
            raise ModelError(
                f"id2label of {self.name} numbers its classes {[i for i, _ in ordered]}", "number them from 0"
            )
        return tuple(label for _, label in ordered)

    @property
    def forward_function(self) -> Forward | None:
        """Return the function that was given to run a network on named inputs, or None."""
        return self._forward

    @property
    def quantization(self) -> str | None:
        """Return the method that already quantized this model (`compressed-tensors`, `gptq`), or None."""
        settings = self._raw_config.get("quantization_config")
        return str(settings.get("quant_method", "unknown")) if isinstance(settings, dict) else None

    @property
    def architectures(self) -> tuple[str, ...]:
        """Return the class names that config.json says the weights belong to."""
        return tuple(self._raw_config.get("architectures") or ())

    def module(self, task: Purpose) -> nn.Module:
        """Return a fresh float32 copy of the model in eval mode, opened with the task's Auto class.

        Raises ModelError when the architecture has no such head, when weights of it are missing from the checkpoint
        (transformers would fill them with random numbers), when shapes differ, or when values are not finite.
        """
        if self._network is not None:
            return self._copy_of_network()
        return self._load(getattr(transformers, task.auto_class), f"{task.name} ({task.auto_class})")

    def skeleton(self, task: Purpose) -> nn.Module:
        """Return the model without values: parameters on the meta device, to be read from `shards` when needed.

        Raises ModelError when it cannot be read piece by piece: a network given from Python, batch norms (they are
        folded as a whole), a checkpoint whose tensors are joined or split to make the model's parameters.
        """
        if self.path is None or self.config is None or self.shards is None:
            raise ModelError(f"{self.name} was given as a network: it is in memory already", "give a model folder")
        if self.quantization is not None:
            raise ModelError(f"{self.name} is already quantized ({self.quantization})", "start from the float model")
        module = self.empty_module(task, self.shards, sorted(self.shards.held))
        self._places = find_places(module, self.shards.held)
        return module

    def read(self, name: str) -> Tensor:
        """Return the stored values of a parameter of a model that was opened, by its name in the model."""
        assert self.shards is not None
        return reader(self._places, self.shards.read, self.shards.read_row)(name)

    def empty_module(self, task: Purpose, shards: Shards, names: Sequence[str]) -> nn.Module:
        """Return the model without values for a folder that holds parameters of these names."""
        loader = getattr(transformers, task.auto_class)

        def build() -> nn.Module:
            module = loader.from_config(
                self.config,
                dtype=torch.float32,
                attn_implementation="eager",
                trust_remote_code=self.trust_remote_code,
            )
            assert isinstance(module, nn.Module)
            return module

        try:
            with quiet_transformers():
                module = without_values(build)
        except (OSError, ValueError, KeyError, RuntimeError, TypeError, ImportError, AttributeError) as error:
            raise ModelError(
                f"{self.name} cannot be opened as {task.name} ({task.auto_class}): {first_line(error)}",
                "choose the task that fits it",
            ) from error
        take_apart(module)
        places = find_places(module, names)
        if missing := [name for name, _ in module.named_parameters() if name not in places]:
            raise ModelError(
                f"{self.name} cannot be read piece by piece: {len(missing)} parameters of {type(module).__name__} are "
                f"not in its files under their names, {missing[0]} first",
                "save it once with save_pretrained, or give it enough --memory to be opened whole",
            )
        if norms := [name for name, part in module.named_modules() if isinstance(part, _BatchNorm)]:
            raise ModelError(
                f"{self.name} has {len(norms)} batch norms, which are folded as a whole",
                "give it enough --memory to be opened whole",
            )
        load_buffers(module, reader(places, shards.read, shards.read_row), places)
        return module

    def native_module(self) -> nn.Module:
        """Return a fresh float32 copy opened with the class that config.json names, whatever its task is."""
        if self._network is not None:
            return self._copy_of_network()
        for name in self.architectures:
            found = getattr(transformers, name, None)
            if found is not None:
                return self._load(found, name)
        return self._load(transformers.AutoModel, "AutoModel")

    def processor(self) -> Any:
        """Return the tokenizer, image processor, or (where the folder has both) the processor of the model.

        Raises ModelError when the folder has none.
        """
        if self.path is None:
            raise ModelError(f"{self.name} was given as a network, which has no tokenizer or image processor",
                             "give a folder written by save_pretrained, or rows that already are tensors")  # fmt: skip
        loader = processor_class(self.path)
        try:
            # files of a runtime lie beside no weights that are known here
            with quiet_transformers(), self.beside.folder() if self._files else nullcontext(self.path) as folder:
                return loader.from_pretrained(folder, trust_remote_code=self.trust_remote_code)
        except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
            raise ModelError(
                f"{loader.__name__} cannot open the tokenizer or processor in {self.path}: {first_line(error)}",
                "save it beside the model: tokenizer.save_pretrained(folder)",
            ) from error

    def forward(self, module: nn.Module, inputs: dict[str, Tensor], output: str = "logits") -> Tensor:
        """Return one output [B, ...] of a module of this source for inputs by name.

        Raises ModelError when the model has no such output.
        """
        if self._forward is not None:
            return self._forward(module, inputs)
        result = module(**inputs)
        if isinstance(result, Tensor):
            return result
        found = result.get(output) if isinstance(result, dict) else getattr(result, output, None)
        if not isinstance(found, Tensor):
            names = ", ".join(result) if isinstance(result, dict) else type(result).__name__
            raise ModelError(
                f"{self.name} gives no output {output!r} (it gives: {names})",
                "open it with a task that fits it, or pass forward=lambda module, inputs: ... with an nn.Module",
            )
        return found

    @cached_property
    def shards(self) -> Shards | None:
        """Return the tensors of the folder, to be read one by one; None for a network given from Python."""
        return None if self.path is None else Shards(self.path)

    def stored_dtype(self, name: str) -> torch.dtype | None:
        """Return what a tensor is stored as in the user's folder, or None when it is not there under this name."""
        if self.shards is None:
            return None
        tensor = self._places.get(name, Place(name)).tensor
        return DTYPES.get(self.shards.held[tensor][1].dtype) if tensor in self.shards.held else None

    def shipped_files(self) -> list[Path]:
        """Return the files that a user ships today to run this model. A network given from Python has none."""
        if self.path is None:
            return []
        code = "auto_map" in self._raw_config and self.trust_remote_code
        return checkpoint.shipped_files(self.path, checkpoint.weight_files(self.path), code)

    @property
    def beside(self) -> Beside:
        """Return what ships beside the weights: config, tokenizer or processor."""
        if self.path is None:
            return Beside.of(None, [], {})
        code = "auto_map" in self._raw_config and self.trust_remote_code
        return Beside.of(self.path, checkpoint.shipped_files(self.path, [], code), self._files)

    @property
    def lacks_tokens(self) -> bool:
        """Say whether tokens that the weights know are gone from the files beside them."""
        return self._kept is not None

    def original(self, task: Purpose) -> nn.Module:
        """Return the model as it was before anything was done to it, reading the tokens that this source writes."""
        module = self.module(task)
        if self._kept is not None:
            names = torch.tensor(self._kept)
            embedding = module.get_input_embeddings()  # type: ignore[operator]
            embedding.register_forward_pre_hook(lambda _, inputs: (names[inputs[0]], *inputs[1:]))
        return module

    def with_files(self, files: Mapping[str, bytes], kept: tuple[int, ...] | None = None) -> Source:
        """Return the same weights with other files beside them, by name: what turns rows into inputs, and the config.

        `kept` are the old numbers of the tokens that these files leave. `module` opens the weights as they lie in the
        folder all the same, with the folder's own config.
        """
        found = copy.copy(self)
        found._files = {**self._files, **files}
        found._kept = kept
        if "config.json" in files and self.config is not None:
            found._raw_config = json.loads(files["config.json"])
            with quiet_transformers():
                found.config = type(self.config).from_dict(found._raw_config)
        return found

    def _copy_of_network(self) -> nn.Module:
        assert self._network is not None
        module = copy.deepcopy(self._network).float().eval()
        take_apart(module)
        checkpoint.check_finite(module.state_dict())
        return module

    def _load(self, loader: Any, wanted: str) -> nn.Module:
        assert self.path is not None
        if self.quantization is not None:
            raise ModelError(
                f"{self.name} is already quantized ({self.quantization})",
                "start from the float model: rounding twice loses twice; `gossamer eval` and `bench` open it as it is",
            )
        checkpoint.weight_files(self.path)
        try:
            with quiet_transformers():
                module, loading = loader.from_pretrained(
                    self.path,
                    dtype=torch.float32,
                    attn_implementation="eager",
                    use_safetensors=True,
                    trust_remote_code=self.trust_remote_code,
                    output_loading_info=True,
                )
        except (OSError, ValueError, KeyError, RuntimeError, TypeError, ImportError, AttributeError) as error:
            fits = ", ".join(self.architectures) or "no architecture"
            raise ModelError(
                f"{self.name} cannot be opened as {wanted}: {first_line(error)}",
                f"config.json says {fits}: choose the task that fits it",
            ) from error
        if missing := sorted(loading["missing_keys"]):
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise ModelError(
                f"{len(missing)} weights that {type(module).__name__} needs are not in {self.name}: "
                f"{', '.join(missing[:5])}{more}",
                f"this checkpoint was not trained for {wanted}; fine-tune it first, or choose another task",
            )
        assert isinstance(module, nn.Module)
        module = module.eval()
        take_apart(module)
        checkpoint.check_finite(module.state_dict())
        assert self.shards is not None
        self._places = find_places(module, self.shards.held)
        return module
