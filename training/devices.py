"""Data parallelism: every device takes an equal part of each batch, and all hold the same state.

The batch norms see whole batches: where a batch is spread over devices, JAX sums over all of them.
"""

import resource
import sys
from typing import Any

import jax
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

from training import checks


def connect(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Join the other processes of a run.

    What is None JAX finds out by itself under Slurm, Open MPI and Kubernetes and on TPU pods.

    Raises:
        TrainingError: the others cannot be found or reached.
    """
    with checks.connecting(coordinator):
        jax.distributed.initialize(coordinator, num_processes, process_id)


def wait_for_all() -> None:
    """Wait until the other processes are here, too."""
    multihost_utils.sync_global_devices("here")


def peak_memory() -> str:
    """The most memory in use so far: that of the device, or of the process if it computes there."""
    if statistics := jax.local_devices()[0].memory_stats():
        return f"{statistics['peak_bytes_in_use'] / 2**20:,.0f} MiB of device memory"
    unit = 1 if sys.platform == "darwin" else 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return f"{peak / 2**20:,.0f} MiB of memory"


class Placement:
    """Where arrays lie."""

    def __init__(self, count: int | None = None) -> None:
        """Use so many devices, by default all there are, over all processes.

        Raises:
            TrainingError: there are fewer.
        """
        devices = jax.devices()
        self.count = len(devices) if count is None else count
        checks.devices(self.count, len(devices))
        self._mesh = jax.make_mesh(
            (self.count,), ("data",), (AxisType.Auto,), devices=devices[: self.count]
        )
        self.replicated = NamedSharding(self._mesh, PartitionSpec())
        self._split = NamedSharding(self._mesh, PartitionSpec("data"))

    def replicate(self, tree: Any) -> Any:
        """A copy on each device."""
        return jax.device_put(tree, self.replicated)

    def split(self, batch: Shaped[Array, "n ..."]) -> Shaped[Array, "n ..."]:
        """Under `jit`, lay equal parts of a batch on the devices."""
        return lax.with_sharding_constraint(batch, self._split)
