"""The page of the metrics, on a port of its own."""

from __future__ import annotations

import io
import logging
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from socketserver import ThreadingMixIn
from threading import Lock, Thread
from typing import Any, Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app

log = logging.getLogger("lapwing.server")

PATIENCE: Final = 5.0
"""Seconds that a reader has to ask and to read all of it; whoever is slower is cut off."""

READERS: Final = 8
"""At the same time; one more takes the place of the one who has been there longest."""

FAREWELL: Final = 1.0
"""Seconds that the end waits for the threads of readers, whose connections are closed by then."""


class Page(ThreadingMixIn, WSGIServer):
    """One thread for each reader, none of which anybody waits for."""

    allow_reuse_address = True
    allow_reuse_port = False
    request_queue_size = 64

    def __init__(self, *arguments: Any) -> None:
        self._lock = Lock()
        self._readers: dict[socket.socket, tuple[float, Thread]] = {}
        """When each came, oldest first, and its thread."""
        super().__init__(*arguments)

    def server_bind(self) -> None:
        """Binds without asking a name server what this machine is called."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Begins a thread for a reader."""
        thread = Thread(
            target=self.process_request_thread, args=(request, client_address), name="lapwing-reader", daemon=True
        )
        with self._lock:
            if len(self._readers) >= READERS:
                self._cut(next(iter(self._readers)))
            self._readers[request] = time.monotonic(), thread
        thread.start()

    def shutdown_request(self, request: Any) -> None:
        """Called by the thread of a reader when it is done with them."""
        with self._lock:
            self._readers.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Called again and again while it serves: cuts off who is too slow."""
        with self._lock:
            for request, (came, _) in list(self._readers.items()):
                if time.monotonic() - came > PATIENCE:
                    self._cut(request)

    def server_close(self) -> None:
        """Lets nobody in any more, and cuts off who is there."""
        super().server_close()
        with self._lock:
            threads = [thread for _, thread in self._readers.values()]
            for request in list(self._readers):
                self._cut(request)
        until = time.monotonic() + FAREWELL
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A reader went away or was too slow, which is its own affair."""
        log.debug("a reader of the metrics left early", exc_info=True)

    def _cut(self, request: socket.socket) -> None:
        """Wakes the reader's thread, which finds the connection closed and ends."""
        del self._readers[request]
        with suppress(OSError):
            request.shutdown(socket.SHUT_RDWR)


class Reader(WSGIRequestHandler):
    """One reader of the page, who is not logged."""

    def log_message(self, *_: Any) -> None:
        """Logs nothing."""

    def get_stderr(self) -> io.StringIO:
        """Where the library would print that a reader left."""
        return io.StringIO()


class MetricsServer:
    """Serves the metrics of a registry over HTTP, on any path, until it is stopped.

    Args:
        registry: whose metrics.
        port: 0 takes a free one.
        host: address to listen on; the default is reached from this machine only.
    """

    def __init__(self, registry: CollectorRegistry, port: int = 0, host: str = "127.0.0.1") -> None:
        self._registry = registry
        self._port, self._host = port, host
        self._page: Page | None = None
        self._thread: Thread | None = None

    def start(self) -> int:
        """Listens and returns the port.

        Raises:
            OSError: the port can't be listened on.
        """
        try:
            page = page_class(self._host)((self._host, self._port), Reader)
        except OSError as error:
            raise OSError(
                f"port {self._port} of host {self._host} can't be listened on for the metrics ({error.strerror}); "
                "give another --metrics-port (0 for a free one) or --metrics-host"
            ) from error
        page.set_app(careful(make_wsgi_app(self._registry)))
        self._page = page
        self._thread = Thread(target=page.serve_forever, kwargs={"poll_interval": 0.1}, name="lapwing-metrics")
        self._thread.daemon = True
        self._thread.start()
        return int(page.server_port)

    def stop(self) -> None:
        """Ends its threads, and cuts off who reads; as often as one likes."""
        page, thread, self._page, self._thread = self._page, self._thread, None, None
        if page is not None and thread is not None:
            page.shutdown()
            page.server_close()
            thread.join()


def page_class(host: str) -> type[Page]:
    """The server for the kind of address that the host is.

    Raises:
        OSError: it is none.
    """
    family = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
    return type("Page", (Page,), {"address_family": family})


def careful(app: Callable[[Any, Any], Iterable[bytes]]) -> Callable[[Any, Any], Iterable[bytes]]:
    """The same page; what goes wrong with it is logged and not printed."""

    def page(environ: Any, start_response: Any) -> Iterable[bytes]:
        try:
            return app(environ, start_response)
        except Exception as error:
            log.error("the page of the metrics failed with %s", type(error).__qualname__)
            start_response("500 Internal Server Error", [("Content-Type", "text/plain")])
            return [b"the metrics can't be read; the server's log says more\n"]

    return page
