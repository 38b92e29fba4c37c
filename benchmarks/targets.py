"""Compile for an accelerator that is not there, and count what the program moves through memory.

To be imported before JAX, because it sets the environment of the compilers. The packages, which
need no device and no driver, in an environment of their own, because JAX warns at every import
where it finds a CUDA plugin and no GPU:

    pip install "jax[cpu]==0.10.2" "libtpu==0.0.42.*" nvidia-cuda-nvcc-cu12
    pip install --no-deps jax-cuda12-pjrt==0.10.2 jax-cuda12-plugin==0.10.2

The plugins have the version of JAX; libtpu has the one that `jax[tpu]` of that version names.
"""

import os

os.environ |= {
    "JAX_PLATFORMS": "cpu",
    # Otherwise the TPU's compiler asks the network which machine it is on.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    # Several processes may compile at once, as none of them takes a device.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TF_CPP_MIN_LOG_LEVEL": "2",
    # The choice of the fastest kernels would need a GPU to try them on.
    "XLA_FLAGS": "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false",
}

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from itertools import chain
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import (
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    Sharding,
    SingleDeviceSharding,
)
from timing import Device, report

# What XLA has to know of a GPU, as its driver describes an H100 SXM.
H100_CONFIGURATION = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_core: 233472
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  l2_cache_size: 52428800
  memory_bandwidth: 3352320000000
  device_memory_size: 84929347584
}
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 12 minor: 8 patch: 0 }
"""


class Target(NamedTuple):
    """An accelerator to compile for."""

    description: str
    memory: int  # bytes
    topology: Mapping[str, str]


TARGETS = {
    "h100": Target(
        "NVIDIA H100",
        84_929_347_584,
        {"platform": "cuda", "target_config": H100_CONFIGURATION, "topology": "1x1x1"},
    ),
    "v5e": Target(
        "TPU v5e",
        int(15.75 * 2**30),  # of 16 GiB, what the compiler lets a program have
        {"platform": "tpu", "topology_name": "v5e:2x2"},
    ),
}


@cache
def devices(target: str) -> Sequence[jax.Device]:
    """Stand-ins for its devices: one H100, or the four chips of a v5e host."""
    return topologies.get_topology_desc(**TARGETS[target].topology).devices


def tabulate(
    name: str, target: str, title: str, header: Sequence[str], rows: Sequence[Sequence[str | float]]
) -> None:
    """Report a table about a target."""
    device = Device(target, f"{TARGETS[target].description} (compiled for, not run)")
    title = f"{title}. By the compiled programs: bytes, not times"
    report(f"compiled-{name}", title, header, rows, device)


def one_device(target: str) -> Sharding:
    return SingleDeviceSharding(devices(target)[0])


def all_devices(target: str, *axes: str) -> Sharding:
    """Over all devices, of which the one axis of the mesh is "batch"; without axes, a copy each."""
    mesh = Mesh(np.array(devices(target)), ("batch",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec(*axes))


def compiled(
    sharding: Sharding, function: Callable[..., Any], *arguments: Any, donate: Sequence[int] = ()
) -> jax.stages.Compiled:
    """The program of a function of arrays, or their shapes and types, all of which lie there."""
    placed = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), arguments
    )
    jitted = jax.jit(function, donate_argnums=donate, out_shardings=sharding)
    return jitted.lower(*placed).compile()


def bytes_moved(program: jax.stages.Compiled) -> float:
    """Bytes that the kernels of a program read and write.

    By the compiler's own account where it gives one, which is on a TPU.
    """
    costs: Any = program.cost_analysis()
    if costs:
        return costs["bytes accessed"]
    return sum(kernel.written + sum(kernel.read) for kernel in kernels(program))


def temporary_memory(program: jax.stages.Compiled) -> int:
    """Bytes beside arguments and outputs."""
    memory: Any = program.memory_analysis()
    return memory.temp_size_in_bytes


def peak_memory(program: jax.stages.Compiled) -> int:
    """Bytes beside arguments that are in use at once, wherever in memory they lie."""
    memory: Any = program.memory_analysis()
    return memory.peak_memory_in_bytes - memory.argument_size_in_bytes


def all_memory(program: jax.stages.Compiled) -> int:
    """Bytes of arguments, outputs and temporary arrays; an output in an argument's place is one."""
    memory: Any = program.memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )


class Instruction(NamedTuple):
    """A line of a compiled program's text."""

    name: str
    type: str
    operation: str
    rest: str  # operands and attributes

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.rest.partition("), ")[0])

    @property
    def callee(self) -> str | None:
        """The computation that a fusion or a call runs."""
        found = re.search(r"(?:calls|to_apply)=%?([\w.\-]+)", self.rest)
        return found and found[1]


class Kernel(NamedTuple):
    """What an instruction of the entry computation reads and writes, in bytes."""

    name: str
    operation: str
    written: int
    read: tuple[int, ...]


COMPUTATION = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\) -> .* \{")
INSTRUCTION = re.compile(
    r"\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<type>.*?) (?P<operation>[\w\-]+)\((?P<rest>.*)"
)
ARRAY = re.compile(r"(?P<type>pred|[a-z]+(?P<bits>\d+)\w*)\[(?P<shape>[\d,]*)\]")
FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("partition-id", "replica-id"),
}
SLICES = {"slice", "dynamic-slice", "gather"}


def lengths(type_: str) -> list[tuple[int, int]]:
    """Of each array in the text of a type, how many values it has, and of how many bytes."""
    found = []
    for array in ARRAY.finditer(type_):
        count = math.prod(int(n) for n in array["shape"].split(",") if n)
        found.append((count, max(1, int(array["bits"] or 8) // 8)))
    return found


def size(type_: str) -> int:
    """Bytes of the arrays of a type."""
    return sum(count * bytes_ for count, bytes_ in lengths(type_))


def computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The instructions of each computation of a program, and the name of the first to run."""
    found: dict[str, list[Instruction]] = {}
    entry = current = ""
    for line in text.splitlines():
        if start := COMPUTATION.match(line):
            current = start["name"]
            found[current] = []
            entry = current if start["entry"] else entry
        elif current and (match := INSTRUCTION.match(line)):
            found[current].append(Instruction(**match.groupdict()))
    return found, entry


def kernels(program: jax.stages.Compiled) -> list[Kernel]:
    """What each kernel of a program reads and writes, whole operands unless it slices them.

    Those are the instructions of the entry computation that do something; on a TPU a copy between
    its memories is one of them.
    """
    found, entry = computations(program.as_text() or "")
    return list(_kernels(found, entry))


def _kernels(found: Mapping[str, Sequence[Instruction]], name: str) -> Iterator[Kernel]:
    sizes: dict[str, int] = {}
    for line in found[name]:
        sizes[line.name] = size(line.type)
        if line.operation in FREE or line.operation.endswith("-done"):
            continue
        inner = found.get(line.callee or "")
        if line.operation == "call" and inner is not None:
            yield from _kernels(found, line.callee or "")
            continue
        read = [
            min([sizes.get(operand, 0), *(_sliced(inner, i) if inner else ())])
            for i, operand in enumerate(line.operands)
        ]
        yield Kernel(line.name, line.operation, sizes[line.name], tuple(read))


def _sliced(fusion: Sequence[Instruction], position: int) -> list[int]:
    """The bytes that a fusion reads of an operand, if it reads slices of it alone."""
    parameters = [
        line.name
        for line in fusion
        if line.operation == "parameter" and line.rest.startswith(f"{position})")
    ]
    uses = [line for line in fusion if set(parameters) & set(line.operands)]
    if uses and all(use.operation in SLICES for use in uses):
        return [sum(size(use.type) for use in uses)]
    return []


COLLECTIVES = (
    *("all-reduce", "all-gather", "all-to-all", "reduce-scatter"),
    *("collective-permute", "collective-broadcast"),
)


def instructions(program: jax.stages.Compiled) -> list[Instruction]:
    """Those of the entry computation."""
    found, entry = computations(program.as_text() or "")
    return found[entry]


def collectives(program: jax.stages.Compiled) -> list[tuple[str, list[tuple[int, int]]]]:
    """Each collective of a program: which, and the lengths and bytes a value of its arrays."""
    found, _ = computations(program.as_text() or "")
    return [
        (line.operation, lengths(line.type))
        for line in chain.from_iterable(found.values())
        if line.operation.removesuffix("-start") in COLLECTIVES
    ]
