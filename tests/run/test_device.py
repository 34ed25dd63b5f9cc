"""Where one computes: as asked, what there is by default, one GPU a process, and an error that says what to do."""

from __future__ import annotations

import pytest
import torch

from gossamer.errors import RunError
from gossamer.run.device import CPU, chosen_device, free_bytes, in_main_memory, pinned_bytes, whole_float32
from gossamer.run.team import Team


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def test_without_a_gpu_it_is_the_cpu_and_asking_for_one_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert chosen_device() == chosen_device("cpu") == CPU
    with pytest.raises(RunError, match=r"--device cuda: torch .* sees no GPU here\nhint: .*--device cpu"):
        chosen_device("cuda")
    with pytest.raises(RunError, match="'mps' is none of auto, cpu, cuda"):
        chosen_device("mps")


@pytest.mark.usefixtures("two_gpus")
def test_each_process_has_the_gpu_of_its_number() -> None:
    assert chosen_device() == torch.device("cuda", 0)
    assert chosen_device("cpu") == CPU
    second = Team(rank=3, size=4, local_size=2, local_rank=1)
    assert chosen_device("cuda", second) == torch.device("cuda", 1)
    with pytest.raises(RunError, match="3 were started on this machine, 2 GPUs are there"):
        chosen_device("auto", Team(rank=0, size=3, local_size=3))
    assert chosen_device("cpu", Team(rank=0, size=3, local_size=3)) == CPU


def test_what_lies_in_main_memory_stays_what_it_is() -> None:
    values = torch.rand(3)
    assert in_main_memory(values) is values
    assert [pinned_bytes(count) for count in (0, 1, 3, 4096, 4097)] == [0, 1, 4, 4096, 8192]


def test_convolutions_are_not_rounded_while_it_lasts() -> None:
    before = torch.backends.cudnn.allow_tf32
    with whole_float32(torch.device("cuda", 0)):
        assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.allow_tf32 == before
    with whole_float32(CPU):
        assert torch.backends.cudnn.allow_tf32 == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_values_come_back_in_pinned_pages() -> None:
    values = torch.rand(3, 5, device=chosen_device())
    kept = in_main_memory(values.t())
    assert kept.is_pinned()
    assert torch.equal(kept, values.cpu().t())
    assert 0 < free_bytes(chosen_device()) <= torch.cuda.get_device_properties(0).total_memory
