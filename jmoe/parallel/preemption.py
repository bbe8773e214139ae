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
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping

logger = logging.getLogger("jmoe")

_PRODUCT = pathlib.Path("/sys/class/dmi/id/product_name")
_ANSWERS_WITHIN = 60  # seconds: a server that is asked to wait for a change says after them that there was none
_LEAST = 1.0  # seconds between two requests
_AGAIN_AFTER = 5.0  # seconds, where the server does not answer
_NO_ANSWER = (OSError, http.client.HTTPException, ValueError)  # a URLError is an OSError


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
    waiting, known, failed = f"preempted?wait_for_change=true&timeout_sec={_ANSWERS_WITHIN}", "NONE", False
    while not over.is_set():
        began = time.monotonic()
        try:
            # What the server knows is told at once if it is not what was known here; else when it changes.
            value, known = _ask(f"{waiting}&last_etag={known}", environment, _ANSWERS_WITHIN + 10)
        except _NO_ANSWER as error:
            if isinstance(error, urllib.error.HTTPError) and error.code in (403, 404):
                return  # hidden, as from pods, which get SIGTERM
            if not failed:
                logger.info("The metadata of this machine, which tell of a preemption, do not answer: %s.", error)
            failed = True
            over.wait(_AGAIN_AFTER)
        else:
            if value.strip() == "TRUE" and not over.is_set():
                tell("Google Cloud preempts this machine")
                return
            over.wait(_LEAST - (time.monotonic() - began))  # of a server that does not wait


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
    try:
        return _ask(key, environment, timeout)[0]
    except _NO_ANSWER:
        return None


def _ask(key: str, environment: Mapping[str, str], timeout: float | int) -> tuple[str, str]:
    """The value of a key and its ETag; raises HTTPError if it is not told, and others of `_NO_ANSWER`."""
    server = environment.get("GCE_METADATA_HOST") or environment.get("GCE_METADATA_IP") or "metadata.google.internal"
    request = urllib.request.Request(
        f"http://{server}/computeMetadata/v1/instance/{key}", headers={"Metadata-Flavor": "Google"}
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=timeout) as answer:
        return answer.read().decode(), answer.headers.get("ETag", "NONE")
