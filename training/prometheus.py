"""The latest figures of a run for Prometheus to fetch: rank 0 answers at ``telemetry.prometheus``, and nowhere else.

    GET /metrics    shoestring_loss{run="mine"} 2.314
                    shoestring_device_watts{run="mine",rank="3",node="n1",device="3"} 512.3

The text format of Prometheus, version 0.0.4, from the standard library's server. It takes rows as any sink does.
"""

import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from training.health.config import split_address
from training.telemetry import FIGURES

# Field of a row -> its name here and what it is.
STEP = {
    "step": ("step", "the last step taken, from 0"),
    "loss": ("loss", "cross entropy of the next token over the last batch, nats"),
    "tokens_per_second": ("tokens_per_second", "of the last step"),
    "seconds": ("step_seconds", "that the last step took"),
    "grad_norm": ("gradient_norm", "before clipping"),
    "lr": ("learning_rate", "of the last step"),
    "peak_memory": ("peak_memory_bytes", "that rank 0 has held"),
}
EVAL = {"loss": ("held_out_loss", "of the last evaluation, nats a token")}
DEVICE = {name: (f"device_{name}", "as NVML has it") for name in FIGURES}
TABLES = {"step": STEP, "eval": EVAL, "device": DEVICE}
LABELS = ("rank", "node", "device")


class Prometheus:
    """A sink. Raises ValueError for an address that cannot be had."""

    def __init__(self, address: str, folder: Path) -> None:
        self._figures: dict[tuple[str, str], float] = {}  # by name and labels
        self._run, self._lock = folder.name, threading.Lock()
        host, port = split_address(address)
        try:
            self._server = _serve(host, port, self.show)
        except OSError as error:
            raise ValueError(f"telemetry.prometheus={address} cannot be listened at: {error.strerror}") from error
        self.port: int = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, name="prometheus", daemon=True).start()

    def rewind(self, step: int) -> None:
        """What was is forgotten with the next row."""

    def write(self, row: dict[str, Any]) -> None:
        table = TABLES.get(row["kind"], {})
        labels = {"run": self._run, **{name: row[name] for name in LABELS if row["kind"] == "device"}}
        written = ",".join(f'{name}="{_escape(str(value))}"' for name, value in labels.items())
        with self._lock:
            for field, (name, _) in table.items():
                if row.get(field) is not None:
                    self._figures[name, written] = float(row[field])

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def show(self) -> str:
        """All of it."""
        with self._lock:
            figures = dict(self._figures)
        lines = []
        for table in TABLES.values():
            for name, what in table.values():
                here = {labels: value for (known, labels), value in figures.items() if known == name}
                if here:
                    lines += [f"# HELP shoestring_{name} {what}", f"# TYPE shoestring_{name} gauge"]
                    lines += [f"shoestring_{name}{{{labels}}} {value!r}" for labels, value in here.items()]
        return "\n".join([*lines, ""])


def _escape(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _serve(host: str, port: int, show: Any) -> ThreadingHTTPServer:
    class Server(ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        daemon_threads = True

    class Handler(BaseHTTPRequestHandler):
        timeout = 10  # seconds that somebody may take to ask

        def do_GET(self) -> None:
            found = self.path.split("?")[0] == "/metrics"
            text = show().encode() if found else b"GET /metrics\n"
            self.send_response(200 if found else 404)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Server((host, port), Handler)
