"""Hears of a preemption before the machine goes: what Google's cloud tells a machine about itself.

SIGTERM reaches a training that a scheduler has started (Kubernetes, SLURM), but not always one that was started over
ssh on a spot TPU VM: its machine goes down half a minute after the cloud has decided so, and who is told first is the
machine's metadata, https://cloud.google.com/compute/docs/instances/create-use-spot. Other clouds have other ways, and
what watches those there can send SIGTERM.
"""

import contextlib
import http.client
import logging
import os
import pathlib
import threading
import urllib.request
from collections.abc import Callable, Iterator, Mapping

logger = logging.getLogger("jmoe")

_PRODUCT = pathlib.Path("/sys/class/dmi/id/product_name")
_ANSWERS_WITHIN = 60  # seconds: a server that is asked to wait for a change says after them that there was none
_AGAIN_AFTER = 5.0  # seconds, where the server does not answer


@contextlib.contextmanager
def watched(tell: Callable[[str], None], environment: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Within, calls `tell`, from a thread and at most once, with where a notice came from that this machine goes.

    Nothing is watched on machines that are not of Google's cloud, nor where the metadata does not say.

    Args:
      tell: is to return at once.
      environment: may name another server by GCE_METADATA_HOST or GCE_METADATA_IP, which counts as being in the cloud.
    """
    if not is_google_cloud(environment):
        yield
        return
    over = threading.Event()
    thread = threading.Thread(target=_watch, args=(tell, over, environment), name="jmoe-preemption", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()  # the thread may still wait for an answer, for a minute at most; nobody listens to it any more


def _watch(tell: Callable[[str], None], over: threading.Event, environment: Mapping[str, str]) -> None:
    answer = metadata("preempted", environment)
    while answer is not None and not over.is_set():
        if answer.strip() == "TRUE":
            tell("Google Cloud preempts this machine")
            return
        waiting = f"preempted?wait_for_change=true&timeout_sec={_ANSWERS_WITHIN}"
        newer = metadata(waiting, environment, timeout=_ANSWERS_WITHIN + 10)
        if newer is None:
            over.wait(_AGAIN_AFTER)
        answer = newer or answer


def is_google_cloud(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this is a machine of Google's cloud, by what it says it is or by an address of its metadata."""
    if environment.get("GCE_METADATA_HOST") or environment.get("GCE_METADATA_IP"):
        return True
    try:
        return _PRODUCT.read_text().strip().startswith("Google")
    except OSError:
        return False


def metadata(key: str, environment: Mapping[str, str] = os.environ, *, timeout: float | int = 5) -> str | None:
    """What a machine of Google's cloud is told about itself; None elsewhere, or if there is no answer in time.

    Args:
      key: below computeMetadata/v1/instance/, such as "attributes/worker-network-endpoints".
      environment: as in `watched`.
      timeout: seconds.
    """
    server = environment.get("GCE_METADATA_HOST") or environment.get("GCE_METADATA_IP") or "metadata.google.internal"
    request = urllib.request.Request(
        f"http://{server}/computeMetadata/v1/instance/{key}", headers={"Metadata-Flavor": "Google"}
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=timeout) as answer:
            return answer.read().decode()
    except (OSError, http.client.HTTPException, ValueError):  # a URLError is an OSError
        return None
