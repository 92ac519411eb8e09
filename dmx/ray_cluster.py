"""Ray: joining the cluster that RAY_ADDRESS names, or starting a private one on this host."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from dmx.cores import cores
from dmx.errors import DmxError

RAY_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray Train would print each line of a worker twice, and watch itself through a dashboard that is off.
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_STATE_ACTOR_RECONCILIATION": "0",
}


@contextmanager
def ray_cluster(cpus: int | None = None, object_store_bytes: int | None = None) -> Iterator[str]:
    """Be connected to a Ray cluster within it.

    With RAY_ADDRESS in the environment that cluster is joined, and the arguments do nothing. Without, a
    private one starts on this host and ends with it: no dashboard, no other address than 127.0.0.1.

    Args:
        cpus: cores that the private cluster shares out; None: all that this process may use.
        object_store_bytes: room for objects in shared memory; None: what Ray takes by itself.

    Yields:
        The address of the cluster's head.

    Raises:
        DmxError: Ray is not installed, or nothing answers at RAY_ADDRESS.
    """
    for name, value in RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise DmxError("this wants Ray: install dmx[cpu] or dmx[gpu]") from error
    scratch = tempfile.mkdtemp(prefix="dmx-", dir="/tmp")  # Socket names in it must be short.
    try:
        if joins_cluster():
            _join(os.environ["RAY_ADDRESS"])
        else:
            ray.init(
                address="local",
                num_cpus=cpus or cores(),
                include_dashboard=False,
                object_store_memory=object_store_bytes,
                _temp_dir=scratch,
                _node_ip_address="127.0.0.1",
                logging_level=logging.ERROR,
                log_to_driver=False,
            )
        yield ray.get_runtime_context().gcs_address
    finally:
        ray.shutdown()
        shutil.rmtree(scratch, ignore_errors=True)


def joins_cluster() -> bool:
    """Whether there is a cluster to join: RAY_ADDRESS is set."""
    return bool(os.environ.get("RAY_ADDRESS"))


def _join(address: str) -> None:
    import ray

    try:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise DmxError(
            f"RAY_ADDRESS: wanted a Ray cluster at {address}, found: {error}. Start one (see launch/), "
            "or unset RAY_ADDRESS to work on this host alone"
        ) from error
