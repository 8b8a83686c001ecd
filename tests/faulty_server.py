"""A web server on loopback that simulates network failures on request."""

from __future__ import annotations

import http.server
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

Fault = Callable[["Handler", bytes], None]  # answers in place of the server, which would have sent these bytes


class Handler(http.server.BaseHTTPRequestHandler):
    """Files of a folder, with ranges, and whatever fault comes next for a path."""

    server: Server
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        name = self.path.lstrip("/")
        path = self.server.folder / name
        data = path.read_bytes() if path.is_file() else None
        status, wanted = 200, self.headers.get("Range")
        if data is not None and wanted and self.server.ranges:
            first, last = wanted.removeprefix("bytes=").split("-")
            status, data = 206, data[int(first) : int(last) + 1]
        self.server.encodings.add(self.headers.get("Accept-Encoding"))
        if body:
            self.server.asked[name] += 1
            faults = self.server.faults.get(name) or self.server.faults.get("*") or []
            if faults:
                fault = faults[0] if faults[0] in LASTING else faults.pop(0)
                return fault(self, data or b"")
        self.send(404 if data is None else status, data or b"", body)

    def send(self, status: int, data: bytes, body: bool = True, claimed: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data) if claimed is None else claimed))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *rest: object) -> None:
        pass


def busy(to: Handler, data: bytes) -> None:
    to.send(503, b"")


def forbidden(to: Handler, data: bytes) -> None:
    to.send(403, b"")


def cut(to: Handler, data: bytes) -> None:
    to.send(200, data[: len(data) // 2], claimed=len(data))
    to.close_connection = True


def short(to: Handler, data: bytes) -> None:
    to.send(206, data[:-1])


def corrupt(to: Handler, data: bytes) -> None:
    to.send(206, data[:-1] + bytes([data[-1] ^ 1]))


def hang_up(to: Handler, data: bytes) -> None:
    to.close_connection = True


def stall(to: Handler, data: bytes) -> None:
    to.send(200, data[: len(data) // 2], claimed=len(data))
    to.wfile.flush()
    to.server.released.wait(30)
    to.close_connection = True


def always(fault: Fault) -> Fault:
    def lasting(to: Handler, data: bytes) -> None:
        fault(to, data)

    LASTING.append(lasting)
    return lasting


LASTING: list[Fault] = []


class Server(http.server.ThreadingHTTPServer):
    """A web server on loopback. ``faults``: file name, or ``*`` → what its next GETs get."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.ranges = folder, True
        self.faults: dict[str, list[Fault]] = {}
        self.asked: Counter[str] = Counter()
        self.encodings: set[str | None] = set()
        self.released = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *rest: object) -> None:
        pass  # clients hang up on it
