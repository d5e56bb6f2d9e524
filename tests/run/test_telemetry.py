"""Figures of devices while a run goes on: in its record, and for Prometheus to fetch."""

import json
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from nvml_library import build, surround
from test_train import SMALL, rows

from training.health.config import TelemetryConfig
from training.metrics import Record
from training.prometheus import Prometheus
from training.sinks import open_record
from training.telemetry import collect, keep

DEVICE = {"time": 1.0, "rank": 3, "node": 'n"1', "device": 3, "watts": 512.5, "joules": None, "temperature": 41}


def test_the_devices_of_all_ranks_are_in_the_record(tmp_path: Path) -> None:
    library, states = build(tmp_path), tmp_path / "states.txt"
    states.write_text("system devices 2\n0 power 300000\n1 lost 2\n")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 900)
    words = ["data.corpus=[text.txt]", *SMALL, "parallel.dp=2", "verify=skip", "run.id=mine", "telemetry.every=0.05"]
    done = subprocess.run(
        [sys.executable, "-m", "launcher.train", *words, "run.steps=20"],
        cwd=tmp_path,
        env=surround(library, states),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert not done.returncode, done.stdout + done.stderr
    found = rows(tmp_path / "runs/mine", "device")
    assert {(row["rank"], row["device"]) for row in found} == {(0, 0), (1, 1)}
    first = next(row for row in found if row["rank"] == 0)
    assert (first["watts"], first["joules"], first["utilisation"]) == (300.0, 123456.789, 93)
    assert (first["memory_used"], first["temperature"], first["throttles"]) == (64424509440, 41, [])
    lost = next(row for row in found if row["rank"] == 1)
    assert lost["fault"] == "has fallen off the bus" and lost["watts"] is None
    times = [row["time"] for row in found if row["rank"] == 0]
    assert len(times) > 1 and times == sorted(set(times))
    assert [row["step"] for row in rows(tmp_path / "runs/mine", "step")] == list(range(20))


def test_a_run_without_such_devices_has_no_rows(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 900)
    words = ["data.corpus=[text.txt]", *SMALL, "run.id=mine", "run.steps=2", "telemetry.every=0.05"]
    subprocess.run([sys.executable, "-m", "launcher.train", *words], cwd=tmp_path, check=True, capture_output=True)
    assert not rows(tmp_path / "runs/mine", "device") and not (tmp_path / "runs/mine/logs/rank0/device.json").exists()


def test_what_was_drawn_stays_where_steps_are_taken_again(tmp_path: Path) -> None:
    with Record(tmp_path / "metrics.jsonl") as record:
        for step in range(3):
            record.write("step", step=step)
            record.write("device", **DEVICE | {"time": float(step)})
        record.rewind(1)
        record.write("step", step=1)
    kinds = [
        (row["kind"], row.get("step", row.get("time")))
        for row in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    ]
    assert kinds == [("step", 0), ("device", 0.0), ("device", 1.0), ("device", 2.0), ("step", 1)]


def test_rows_of_several_threads_are_whole(tmp_path: Path) -> None:
    with Record(tmp_path / "metrics.jsonl") as record:

        def write(rank: int) -> None:
            for step in range(300):
                record.write("device", rank=rank, step=step, padding="x" * 500)

        threads = [threading.Thread(target=write, args=(rank,)) for rank in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    found = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for rank in range(4):
        assert [row["step"] for row in found if row["rank"] == rank] == list(range(300))


def test_a_sample_is_taken_once(tmp_path: Path) -> None:
    seen: dict[int, float] = {}
    keep(tmp_path, DEVICE)
    assert list(collect(tmp_path, 5, seen)) == [DEVICE] and list(collect(tmp_path, 5, seen)) == []
    keep(tmp_path, DEVICE | {"time": 2.0})
    assert [row["time"] for row in collect(tmp_path, 5, seen)] == [2.0] and seen == {3: 2.0}


def fetch(port: int, path: str = "/metrics") -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=20) as answer:
        return str(answer.read().decode())


def test_prometheus_gets_the_latest_figures(tmp_path: Path) -> None:
    with open_record([], tmp_path / ".", prometheus="127.0.0.1:0") as record:
        (server,) = (writer for writer in record._writers if isinstance(writer, Prometheus))
        assert fetch(server.port) == ""
        record.write("step", step=0, loss=5.0, tokens_per_second=10.0)
        record.write("step", step=1, loss=float("nan"), tokens_per_second=20.0)
        record.write("eval", step=1, loss=4.5)
        record.write("device", **DEVICE)
        lines = fetch(server.port).splitlines()
        run = f'run="{tmp_path.name}"'
        device = f'{run},rank="3",node="n\\"1",device="3"'
        assert [line for line in lines if not line.startswith("#")] == [
            f"shoestring_step{{{run}}} 1.0",
            f"shoestring_loss{{{run}}} nan",
            f"shoestring_tokens_per_second{{{run}}} 20.0",
            f"shoestring_held_out_loss{{{run}}} 4.5",
            f"shoestring_device_watts{{{device}}} 512.5",
            f"shoestring_device_temperature{{{device}}} 41.0",
        ]
        assert "# TYPE shoestring_loss gauge" in lines
        with pytest.raises(urllib.error.HTTPError, match="404"):
            fetch(server.port, "/metrics/../config.yaml")
        listening = Path("/proc/net/tcp").read_text()
        assert f"0100007F:{server.port:04X} 00000000:0000 0A" in listening, "on this address alone"
        port = server.port
    with pytest.raises(urllib.error.URLError):
        fetch(port)


def test_an_address_that_is_taken_is_a_mistake(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ValueError, match=f"^telemetry.prometheus={address} cannot be listened at: Address already"):
            open_record([], tmp_path, prometheus=address)


@pytest.mark.parametrize("address", ["9400", ":9400", "localhost", "localhost:", "localhost:x", "localhost:65536"])
def test_an_address_is_a_host_and_a_port(address: str) -> None:
    with pytest.raises(ValueError, match=f"^telemetry.prometheus={address} must be host:port"):
        TelemetryConfig(prometheus=address)
    assert TelemetryConfig(prometheus="[::1]:9400").prometheus == "[::1]:9400"
