"""Time contenders in turn, many rounds, so that a drifting machine hits them alike.

What a program measures goes into `results/`, or where the variable BENCHMARK_RESULTS says, as a
Markdown table and as JSON.
"""

import json
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, TypeVar

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

# PyTorch's idle threads would otherwise spin for a while on the cores of whoever runs next. To be
# set before PyTorch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# JAX would otherwise take most of a GPU's memory at once, and leave PyTorch too little.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

T = TypeVar("T")

RESULTS = Path(os.environ.get("BENCHMARK_RESULTS", Path(__file__).parent / "results"))
HAS_TORCH = find_spec("torch") is not None
PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "torch", "torchvision", "timm"),
    *("libtpu", "jax-cuda12-plugin"),
)
FEWEST_ROUNDS = 5
SLOW = 0.3  # seconds


def interleaved(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    at_least: float = 0.0,
    at_most: float = math.inf,
) -> dict[str, float]:
    """The median seconds of one call of each contender.

    Args:
        contenders: each returns what is to be waited for, or has waited for it.
        rounds: in each of which every contender is measured once.
        at_least: seconds that one measurement should take: quick contenders are called several
            times in it. On a GPU they are waited for once, after the last call, so that the host
            prepares calls while the device works, and the longer of the two is what is measured.
            On a CPU, where both are the same cores, each call is waited for.
        at_most: seconds for all rounds together, after which there are no more than
            `FEWEST_ROUNDS`.
    """
    calls = {}
    for name, run in contenders.items():
        measure(run)  # compiles
        calls[name] = math.ceil(max(at_least, 1e-9) / measure(run))
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    begin = time.perf_counter()
    for done in range(rounds):
        if done >= FEWEST_ROUNDS and time.perf_counter() - begin > at_most:
            break
        for name, run in contenders.items():
            if not seconds[name] or seconds[name][-1] < SLOW:
                measure(run)  # for nothing: whoever ran before has left its threads and data behind
            seconds[name].append(measure(run, calls[name]))
    return {name: float(np.median(times)) for name, times in seconds.items()}


def measure(run: Callable[[], object], calls: int = 1) -> float:
    """Seconds that one of several calls takes."""
    each = jax.default_backend() == "cpu"
    result = None
    start = time.perf_counter()
    for _ in range(calls):
        result = run()
        if each:
            wait(result)
    wait(result)
    return (time.perf_counter() - start) / calls


def wait(result: object) -> None:
    """Wait for what was started."""
    jax.block_until_ready(result)
    if "torch" in sys.modules and torch_device() == "cuda":
        sys.modules["torch"].cuda.synchronize()


@cache
def torch_device() -> str:
    """Where PyTorch, if there is one, computes: where JAX does."""
    if not HAS_TORCH or jax.default_backend() == "cpu":
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def here(choices: Mapping[str, T]) -> T:
    """What is chosen for the device at hand; other accelerators take what a GPU does."""
    return choices["cpu" if jax.default_backend() == "cpu" else "gpu"]


def device_name() -> str:
    """What the device calls itself."""
    device = jax.devices()[0]
    return cpu_name() if device.platform == "cpu" else device.device_kind


def cpu_name() -> str:
    """What the processor calls itself, and how many of its cores we have."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def versions() -> dict[str, str]:
    """Of Python and of the packages that are there."""
    found = {"Python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine(device: str | None = None) -> str:
    """The device and the versions, for the head of a table."""
    return ", ".join([device or device_name(), *map(" ".join, versions().items())])


def command() -> str:
    """The command line, as typed in the root of the repository."""
    program = Path(sys.argv[0])
    return shlex.join(["python", f"{program.parent.name}/{program.name}", *sys.argv[1:]])


def shown(cell: str | float) -> str:
    """A cell of a table: three digits of a number."""
    if isinstance(cell, float):
        return f"{cell:.3g}" if abs(cell) < 1000 else f"{cell:,.0f}"
    return cell if isinstance(cell, str) else f"{cell:,}"


class Device(NamedTuple):
    """What a table is about, where that is not the device at hand."""

    short: str  # for the names of files
    name: str


def report(
    name: str,
    title: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str | float]],
    device: Device | None = None,
) -> None:
    """Print a table, and store it as Markdown and JSON under `results/`."""
    table = Table(*header, title=title)
    for row in rows:
        table.add_row(*map(shown, row))
    # A file has room for long lines.
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    path = store(name, title, header, rows, device)
    print(f"{machine(device and device.name)}\nwritten to {path}.md and .json", flush=True)


def store(
    name: str,
    title: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str | float]],
    device: Device | None = None,
) -> Path:
    """Store a table, or what there is of it; returns where, but for the suffix."""
    device = device or Device(jax.default_backend(), device_name())
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}-{device.short}"
    head = f"{title}\n\n`{command()}` on {machine(device.name)}\n\n"
    path.with_suffix(".md").write_text(f"{head}{markdown(header, rows)}\n")
    everything = {
        "title": title,
        "command": command(),
        "device": device.name,
        "versions": versions(),
        "rows": [dict(zip(header, row, strict=True)) for row in rows],
    }
    path.with_suffix(".json").write_text(json.dumps(everything, indent=1) + "\n")
    return path


def markdown(header: Sequence[str], rows: Sequence[Sequence[str | float]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(shown, line))} |" for line in lines)


def keep_freed_memory() -> None:
    """Start the program again so that it reuses large arrays instead of returning their memory.

    By default every array of more than 32 MB is new memory to the operating system, which clears it
    page by page. That takes several times as long as a copy of it, and would be all one measures.
    To be called before anything else. Only glibc knows these variables, and only at its start.
    """
    if sys.platform == "linux" and "MALLOC_MMAP_MAX_" not in os.environ:
        os.environ |= {
            "MALLOC_MMAP_MAX_": "0",
            "MALLOC_TRIM_THRESHOLD_": str(2**40),
            "MALLOC_ARENA_MAX": "1",
        }
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
