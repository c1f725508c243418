"""The local server: the page, updates of its runs, and single trees.

::

    GET /                                   the page
    GET /api/run/0?metrics=1.20&trees=1.80  rows added since these cursors (`RunView.poll`)
    GET /api/run/0/tree/step-...json.gz     one tree, gzipped JSON
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

from ibtpo.viewer.page import render_page
from ibtpo.viewer.run import RunView, open_views

HOST = "127.0.0.1"
DEFAULT_PORT = 8642
_LOCAL_NAMES = ("127.0.0.1", "localhost")


class Viewer:
    """Serves the page of one or two runs on this machine only; a context manager.

    Args:
        runs: run folders, finished or being written.
        port: port to listen on; 0: any free one; None: `DEFAULT_PORT`, or any free one if that is taken.

    Raises:
        ValueError: a path is not a run folder, or the port is taken.
    """

    def __init__(self, runs: Sequence[Path], port: int | None = None) -> None:
        self.views = open_views(runs)
        try:
            self._server = _Server(self.views, DEFAULT_PORT if port is None else port)
        except OSError as error:
            if port is not None:
                raise ValueError(
                    f"port: {port} cannot be used ({error.strerror}); choose another, or 0 for any"
                ) from None
            self._server = _Server(self.views, 0)

    @property
    def url(self) -> str:
        """Address of the page."""
        return f"http://{HOST}:{self._server.server_address[1]}/"

    def serve(self) -> None:
        """Answer requests until `stop` is called from another thread, or Ctrl-C."""
        self._server.serve_forever(poll_interval=0.1)

    def stop(self) -> None:
        """End `serve`."""
        self._server.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, views: Sequence[RunView], port: int) -> None:
        super().__init__((HOST, port), _Handler)
        self.views = views

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore browsers that disconnect before they have their answer."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Answer a request; hosts other than this machine's names are rejected, against DNS rebinding."""
        # the port is not compared: browsers omit port 80
        if self.headers.get("Host", "").partition(":")[0] not in _LOCAL_NAMES:
            return self._send(HTTPStatus.FORBIDDEN, b"only this machine may look", "text/plain")
        url = urlsplit(self.path)
        parts = [part for part in url.path.split("/") if part]
        if not parts:
            return self._send(HTTPStatus.OK, self._page(), "text/html; charset=utf-8")
        if parts[:2] == ["api", "run"] and len(parts) >= 3 and (view := self._view(parts[2])) is not None:
            if len(parts) == 3:
                query = {name: values[-1] for name, values in parse_qs(url.query).items()}
                answer = view.poll(query.get("metrics", ""), query.get("trees", ""))
                return self._send(HTTPStatus.OK, json.dumps(answer, allow_nan=False).encode(), "application/json")
            if len(parts) == 5 and parts[3] == "tree" and (tree := view.tree(parts[4])) is not None:
                return self._send(HTTPStatus.OK, tree, "application/json", encoding="gzip")
        return self._send(HTTPStatus.NOT_FOUND, b"nothing here", "text/plain")

    def _view(self, number: str) -> RunView | None:
        return {str(i): view for i, view in enumerate(self.server.views)}.get(number)

    def _page(self) -> bytes:
        views = self.server.views
        return render_page([view.name for view in views], [view.poll() for view in views], live=True).encode()

    def _send(self, status: HTTPStatus, body: bytes, kind: str, *, encoding: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        if encoding:
            self.send_header("Content-Encoding", encoding)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""
