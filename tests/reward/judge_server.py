"""A judge that answers, or fails, as it is told."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Judging(ThreadingHTTPServer):
    """Scores a report by its words; `faults` are used up first, one a request."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults: list[str] = []
        self.asked: list[list[str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/score"


class Handler(BaseHTTPRequestHandler):
    server: Judging

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert len(asked["reports"]) == len(asked["references"])
        self.server.asked.append(asked["reports"])
        scores = [len(report.split()) / 10 for report in asked["reports"]]
        fault = self.server.faults.pop(0) if self.server.faults else ""
        if fault == "late":
            time.sleep(1.0)
        body = {
            "prose": b"The first report is quite good: 8 of 10.",
            "fewer": json.dumps({"scores": scores[1:]}).encode(),
            "nan": b'{"scores": [' + b", ".join([b"NaN"] * len(scores)) + b"]}",
            "null": json.dumps({"scores": [None] * len(scores)}).encode(),
            "words": json.dumps({"scores": ["8"] * len(scores)}).encode(),
            "nested": b"[" * 100_000,
            "large": b'{"scores": [' + b", ".join([b"1" + b"0" * 400] * len(scores)) + b"]}",
            "larger": b'{"scores": [' + b", ".join([b"1" + b"0" * 5000] * len(scores)) + b"]}",
            "bare": json.dumps(scores).encode(),
        }.get(fault, json.dumps({"scores": scores}).encode())
        self.send_response(int(fault) if fault.isdigit() else 200)
        if fault == "302":
            self.send_header("Location", "http://192.0.2.1/score")
        self.send_header("Content-Length", str(len(body) + (10 if fault == "cut" else 0)))
        self.end_headers()
        try:
            if fault == "dribble":
                for byte in body:
                    self.wfile.write(bytes([byte]))
                    time.sleep(0.1)
            else:
                self.wfile.write(body)
        except BrokenPipeError:
            pass  # who asked has given up

    def log_message(self, *what: object) -> None:
        pass


@contextmanager
def judging() -> Iterator[Judging]:
    server = Judging()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
