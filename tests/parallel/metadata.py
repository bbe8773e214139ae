"""A server like that of the metadata of a machine in Google's cloud."""

import contextlib
import hashlib
import http.server
import threading
import urllib.parse
from collections.abc import Iterator


class Metadata:
    """What the server says of each key below computeMetadata/v1/instance/; keys it does not have are not found.

    Attributes:
      address: HOST:PORT.
      asked: the paths that were asked for, with their queries.
      failing: the status of every answer, if it is not 0.
    """

    def __init__(self):
        """Says nothing yet."""
        self.address = ""
        self.asked: list[str] = []
        self.failing = 0
        self._values: dict[str, str] = {}
        self._changed = threading.Condition()

    def __setitem__(self, key: str, value: str) -> None:
        """Changes a value, of which those are told that wait for it."""
        with self._changed:
            self._values[key] = value
            self._changed.notify_all()

    def answer(self, path: str) -> str | None:
        """The value of a path; if asked to wait for a change, once it is not what is known, or the time is over."""
        url = urllib.parse.urlsplit(path)
        query = urllib.parse.parse_qs(url.query)
        key = url.path.removeprefix("/computeMetadata/v1/instance/")
        with self._changed:
            self.asked.append(path)
            if key in self._values and query.get("wait_for_change") == ["true"]:
                (known,), (seconds,) = query["last_etag"], query["timeout_sec"]
                self._changed.wait_for(lambda: self.etag(self._values.get(key)) != known, float(seconds))
            return self._values.get(key)

    @staticmethod
    def etag(value: str | None) -> str:
        """What stands for a value."""
        return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


@contextlib.contextmanager
def serving() -> Iterator[Metadata]:
    """Serves on this machine while it is entered."""
    metadata = Metadata()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            value = metadata.answer(self.path) if self.headers["Metadata-Flavor"] == "Google" else None
            with contextlib.suppress(ConnectionError):  # who asked may be gone
                self.send_response(metadata.failing or (404 if value is None else 200))
                self.send_header("ETag", metadata.etag(value))
                self.end_headers()
                self.wfile.write((value or "").encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        server.block_on_close = False
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        metadata.address = f"127.0.0.1:{server.server_port}"
        yield metadata
        server.shutdown()
