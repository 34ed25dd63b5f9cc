from __future__ import annotations

import importlib.metadata
import os
import tomllib
from pathlib import Path

import pytest
import torch

from gossamer.measure.machine import (
    PACKAGES,
    MachineStamp,
    doctor,
    findings,
    memory_bytes,
    read_cpuinfo,
    stamp,
    usable_cores,
)

ZEN5 = "processor\t: 0\nmodel name\t: AMD EPYC 9R45\nflags\t\t: fpu avx2 fma avx512f avx512_vnni avx512_bf16 avx_vnni\n"
GRAVITON = "processor\t: 0\nFeatures\t: fp asimd asimdhp asimddp i8mm bf16\nCPU part\t: 0xd40\n\nprocessor\t: 1\n"


def made(*sets: str, cores: int = 4, available: int = 8 * 2**30) -> MachineStamp:
    return MachineStamp(
        cores=cores, cpu="some", architecture="x86_64", instruction_sets=sets, memory_total=16 * 2**30,
        memory_available=available, system="Linux", python="3.11", packages={},
    )  # fmt: skip


def test_reads_x86_and_arm() -> None:
    assert read_cpuinfo(ZEN5) == (
        "AMD EPYC 9R45",
        ("avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16"),
    )
    assert read_cpuinfo(GRAVITON) == ("ARM part 0xd40", ("neon", "sdot", "i8mm", "bf16", "fp16"))
    assert read_cpuinfo("") == ("ARM part unknown", ())


def test_agrees_with_torch_about_this_processor() -> None:
    capability, sets = torch.backends.cpu.get_cpu_capability(), stamp().instruction_sets
    if capability == "AVX512":
        assert "avx512f" in sets
    elif capability == "AVX2":
        assert "avx2" in sets


def test_the_stamp_holds_what_is_installed_and_survives_json() -> None:
    found = stamp()
    assert found.cores == usable_cores() <= (os.cpu_count() or 1)
    assert found.packages["torch"] == importlib.metadata.version("torch") == torch.__version__
    assert 0 < found.memory_available <= found.memory_total
    assert MachineStamp.model_validate_json(found.model_dump_json()) == found
    assert found.cpu in str(found)


def test_the_id_ignores_only_what_changes_by_the_minute() -> None:
    assert made("avx2").id == made("avx2", available=2**30).id
    assert made("avx2").id != made("avx2", cores=2).id
    assert made("avx2").id != made("avx2", "avx512f").id


def test_a_containers_limits_count(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       16000000 kB\nMemFree:  1 kB\nMemAvailable:   12000000 kB\n")
    assert memory_bytes(meminfo, tmp_path) == (16_384_000_000, 12_288_000_000)
    (tmp_path / "memory.max").write_text("4000000000\n")
    (tmp_path / "memory.current").write_text("1000000000\n")
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert memory_bytes(meminfo, tmp_path) == (4_000_000_000, 3_000_000_000)
    assert usable_cores(tmp_path) == 1
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert memory_bytes(meminfo, tmp_path)[0] == 16_384_000_000
    assert usable_cores(tmp_path) == usable_cores(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("sets", "int8", "bf16"),
    [
        (("avx2", "fma"), (False, "saturate"), (False, "emulated")),
        (("avx2", "avx512f", "avx512_vnni", "avx512_bf16"), (True, "avx512_vnni"), (True, "avx512_bf16")),
        (("amx_int8", "amx_bf16", "avx512_vnni"), (True, "amx_int8"), (True, "amx_bf16")),
        (("neon", "sdot"), (True, "sdot"), (False, "emulated")),
        ((), (False, "unlikely"), (False, "emulated")),
    ],
)
def test_says_what_follows_from_the_instruction_sets(
    sets: tuple[str, ...], int8: tuple[bool, str], bf16: tuple[bool, str]
) -> None:
    said = {finding.name: finding for finding in findings(made(*sets))}
    assert (said["int8 dot products"].ok, said["bf16"].ok) == (int8[0], bf16[0])
    assert int8[1] in said["int8 dot products"].says
    assert bf16[1] in said["bf16"].says


def test_doctor_names_the_command_for_what_is_missing() -> None:
    found = doctor()
    assert {extra.package for extra in found.extras} == {package.name for package in PACKAGES}
    for extra, package in zip(found.extras, PACKAGES, strict=True):
        present = extra.version is not None
        assert (extra.package in found.stamp.packages) == (present and package.stamped)
        assert (extra in found.missing) != present
    commands = {extra.package: extra.command for extra in found.extras}
    assert commands["openvino"] == 'pip install "gossamer[openvino]"'
    assert commands["torch"] == "pip install --upgrade gossamer"


def test_doctor_offers_only_what_can_be_installed() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = {"core": project["dependencies"], **project["optional-dependencies"]}
    for package in PACKAGES:
        names = [requirement.split(">")[0].split("[")[0] for requirement in listed[package.extra]]
        assert package.name in names, f"{package.name} is not in {package.extra}"
