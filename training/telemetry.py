"""What devices draw, do and hold while a run goes on: sampled in a thread beside each rank, which never stops a run.

    every rank    its device, every telemetry.every seconds --> logs/rank3/device.json
    rank 0        the files of all ranks --> a row "device" of the record for each that is new

Without NVIDIA's library there is nothing to sample, and no thread. Energy is what the device has drawn since its driver
was loaded: the difference of two rows is what was drawn between them, however seldom they are.
"""

import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from parallel.mesh import Mesh
from training.health.beat import locate, name_process
from training.metrics import Record
from training.nvml import Device, find_visible, open_nvml

FILE = "device.json"  # in a rank's logs
FIGURES = ("watts", "joules", "utilisation", "memory_used", "memory_total", "temperature", "sm_mhz")


@contextmanager
def sample_devices(every: float | None, mesh: Mesh, folder: Path, record: Record) -> Iterator[None]:
    """While entered, this rank's device is sampled every so many seconds (None: not at all); rank 0 puts what all ranks
    say into ``record``. ``folder`` is the run's."""
    over = threading.Event()
    local = int(os.environ.get("LOCAL_RANK", "0"))

    def sample() -> None:
        seen: dict[int, float] = {}  # the time of the last sample of each rank, on rank 0
        with open_nvml() as nvml:
            if nvml is None:
                return
            devices = find_visible(os.environ, [nvml.read(index) for index in range(nvml.count)])
            own = devices[local if len(devices) > 1 else 0].index if local < len(devices) or len(devices) == 1 else None
            while own is not None:
                with suppress(Exception):  # it is there for people to look at: no run is worth less without it
                    keep(folder, describe(mesh.rank, nvml.read(own)))
                    if mesh.rank == 0:
                        for row in collect(folder, mesh.topology.world, seen):
                            record.write("device", **row)
                if over.wait(every):
                    return

    thread = threading.Thread(target=sample, name="telemetry", daemon=True)
    if every is not None:
        thread.start()
    try:
        yield
    finally:
        over.set()
        if every is not None:
            thread.join()


def describe(rank: int, device: Device) -> dict[str, Any]:
    """A row, but for its kind."""
    figures = {name: getattr(device, name) for name in FIGURES}
    where = {"time": time.time(), "rank": rank, "node": name_process()[0], "device": device.index}
    return {**where, "uuid": device.uuid, **figures, "throttles": device.throttles, "fault": device.fault}


def keep(run: Path, row: Mapping[str, Any]) -> None:
    """Says it to the others. Whoever reads sees all of it, or what was there before."""
    path = locate(run, row["rank"], FILE)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{FILE}.partial")
    partial.write_text(json.dumps(row), encoding="utf-8")
    partial.replace(path)


def collect(run: Path, world: int, seen: dict[int, float]) -> Iterator[dict[str, Any]]:
    """What ranks have said since they were last asked; ``seen`` goes along."""
    for rank in range(world):
        try:
            row = json.loads(locate(run, rank, FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # none yet
            continue
        if row["time"] > seen.get(rank, 0.0):
            seen[rank] = row["time"]
            yield row
