"""Data parallelism: each device takes an equal part of each batch, and all hold the same state.

Batch norms see whole batches: JAX sums their statistics over the devices that share a batch.
"""

import resource
import socket
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

from training import TrainingError

T = TypeVar("T")


class Placement:
    """Where arrays lie."""

    def __init__(self, devices: int | None, micro_batch: int) -> None:
        """Use so many devices, by default all of them, over all processes.

        Raises:
            TrainingError: there are fewer devices, or a micro-batch cannot be shared equally.
        """
        available = jax.devices()
        count = len(available) if devices is None else devices
        if not 1 <= count <= len(available):
            raise TrainingError(
                f"devices must be from 1 to {len(available)}, the number that JAX sees, but "
                f"devices={count}."
            )
        if micro_batch % count:
            raise TrainingError(
                f"Micro-batches must be a multiple of the devices, but they have {micro_batch} "
                f"images and there are {count} devices. Use fewer with --devices, or change "
                "--batch-size or --micro-batch."
            )
        self.count = count
        mesh = jax.make_mesh((count,), ("data",), (AxisType.Auto,), devices=available[:count])
        self.replicated = NamedSharding(mesh, PartitionSpec())
        self._split = NamedSharding(mesh, PartitionSpec("data"))

    def replicate(self, tree: Any) -> Any:
        """Put a copy on each device."""
        return jax.device_put(tree, self.replicated)

    def abstract(self, make: Callable[[], T]) -> T:
        """Shapes, dtypes and the sharding of what a function makes, without making it."""
        place = partial(jax.ShapeDtypeStruct, sharding=self.replicated)
        return jax.tree.map(lambda x: place(x.shape, x.dtype), jax.eval_shape(make))

    def split(self, batch: Shaped[Array, "n ..."]) -> Shaped[Array, "n ..."]:
        """Under `jit`, put an equal part of a batch on each device."""
        return lax.with_sharding_constraint(batch, self._split)


def connect(
    distributed: bool, coordinator: str | None, num_processes: int | None, process_id: int | None
) -> None:
    """Join the other processes of a run, if there are any, and find the devices.

    JAX finds out what is None under Slurm, Open MPI and Kubernetes and on TPU pods.

    Raises:
        TrainingError: the other processes or the devices cannot be found or reached, or the
            arguments contradict each other.
    """
    _require_processes(coordinator, num_processes, process_id)
    if distributed or coordinator is not None:
        _join(coordinator, num_processes, process_id)
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter says nothing
        platforms = jax.config.values["jax_platforms"]
        reason = " ".join(str(error).split()) or "none of the platforms is installed."
        raise TrainingError(
            f"JAX finds no devices: {reason} Set JAX_PLATFORMS, which is {platforms}, to cpu, cuda "
            "or tpu, or unset it."
        ) from error


def _require_processes(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> None:
    if coordinator is None:
        given = {"num_processes": num_processes, "process_id": process_id}.items()
        if values := ", ".join(f"{name}={value}" for name, value in given if value is not None):
            raise TrainingError(
                "num_processes and process_id need a coordinator, but there is none and "
                f"{values}. Pass --coordinator HOST:PORT to each process, or omit them to train in "
                "one process."
            )
        return
    if num_processes is not None and not 0 <= (process_id or 0) < num_processes:
        raise TrainingError(
            f"process_id must be from 0 to num_processes - 1, but process_id={process_id} and "
            f"num_processes={num_processes}."
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise TrainingError(
            f"The coordinator must be HOST:PORT, but coordinator={coordinator!r}. Pass the address "
            "of process 0, for example 10.0.0.1:1234."
        )
    try:
        socket.getaddrinfo(host.strip("[]"), port)
    except (OSError, UnicodeError) as error:
        raise TrainingError(
            f"The coordinator's host must be known, but {host} is not: "
            f"{getattr(error, 'strerror', None) or error}. Pass the address of process 0, for "
            "example 10.0.0.1:1234."
        ) from error


def _join(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    except (ValueError, RuntimeError) as error:
        source = coordinator or "the variables of Slurm, Open MPI, Kubernetes or a TPU pod"
        raise TrainingError(
            f"Cannot join the other processes by {source}: {error} Pass --coordinator HOST:PORT, "
            "--num-processes and --process-id to each process, or omit --distributed to train in "
            "one process."
        ) from error


def wait_for_all() -> None:
    """Wait until every process has come this far."""
    multihost_utils.sync_global_devices("training")


def all_agree(yes: bool) -> bool:
    """Whether every process passes True. Each waits for the others."""
    return bool(np.all(multihost_utils.process_allgather(np.asarray(yes))))


def on_first(action: Callable[[], T]) -> T | None:
    """Act in the first process and return the result; the others wait for it and return None.

    Raises:
        TrainingError: the action raised it, or failed in the first process.
        OSError: the action raised it.
    """
    result, failure = None, None
    if jax.process_index() == 0:
        try:
            result = action()
        except (TrainingError, OSError) as error:
            failure = error
    # If the first process fails, all must, or they would wait for it forever.
    if not all_agree(failure is None):
        raise failure or TrainingError("The first process of this run failed: see its message.")
    return result


def peak_memory() -> str:
    """The most memory in use so far: of the device, or of the process if that is the device."""
    if statistics := jax.local_devices()[0].memory_stats():
        return f"{statistics['peak_bytes_in_use'] / 2**20:,.0f} MiB of device memory"
    unit = 1 if sys.platform == "darwin" else 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return f"{peak / 2**20:,.0f} MiB of memory"
