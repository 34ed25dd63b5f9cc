"""The machine: its stamp, which every figure carries, and in words what it can do (`gossamer doctor`).

What decides the speed of a small model on a CPU is which integer and bf16 dot products its instruction set has. Nothing
is imported to find out what is installed: package metadata is enough, so asking is cheap and has no side effects.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

from gossamer.measure.size import human_size
from gossamer.measure.types import Frozen

CPUINFO = Path("/proc/cpuinfo")
MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")

# what the kernel calls it -> what it is; only what changes how fast a small model runs
X86 = {
    "avx2": "avx2",
    "f16c": "f16c",
    "fma": "fma",
    "avx512f": "avx512f",
    "avx512_vnni": "avx512_vnni",
    "avx_vnni": "avx_vnni",
    "avx512_bf16": "avx512_bf16",
    "avx512_fp16": "avx512_fp16",
    "amx_int8": "amx_int8",
    "amx_bf16": "amx_bf16",
}
ARM = {
    "asimd": "neon",
    "asimddp": "sdot",
    "i8mm": "i8mm",
    "bf16": "bf16",
    "asimdhp": "fp16",
    "sve": "sve",
    "sme": "sme",
}
APPLE = {"FEAT_DotProd": "sdot", "FEAT_I8MM": "i8mm", "FEAT_BF16": "bf16", "FEAT_FP16": "fp16", "FEAT_SME": "sme"}
INT8_DOT = ("amx_int8", "avx512_vnni", "avx_vnni", "i8mm", "sdot")
BF16_NATIVE = ("amx_bf16", "avx512_bf16", "bf16")

CORE = "core"


class Package(NamedTuple):
    """Name a package, the extra of gossamer that brings it, what it is for, and whether figures may depend on it."""

    name: str
    extra: str
    purpose: str
    stamped: bool = True


PACKAGES = (
    Package("torch", CORE, "opens, changes and trains models; runtime `torch`"),
    Package("transformers", CORE, "model classes and tokenizers"),
    Package("accelerate", CORE, "loads large models"),
    Package("datasets", CORE, "data from Hugging Face datasets"),
    Package("safetensors", CORE, "weights on disk"),
    Package("compressed-tensors", CORE, "quantized weights that transformers and vLLM load"),
    Package("scipy", CORE, "intervals and the planner's programme"),
    Package("onnx", CORE, "ONNX files"),
    Package("onnxscript", CORE, "ONNX export"),
    Package("onnxruntime", CORE, "runtime `onnxruntime`"),
    Package("openvino", "openvino", "runtime `openvino`"),
    Package("gguf", "gguf", "writes GGUF files; runtime `gguf`"),
    Package("llama-cpp-python", "gguf", "opens GGUF files; runtime `gguf`"),
    Package("soundfile", "speech", "reads recordings; task `speech-recognition`"),
    Package("torch-pruning", "torch-pruning", "cuts channels of convolutions (`prune`)"),
    Package("rapidfuzz", "speech", "counts wrong words; task `speech-recognition`"),
    Package("peft", CORE, "thin trainable layers (`lora`)"),
    Package("tensorboard", "tensorboard", "`--track tensorboard`", stamped=False),
    Package("wandb", "wandb", "`--track wandb`", stamped=False),
    Package("mlflow-skinny", "mlflow", "`--track mlflow`", stamped=False),
)


class MachineStamp(Frozen):
    """Hold what a figure depends on besides the artifact: cores, processor, instruction sets, memory, system, versions.

    `cores` are those this process may use (affinity and container quota), memory is in bytes (container limit counted).
    """

    cores: int
    cpu: str
    architecture: str
    instruction_sets: tuple[str, ...]
    memory_total: int
    memory_available: int
    system: str
    python: str
    packages: dict[str, str]

    @property
    def id(self) -> str:
        """Return a short name that is equal where figures may be compared: all fields but the memory free just now."""
        text = self.model_copy(update={"memory_available": 0}).model_dump_json()
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def __str__(self) -> str:
        sets = ", ".join(self.instruction_sets) or "no known instruction sets"
        return f"{self.cores} cores of {self.cpu} ({sets}), {human_size(self.memory_total, binary=True)}, {self.system}"


class Finding(Frozen):
    """Say one thing about this machine: the question, yes or no, and what follows."""

    name: str
    ok: bool
    says: str


class Extra(Frozen):
    """Say whether a package is present (`version` None: no), what it is for, and the command that adds it."""

    package: str
    version: str | None
    extra: str
    purpose: str
    command: str


class Doctor(Frozen):
    """Hold what this machine can do: its stamp, findings in words, and packages with the command that adds each."""

    stamp: MachineStamp
    findings: tuple[Finding, ...]
    extras: tuple[Extra, ...]

    @property
    def missing(self) -> tuple[Extra, ...]:
        """Return the packages that are not installed."""
        return tuple(extra for extra in self.extras if extra.version is None)


def stamp() -> MachineStamp:
    """Return the stamp of this machine and this environment. Example: `stamp().id`."""
    total, available = memory_bytes()
    cpu, sets = processor()
    installed = {
        package.name: found for package in PACKAGES if package.stamped and (found := installed_version(package.name))
    }
    ours = installed_version("gossamer")
    return MachineStamp(
        cores=usable_cores(),
        cpu=cpu,
        architecture=platform.machine(),
        instruction_sets=sets,
        memory_total=total,
        memory_available=available,
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        packages={"gossamer": ours, **installed} if ours else installed,
    )


def doctor() -> Doctor:
    """Return what this machine can do, in words, and the exact command for each package that is missing."""
    found = stamp()
    extras = tuple(
        Extra(
            package=package.name,
            version=installed_version(package.name),
            extra=package.extra,
            purpose=package.purpose,
            command=install_command(package.extra),
        )
        for package in PACKAGES
    )
    return Doctor(stamp=found, findings=findings(found), extras=extras)


def findings(found: MachineStamp) -> tuple[Finding, ...]:
    """Say what follows from a stamp: how int8, bf16, the cores and the memory will do here. A pure function."""
    sets = set(found.instruction_sets)
    return (
        _int8(sets),
        _bf16(sets),
        Finding(
            name="cores",
            ok=found.cores > 1,
            says=f"{found.cores} usable: runtimes are timed with as many threads"
            if found.cores > 1
            else "1 usable: what measures and what is measured share it, so times will spread",
        ),
        Finding(
            name="memory",
            ok=found.memory_available > 2 * 2**30,
            says=f"{human_size(found.memory_available, binary=True)} free of "
            f"{human_size(found.memory_total, binary=True)}: float32 models up to about "
            f"{human_size(found.memory_available / 12, binary=False)[:-1]} parameters fit three times over",
        ),
    )


def install_command(extra: str) -> str:
    """Return the command that brings an extra; core packages come with gossamer itself."""
    return "pip install --upgrade gossamer" if extra == CORE else f'pip install "gossamer[{extra}]"'


def installed_version(package: str) -> str | None:
    """Return the version of an installed package, without importing it; None when it is absent."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def usable_cores(cgroup: Path = CGROUP) -> int:
    """Return how many cores this process may use: its affinity, and the container's quota rounded up."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _first_line(cgroup / "cpu.max").split()
    if len(quota) == 2 and quota[0] != "max":
        cores = min(cores, max(1, -(-int(quota[0]) // int(quota[1]))))
    return cores


def memory_bytes(meminfo: Path = MEMINFO, cgroup: Path = CGROUP) -> tuple[int, int]:
    """Return (total, available) bytes of memory, no more than the container's limit grants."""
    if not meminfo.exists():
        page = os.sysconf("SC_PAGE_SIZE")
        total = page * os.sysconf("SC_PHYS_PAGES")
        return total, total
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    total, available = (int(fields[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    limit, used = _first_line(cgroup / "memory.max"), _first_line(cgroup / "memory.current")
    if limit.isdigit() and int(limit) < total:
        total = int(limit)
        available = min(available, max(0, total - int(used or 0)))
    return total, available


def processor(cpuinfo: Path = CPUINFO) -> tuple[str, tuple[str, ...]]:
    """Return the processor's name and those of its instruction sets that matter here."""
    if sys.platform == "darwin":
        return _apple()
    if not cpuinfo.exists():
        return platform.processor() or platform.machine(), ()
    return read_cpuinfo(cpuinfo.read_text())


def read_cpuinfo(text: str) -> tuple[str, tuple[str, ...]]:
    """Read the processor's name and instruction sets from the text of Linux's /proc/cpuinfo (x86 or ARM)."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        name, colon, value = line.partition(":")
        if colon:
            fields.setdefault(name.strip(), value.strip())
    if "flags" in fields:
        return fields.get("model name", "x86"), _named(X86, fields["flags"].split())
    model = fields.get("model name") or f"ARM part {fields.get('CPU part', 'unknown')}"
    return model, _named(ARM, fields.get("Features", "").split())


def _named(known: Mapping[str, str], flags: Iterable[str]) -> tuple[str, ...]:
    present = set(flags)
    return tuple(name for flag, name in known.items() if flag in present)


def _apple() -> tuple[str, tuple[str, ...]]:
    def ask(name: str) -> str:
        asked = subprocess.run(["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True, check=False)
        return asked.stdout.strip()

    flags = [flag for flag in APPLE if ask(f"hw.optional.arm.{flag}") == "1"]
    return ask("machdep.cpu.brand_string") or "Apple", ("neon", *_named(APPLE, flags)) if flags else ()


def _first_line(path: Path) -> str:
    if not path.exists():
        return ""
    return path.read_text().split("\n", 1)[0].strip()


def adds_in_pairs() -> bool:
    """Say whether integer kernels add two products of 8-bit numbers in 16 bits here (x86 without VNNI).

    With uint8 inputs, weights beyond 7 bits may then saturate: an error of 15 to 20 % on random full-range codes.
    """
    sets = set(processor()[1])
    return bool(sets & {"avx2", "avx512f"}) and not sets & set(INT8_DOT)


def multiplies_bf16() -> bool:
    """Say whether the processor multiplies bfloat16 numbers natively."""
    return bool(set(processor()[1]) & set(BF16_NATIVE))


def _int8(sets: set[str]) -> Finding:
    name = next((name for name in INT8_DOT if name in sets), None)
    if name is not None:
        return Finding(
            name="int8 dot products",
            ok=True,
            says=f"yes ({name}): 8-bit weights with 8-bit activations run several times faster than float32",
        )
    if sets & {"avx2", "avx512f"}:
        says = (
            "no (neither VNNI nor AMX): 8-bit weights times uint8 activations go through 16-bit sums that can saturate "
            "and gain little speed or none; 7-bit weights (reduce_range) do not saturate; size shrinks all the same"
        )
    else:
        says = "no: 8-bit arithmetic is unlikely to be faster than float32 here; size shrinks all the same"
    return Finding(name="int8 dot products", ok=False, says=says)


def _bf16(sets: set[str]) -> Finding:
    name = next((name for name in BF16_NATIVE if name in sets), None)
    if name is not None:
        return Finding(name="bf16", ok=True, says=f"native ({name}): bf16 halves the size, and is faster too")
    return Finding(
        name="bf16",
        ok=False,
        says="emulated: bf16 halves the size, but is converted to float32 for each sum and runs slower",
    )
