"""Several processes as one job: how they find each other, wait for each other and end together.

Process 0 runs jax's coordination service, which the others reach at its address. Each process puts
a sign of life there; process 0 reads them all and says when one is silent. A process that learns
that the job is broken ends at once, whatever its devices wait for, with exit status `RESTART`.
"""

import contextlib
import ctypes
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax

# jax has no public way to the processes that it finds, nor to its coordination service.
from jax._src import clusters
from jax._src.distributed import global_state

from glmjax.config import DistributedConfig

logger = logging.getLogger(__name__)

RESTART = 75
"""Exit status of a process whose job is to be started again: EX_TEMPFAIL of sysexits.h."""

BEATS = 5
"""Signs of life within distributed.heartbeat_seconds."""
END = "glmjax/end"
"""Where the coordination service holds why the job ends: nothing once all are done."""


class AbsentError(RuntimeError):
    """A process did not come within the time that the others wait: the job is to be started again."""

    exit_status = RESTART


class Job(NamedTuple):
    """The processes of a job, seen from one of them."""

    coordinator: str
    """HOST:PORT of process 0."""
    num_processes: int
    process: int
    local_devices: Sequence[int] | None
    """The devices of this host that are this process's; None: all."""


def find_job(config: DistributedConfig) -> Job | None:
    """The job that flags, the environment or the cluster tell of; None for a process on its own.

    Raises:
        ValueError: it is told of in part.
    """
    coordinator = config.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    num_processes, process = (
        int(os.environ[variable]) if value is None and variable in os.environ else value
        for value, variable in (
            (config.num_processes, "JAX_NUM_PROCESSES"), (config.process, "JAX_PROCESS_ID")
        )
    )  # fmt: skip
    local_devices = None
    if num_processes != 1 and None in (coordinator, num_processes, process):
        coordinator, num_processes, process, local_devices = (
            clusters.ClusterEnv.auto_detect_unset_distributed_params(
                coordinator, num_processes, process, None, None, config.start_seconds
            )
        )
    if num_processes == 1 or (coordinator, num_processes, process) == (None, None, None):
        return None
    if coordinator is None or num_processes is None or process is None:
        raise ValueError(
            f"a job needs all of distributed.coordinator, here {coordinator}, "
            f"distributed.num_processes, here {num_processes}, and distributed.process, here {process}"
        )
    if not 0 <= process < num_processes:
        raise ValueError(f"distributed.process = {process} is not below {num_processes} processes")
    return Job(coordinator, num_processes, process, local_devices)


@contextlib.contextmanager
def joined(config: DistributedConfig) -> Iterator[Job | None]:
    """Joins the processes of the job, if there are several, and leaves together with them.

    To be entered before jax has looked for devices. A process that is lost, or that leaves with an
    error, ends all others within `heartbeat_seconds`.

    Raises:
        ValueError: see `find_job`.
        AbsentError: not all processes came within `start_seconds`.
    """
    job = find_job(config)
    if job is None:
        yield None
        return
    if job.process != 0:
        logging.getLogger("glmjax").setLevel(logging.WARNING)  # process 0 says it for all
    _call_roll(job, config.start_seconds)
    jax.distributed.initialize(
        job.coordinator,
        job.num_processes,
        job.process,
        job.local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=config.start_seconds,
        # jax ends processes by abort(), without a word of ours: let it come second.
        heartbeat_timeout_seconds=2 * config.heartbeat_seconds,
        shutdown_timeout_seconds=config.heartbeat_seconds,
    )
    watch = _Watch(job, config.heartbeat_seconds)
    try:
        yield job
        barrier("the end", config.barrier_seconds)
    except BaseException as error:  # noqa: BLE001 (the process ends with it)
        watch.leave_with(error)
    watch.stop()
    jax.distributed.shutdown()


def barrier(name: str, seconds: float) -> None:
    """Waits until every process is here. The name is used once in a job.

    Raises:
        AbsentError: not all came in time; names the absent.
    """
    client = global_state.client
    if client is None:
        return
    here = f"glmjax/barrier/{name}/{global_state.process_id}"
    client.key_value_set(here, "")
    try:
        client.wait_at_barrier(f"glmjax/{name}", int(seconds * 1000))
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        came = client.key_value_dir_get(f"glmjax/barrier/{name}")
        absent = set(range(global_state.num_processes)) - {
            int(key.rsplit("/", 1)[1]) for key, _ in came
        }
        raise AbsentError(f"{_names(absent)} did not come to {name} within {seconds:g} s") from None
    client.key_value_delete(here)


def _call_roll(job: Job, seconds: float) -> None:
    """Waits until every process is up, since jax says of those that are not only that there are some.

    Process 0 listens where the coordination service will be; each other says its number and hears
    whether all are there.

    Raises:
        AbsentError: not all came in time; names the absent.
    """
    deadline = time.monotonic() + seconds
    host, port = job.coordinator.rsplit(":", 1)
    if job.process == 0:
        _await_others(job, int(port), seconds, deadline)
        return
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):  # process 0 is not up yet
            with socket.create_connection((host.strip("[]"), int(port)), 10) as connection:
                connection.sendall(f"{job.process}\n".encode())
                connection.settimeout(max(1, deadline + 10 - time.monotonic()))
                answer = connection.makefile().readline().strip()
            if answer == "all":
                return
            if answer:
                raise AbsentError(answer)
        time.sleep(0.2)
    raise AbsentError(f"process 0 was not to be reached at {job.coordinator} within {seconds:g} s")


def _await_others(job: Job, port: int, seconds: float, deadline: float) -> None:
    connections: dict[int, socket.socket] = {}
    ipv6 = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if ipv6 else socket.AF_INET
    with socket.create_server(
        ("", port), family=family, backlog=job.num_processes, dualstack_ipv6=ipv6
    ) as server:
        while len(connections) < job.num_processes - 1 and time.monotonic() < deadline:
            server.settimeout(max(0.01, deadline - time.monotonic()))
            with contextlib.suppress(OSError, ValueError):  # a stranger, or nobody in time
                connection, _ = server.accept()
                connection.settimeout(10)
                connections[int(connection.makefile().readline())] = connection
    absent = set(range(1, job.num_processes)) - set(connections)
    answer = f"{_names(absent)} did not start within {seconds:g} s" if absent else "all"
    for connection in connections.values():
        with connection, contextlib.suppress(OSError):
            connection.sendall(f"{answer}\n".encode())
    if absent:
        raise AbsentError(answer)


class _Watch:
    """A thread that gives signs of life, and ends the process when the job is broken."""

    def __init__(self, job: Job, limit: float):
        self._job, self._limit, self._period = job, limit, limit / BEATS
        self._client: Any = global_state.client
        self._verdict, self._answered = "", time.monotonic()
        self._coordinator_lost = (
            f"process 0 at {job.coordinator}, which coordinates the job, is lost"
        )
        # jax's client aborts as soon as it cannot reach the coordinator, and asks nobody before.
        self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._aborted)
        ctypes.CDLL(None).signal(int(signal.SIGABRT), self._handler)
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the watch of all processes, which are at this point too."""
        if self._job.process == 0:
            self._client.key_value_set(END, "")
        self._thread.join()

    def leave_with(self, error: BaseException) -> None:
        """Tells the others of an error of this process, and ends it.

        A collective operation that fails may be the first sign of a process that is lost: then the
        thread, which will know which one, gets the time to end this process.
        """
        reason = str(error) or type(error).__name__
        unforeseen = not isinstance(error, ValueError | OSError | RuntimeError)
        logger.error(
            "process %d: %s", self._job.process, reason,
            exc_info=error if unforeseen or os.environ.get("GLMJAX_TRACEBACK") else None,
        )  # fmt: skip
        if isinstance(error, jax.errors.JaxRuntimeError):
            time.sleep(self._limit + 2 * self._period)
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the coordinator may be gone
            reason = f"process {self._job.process} ended with an error: {reason}"
            self._client.key_value_set(END, reason, allow_overwrite=True)
            time.sleep(1)  # process 0 takes the service with it
        _exit(RESTART if isinstance(error.__cause__ or error, AbsentError) else 1)

    def _run(self) -> None:
        seen = {process: ("", time.monotonic()) for process in range(self._job.num_processes)}
        host, beat = socket.gethostname(), 0
        while True:
            beat += 1
            try:
                mine = f"glmjax/alive/{self._job.process}"
                self._client.key_value_set(mine, f"{host} {beat}", allow_overwrite=True)
                self._answered = time.monotonic()
                if self._job.process == 0:
                    self._look_after(seen)
                verdict = self._client.blocking_key_value_get(END, int(1000 * self._period))
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" in str(error):
                    continue
                verdict = self._coordinator_lost
            break
        if verdict:
            self._verdict = verdict
            if "ended with an error" in verdict:
                time.sleep(self._period)  # this process may be about to say the same
            self._end(verdict)

    def _look_after(self, seen: dict[int, tuple[str, float]]) -> None:
        """Writes the verdict when a process has been silent for too long."""
        now = time.monotonic()
        for key, sign in self._client.key_value_dir_get("glmjax/alive"):
            process = int(key.rsplit("/", 1)[1])
            if seen[process][0] != sign:
                seen[process] = sign, now
        silent = [process for process, (_, at) in seen.items() if now - at > self._limit]
        if silent:
            hosts = ", ".join(seen[process][0].partition(" ")[0] for process in silent)
            reason = f"{_names(silent)} ({hosts}) gave no sign of life for {self._limit:g} s"
            self._client.key_value_set(END, reason, allow_overwrite=True)

    def _aborted(self, number: int) -> None:
        """The handler of SIGABRT: returns if another cause than the job must be behind it."""
        silent = time.monotonic() - self._answered > self._limit
        if not (self._verdict or silent) and _answers(self._job.coordinator):
            return
        self._end(self._verdict or self._coordinator_lost)

    def _end(self, reason: str) -> None:
        print(
            f"glmjax: {reason}; process {self._job.process} ends, start all processes again to go "
            "on from the last checkpoint",
            file=sys.stderr,
        )
        _exit(RESTART)


def _answers(address: str) -> bool:
    host, port = address.rsplit(":", 1)
    with contextlib.suppress(OSError), socket.create_connection((host.strip("[]"), int(port)), 5):
        return True
    return False


def _names(processes: Iterable[int]) -> str:
    numbers = sorted(processes)
    return ("process " if len(numbers) == 1 else "processes ") + ", ".join(map(str, numbers))


def _exit(status: int) -> None:
    """Ends this process without the farewell that jax would wait for."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
