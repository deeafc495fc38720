"""The page of the metrics, on a port of its own."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from threading import Thread
from typing import Any, Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app

log = logging.getLogger("lapwing.server")

PATIENCE: Final = 5.0
"""Seconds that a reader has to ask and to read; whoever opens a connection and says nothing holds nothing up."""


class Page(ThreadingMixIn, WSGIServer):
    """One thread for each reader, and none of them left when it is closed."""

    daemon_threads = False
    block_on_close = True
    allow_reuse_address = True
    allow_reuse_port = False

    def server_bind(self) -> None:
        """Binds without asking a name server what this machine is called."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A reader went away or was too slow, which is its own affair."""
        log.debug("a reader of the metrics left early", exc_info=True)


class Reader(WSGIRequestHandler):
    """One reader of the page, who is not logged."""

    timeout = PATIENCE

    def log_message(self, format: str, *args: Any) -> None:
        """Logs nothing."""


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
        """Ends its threads; as often as one likes. Blocks up to `PATIENCE` while somebody reads."""
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
