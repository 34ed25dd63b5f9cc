"""torchao: round to nearest, weights only, by `quantize_`; the tied head is left alone, as transformers does.

What is not rounded is saved in bfloat16 and opened in float32.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from script import Job, run, torch_logits

RECIPES = {"int8wo": {"bits": 8}, "intx4-g64": {"bits": 4, "group_size": 64}}
FILE = "model.pt"


def quantize(job: Job) -> None:
    """Write a state dict of torchao's tensors."""
    import torch
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    config: Any = Int8WeightOnlyConfig()
    if job.recipe["bits"] < 8:
        config = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(job.recipe["group_size"]))
    with job.timed():
        quantize_(network, config, lambda module, name: isinstance(module, torch.nn.Linear) and name != "lm_head")
    state = network.state_dict()
    del state["lm_head.weight"]  # the embedding's, once more
    plain = {name: value.bfloat16() if type(value) is torch.Tensor else value for name, value in state.items()}
    torch.save(plain, job.out / FILE)
    network.config.save_pretrained(job.out)


def reopen(job: Job) -> Callable[[Any], Any]:
    """Open the state dict."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    network = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(job.out), dtype=torch.float32)
    state = torch.load(job.out / FILE, weights_only=True)
    widened = {name: value.float() if type(value) is torch.Tensor else value for name, value in state.items()}
    found = network.load_state_dict(widened, strict=False, assign=True)
    assert found.missing_keys == ["lm_head.weight"], found.missing_keys
    network.tie_weights()
    return torch_logits(network)


if __name__ == "__main__":
    sys.exit(run(RECIPES, quantize, reopen, packages=("torchao",)))
