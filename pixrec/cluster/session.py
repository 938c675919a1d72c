"""Being connected to Ray: joins the cluster at hand or starts a small one, and ends only what it started.

Ray's own talk goes to stderr and is kept to warnings; stdout belongs to the command that runs.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator

import ray
import ray.data

_OBJECT_STORE_BYTES = 2 * 1024**3
_OBJECT_STORE_LEAST_BYTES = 100 * 1024**2  # Ray refuses less than 75 MiB

_ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that wait sleep; by default they turn in circles, on processors others want
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # a task without a GPU does not hide the GPUs; Ray warns when unset
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # Serve ends a proxy that takes longer to start; 5 s by default
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how long a worker's report waits to be heard; 2 s by default
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",  # its threads do not outlive a fork, of which it warns when unset
}
_CHATTY = (  # warn at every start of what is as it should be
    "ray._private.authentication.authentication_token_setup",
    "ray.data._internal.progress",
)


@contextlib.contextmanager
def connect(progress: bool = True) -> Iterator[None]:
    """Inside the block Ray is at hand.

    Joins the cluster that RAY_ADDRESS names (a submitted job has it set), or the instance this process is already
    connected to; otherwise starts one on this machine and shuts it down after the block. `progress` False silences
    Ray's warnings too.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    level = logging.WARNING if progress else logging.ERROR
    started = not ray.is_initialized()
    if started:
        _start(level)
    try:
        _set_up_data(level)
        yield
    finally:
        if started:
            ray.shutdown()


def _start(level: int) -> None:
    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level=level, log_to_driver=False)
        return
    ray.init(
        address="local",  # never an instance that somebody else happens to run on this machine
        include_dashboard=False,
        logging_level=level,
        log_to_driver=False,
        object_store_memory=_object_store_bytes(),
    )


def _object_store_bytes() -> int:
    """What fits into shared memory: Ray falls back to slow files, with a warning, when it does not."""
    if not os.path.isdir("/dev/shm"):
        return _OBJECT_STORE_BYTES
    free = shutil.disk_usage("/dev/shm").free
    return max(_OBJECT_STORE_LEAST_BYTES, min(_OBJECT_STORE_BYTES, int(free * 0.8)))


def _set_up_data(level: int) -> None:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # the command has its own
    context.print_on_execution_start = False
    # The V2 Parquet reader starts up to 32 actors: 6 to 14 s for 8 tiny files where V1 takes 0.5 s.
    if hasattr(context, "use_datasource_v2"):
        context.use_datasource_v2 = False
    logging.getLogger("ray.data").setLevel(level)
