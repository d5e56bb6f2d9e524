"""A host of the test cluster, seen from outside: namespaces whose first process is host_init.py.

setpriv, the host's end with ours -> nsenter, its network -> unshare, its other namespaces -> host_init.py, as 1
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

SPACES = ("--mount", "--uts", "--ipc", "--pid")
INIT = Path(__file__).with_name("host_init.py")


class Host:
    """It is being started once this exists, in the network namespace at ``network``; see host_init.py for ``told``.

    ``log`` takes what its first processes have to say. The thread that makes it has to live as long as the host.
    """

    def __init__(self, name: str, network: str, told: dict[str, Any], log: Path) -> None:
        self.name, self.log, self._number = name, log, 0
        outer = ["setpriv", "--pdeathsig", "KILL", "nsenter", f"--net={network}"]
        spaces = ["unshare", *SPACES, "--fork", "--kill-child=KILL", "--propagation", "private"]
        with log.open("w") as said:
            self._process = subprocess.Popen(
                [*outer, *spaces, sys.executable, "-I", "-S", INIT],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
                start_new_session=True,
            )
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"name": name, **told}) + "\n")
        self._process.stdin.flush()

    def wait_up(self) -> None:
        """Waits until it is there. Raises OSError if it is not to be."""
        assert self._process.stdout is not None
        if not (said := self._process.stdout.readline()):
            raise OSError(f"{self.name} did not come up: exit code {self._process.wait()}\n{self.log.read_text()}")
        self._number = int(said)

    def enter(self) -> list[str]:
        """The words before a command that have it run here; it ends with `nsenter`, which waits for it."""
        return ["nsenter", "--target", str(self._number), "--net", *SPACES, "setpriv", "--pdeathsig", "KILL"]

    def end(self) -> None:
        """Ends it. Its first process is gone only when all others are, and `unshare` only when that one is."""
        if self._number:
            os.kill(self._number, signal.SIGKILL)
        else:
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
