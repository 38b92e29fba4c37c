"""Time contenders in turn, many rounds, so that a drifting machine hits them alike."""

import os
import platform
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

# PyTorch's idle threads would otherwise spin for a while on the cores of whoever runs next. To be
# set before PyTorch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


RESULTS = Path(__file__).parent / "results"


def interleaved(contenders: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median seconds of each contender, which must wait for its own result."""
    for run in contenders.values():  # compile, and warm the caches
        run()
        run()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            run()  # untimed: whoever ran before has left its threads and data behind
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: float(np.median(times)) for name, times in seconds.items()}


def machine() -> str:
    """The device and the versions, for the head of a table."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("jax", "flax", "torch"))
    device = jax.devices()[0]
    processor = device.device_kind if device.platform != "cpu" else cpu_name()
    return f"{processor}, Python {platform.python_version()}, {packages}"


def cpu_name() -> str:
    """What the processor calls itself, and how many of its cores we have."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def report(name: str, title: str, header: list[str], rows: list[list[str]]) -> None:
    """Print a table, and store it as Markdown under `results/`."""
    table = Table(*header, title=title)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    lines = [" | ".join(line) for line in (header, ["---"] * len(header), *rows)]
    text = "\n".join(f"| {line} |" for line in lines)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{jax.devices()[0].platform}.md"
    path.write_text(f"{title}\n\n{machine()}\n\n{text}\n")
    print(f"{machine()}\nwritten to {path}")
