"""Starting one process of many: who the others are, and jax.distributed.initialize with an end in bounded time.

Where processes find each other, in this order:

1. Addresses that are given: --coordinator HOST:PORT --processes N --process I. The processes first meet at that port
   (jmoe/parallel/channel.py), where mistakes become sentences; JAX's own service takes another port of the same host.
2. The cluster's own way, as JAX detects it: TPU VMs of several hosts, SLURM steps and Open MPI jobs of several tasks,
   indexed Kubernetes jobs. JAX connects them, and then they meet over the devices.
3. Otherwise there is one process, and nothing is started: a laptop, a shell within a SLURM allocation, one TPU VM.
   --processes 1 says so where 2 would be found.
"""

import contextlib
import dataclasses
import errno
import glob
import importlib.util
import ipaddress
import logging
import os
import pathlib
import re
import socket
import threading
from collections.abc import Iterator, Mapping

import jax

from jmoe.errors import LOST, LostProcessError, UserError
from jmoe.parallel.channel import Channel, Server, listen
from jmoe.parallel.hosts import Hosts, connect_over_devices, delay_abort, end_process, format_table, set_current
from jmoe.parallel.preemption import metadata

logger = logging.getLogger("jmoe")

TIMEOUT = 1800  # seconds: a scheduler may start the hosts of a large job that far apart
MOST_SECONDS = 10_000_000  # about four months
# JAX's own heartbeats are the second line: the channel finds a lost process within KEEPALIVE_SECONDS.
HEARTBEAT_SECONDS = 300


@dataclasses.dataclass(frozen=True, kw_only=True)
class Addresses:
    """Where the processes of a run meet, if it is not left to the cluster.

    Attributes:
      coordinator: "HOST:PORT" of process 0, as every host can reach it.
      processes: how many there are.
      process: the index of this one, from 0.
      local: that all of them run on this machine, so that the coordinator may be a loopback address.
    """

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    local: bool = False


def start(addresses: Addresses | None = None, *, timeout: float | int = TIMEOUT) -> Hosts:
    """Connects this process with the others of its run; to be called before JAX is used, and to be entered.

    Args:
      addresses: of the run; None, or one without values, to find them from the cluster.
      timeout: seconds within which all processes must have come.

    Raises:
      UserError: the addresses cannot be meant, or the processes do not fit together.
      LostProcessError: the coordinator cannot be reached, or processes are missing.
    """
    addresses = addresses or Addresses()
    if not 0 < timeout <= MOST_SECONDS:
        raise UserError(f"--startup-timeout must be more than 0 seconds and at most {MOST_SECONDS:,}, not {timeout:g}.")
    checked = check(addresses)
    if checked is not None:
        host, port, count, process = checked
        hosts = _start_given(host, port, count, process, addresses.local, timeout)
    elif addresses.processes == 1 or (found := cluster()) is None:
        return set_current(Hosts(timeout=timeout))
    else:
        hosts = _start_found(found, timeout)
    set_current(hosts)
    with _failing_together(hosts):
        table = hosts.table()
    if hosts.process == 0 and hosts.count > 1:
        logger.info("%s", format_table(table))
    return hosts


def check(addresses: Addresses) -> tuple[str, int, int, int] | None:
    """Returns host, port, count and index of addresses that can be meant; None if there are none, or one process.

    Raises:
      UserError: they are incomplete or malformed, or an address of the machine itself for processes on several hosts.
    """
    given = {"--coordinator": addresses.coordinator, "--processes": addresses.processes, "--process": addresses.process}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == 3 or (addresses.processes == 1 and addresses.coordinator is None and not addresses.process):
        if addresses.local and len(missing) == 3:
            raise UserError("--local is about --coordinator, --processes and --process; give them, too.")
        return None
    if missing:
        there = " and ".join(name for name, value in given.items() if value is not None)
        raise UserError(
            f"{there} came without {' and '.join(missing)}. Every process needs all three, --coordinator HOST:PORT "
            "--processes N --process I, or none of them to have the cluster say."
        )
    coordinator, count, process = addresses.coordinator, addresses.processes, addresses.process
    assert coordinator is not None
    assert count is not None
    assert process is not None
    host, port = _parse(coordinator)
    if count < 1:
        raise UserError(f"--processes must be 1 or more, not {count}.")
    if not 0 <= process < count:
        raise UserError(f"--process {process} is not one of the {count} processes: they count from 0 to {count - 1}.")
    if count == 1:
        return None
    if not addresses.local and _is_own(host, process):
        raise UserError(
            f"The coordinator {coordinator} is a loopback or unspecified address, at which a host reaches only itself. "
            f"Give the name or address of the machine of process 0 as the other hosts see it; or --local, if all "
            f"{count} processes run on this machine."
        )
    return host, port, count, process


def cluster(environment: Mapping[str, str] = os.environ) -> str | None:
    """Which cluster has started several processes of this run, by what it leaves in the environment; None for none."""

    def number(name: str) -> int:
        value = environment.get(name, "")
        return int(value) if value.isdecimal() else 0

    slurm = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
    if number("SLURM_NTASKS") > 1 and all(name in environment for name in slurm):  # a step of srun, not a shell
        return "SLURM"
    if number("OMPI_COMM_WORLD_SIZE") > 1:
        return "Open MPI"
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment and not _has_tpu():
        if importlib.util.find_spec("kubernetes") is None:
            raise UserError(
                "This is a pod of an indexed Kubernetes job, and finding the others needs the package 'kubernetes': "
                "pip install 'jax[k8s]'. Or give --coordinator, --processes and --process; --processes 1 trains alone."
            )
        return "Kubernetes"
    if _has_tpu() and _tpu_hosts(environment) > 1:
        return "TPU"
    return None


def _start_given(host: str, port: int, count: int, process: int, local: bool, timeout: float | int) -> Hosts:
    """Meets at the coordinator's port, and has JAX use another that is free there."""
    shown = f"{host}:{port}"
    service, server = 0, None
    if process == 0:
        bind = host if local else ""
        try:
            listener = listen(bind, port)
            with listen(bind, 0) as probe:
                service = probe.getsockname()[1]
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                _ask_who_listens(host, port, count, shown)
            why = os.strerror(error.errno) if error.errno else error
            advice = {
                errno.EADDRNOTAVAIL: f"{host} is no address of this machine, {socket.gethostname()}: give one that is.",
                errno.EACCES: "Choose a port of at least 1024, the same on all hosts.",
            }.get(
                error.errno or 0,
                "Is another process 0 running on this machine, or another program at that port? Choose another port, "
                "the same on all hosts.",
            )
            raise UserError(f"Process 0 cannot listen at {shown}: {why}. {advice}") from error
        server = Server(listener, count, timeout, announce=str(service))
        server.start()
    delay_abort()
    channel = Channel((host, port), count, process, timeout=timeout, shown=shown)
    hosts = Hosts(channel, process, server=server, timeout=timeout)
    bracketed = f"[{host}]" if ":" in host else host
    with _failing_together(hosts), _deadline(timeout, f"JAX's service at {bracketed}:{channel.announce}"):
        _initialize(
            timeout,
            coordinator_address=f"{bracketed}:{channel.announce}",
            num_processes=count,
            process_id=process,
            coordinator_bind_address=f"{bracketed}:{channel.announce}" if local else None,
            cluster_detection_method="deactivate",
        )
    return hosts


def _ask_who_listens(host: str, port: int, count: int, shown: str) -> None:
    """If it is another process 0 of this run, all are told so: raises the UserError that they get."""
    with contextlib.suppress(LostProcessError):  # another program, or a run that has begun
        Channel((host, port), count, 0, timeout=5, shown=shown)


def _start_found(found: str, timeout: float | int) -> Hosts:
    """Has JAX find the others, and then meets them."""
    logger.info("Waiting for the other processes of this %s job, up to %g s.", found, timeout)
    with _deadline(timeout, f"the coordinator of this {found} job"):
        try:
            _initialize(timeout)
        except UserError as error:
            raise UserError(
                f"{error} This was found to be a {found} job; give --coordinator, --processes and --process, or "
                "--processes 1 to train alone."
            ) from error
        return connect_over_devices(timeout=timeout) if jax.process_count() > 1 else Hosts(timeout=timeout)


def _initialize(timeout: float | int, **arguments: object) -> None:
    # JAX's handler of SIGTERM would take the signal and do nothing; the loop has its own (jmoe/train/signals.py).
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            initialization_timeout=int(timeout) + 120,  # our own sentence comes first
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            **arguments,  # pyright: ignore[reportArgumentType]
        )
    except (RuntimeError, ValueError, OSError, ImportError) as error:
        raise UserError(f"JAX could not connect the processes: {' '.join(str(error).split())}") from error


@contextlib.contextmanager
def _failing_together(hosts: Hosts) -> Iterator[None]:
    """Tells the others of an error within, as hosts that are entered do."""
    try:
        yield
    except BaseException as error:
        hosts.__exit__(type(error), error, None)
        raise


@contextlib.contextmanager
def _deadline(seconds: float | int, what: str) -> Iterator[None]:
    """Ends the process with a sentence when the block takes longer: JAX itself would end it with a stack of C++."""
    sentence = (
        f"Not all processes came to {what} within {seconds:g} s. See whether the same command runs on every host, what "
        "it says there, and whether a firewall is between them."
    )
    timer = threading.Timer(seconds, end_process, (sentence, LOST))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _parse(coordinator: str) -> tuple[str, int]:
    """Splits "HOST:PORT"; an IPv6 address stands in brackets."""
    match = re.fullmatch(r"(?:\[([0-9a-fA-F:.%\w]+)\]|([\w.-]+)):(\d{1,5})", coordinator, re.ASCII)
    if match is None or not 0 < int(match[3]) < 65536:
        raise UserError(
            f"--coordinator {coordinator} is not an address: HOST:PORT was wanted, with a port from 1 to 65535, such "
            "as host-0:1234, 10.0.0.5:1234 or [fd00::5]:1234."
        )
    return match[1] or match[2], int(match[3])


def _is_own(host: str, process: int) -> bool:
    """Whether a host means only this machine itself, by its text or by what its name resolves to here."""
    try:
        return _is_own_address(host)
    except ValueError:
        name = host.lower().rstrip(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    if process == 0 and name in (socket.gethostname().lower(), socket.getfqdn().lower()):
        return False  # many systems have their own name at 127.0.1.1, and other hosts know it by its real address
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(host, None)}
    except OSError:
        return False  # not known yet; connecting says more
    return all(_is_own_address(str(address).partition("%")[0]) for address in found)


def _is_own_address(text: str) -> bool:
    """Whether an address is loopback (127.0.0.1, ::1) or unspecified (0.0.0.0, ::), also if IPv4 is written as IPv6."""
    address = ipaddress.ip_address(text)
    address = getattr(address, "ipv4_mapped", None) or address
    return address.is_loopback or address.is_unspecified


def _has_tpu() -> bool:
    """Whether TPU chips of Google's are on this machine: their device files, and their maker on the bus."""
    if not (glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")):
        return False
    vendors = (pathlib.Path(path) for path in glob.glob("/sys/bus/pci/devices/*/vendor"))
    return any(path.read_text().strip() == "0x1ae0" for path in vendors)


def _tpu_hosts(environment: Mapping[str, str]) -> int:
    """How many hosts have the TPU slices of this job: from the environment (GKE), or from the machine's metadata."""
    asks = "TPU_SKIP_MDS_QUERY" not in environment
    slices, named = environment.get("MEGASCALE_NUM_SLICES"), environment.get("TPU_PROCESS_ADDRESSES")
    named = named or environment.get("TPU_WORKER_HOSTNAMES")
    if slices is None and named is None and asks:
        written = re.search(r"MEGASCALE_NUM_SLICES:\s*'?(\d+)", metadata("attributes/tpu-env", environment) or "")
        slices = written[1] if written else None
    if slices is not None and slices.isdecimal() and int(slices) > 1:
        return int(slices)
    if named is None and asks:
        named = metadata("attributes/worker-network-endpoints", environment)
    return len((named or "").split(","))
