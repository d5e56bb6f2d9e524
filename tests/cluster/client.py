"""What a user does with a Slurm: commands, jobs, and waiting for both. For clusters of either kind."""

import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

LOGIN = "login"
SEARCHED = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"  # daemons are where many users do not look
ENDED = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "OUT_OF_MEMORY", "TIMEOUT")
PATIENCE = 30  # seconds until something that takes one has failed


class ClusterError(Exception):
    """A command on the cluster failed, or something did not come about. The message has what was printed."""


class Client:
    """Commands on a cluster with ``nodes``, whose daemons log in ``folder``. How a host is entered is a cluster's."""

    nodes: tuple[str, ...]
    folder: Path

    def enter(self, host: str) -> list[str]:
        """The words before a command that have it run on ``host``."""
        raise NotImplementedError

    def environment(self) -> dict[str, str]:
        """This process' environment without what a Slurm around it has put there, and with commands found."""
        found = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "SRUN"))}
        return found | {"PATH": SEARCHED}

    def run(
        self,
        words: Sequence[str | Path],
        host: str = LOGIN,
        *,
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
        timeout: float = 60,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command as this user on a host, by default where a user logs in; ``environment`` is added to this one.

        Raises ClusterError, with what it printed, where it fails (unless ``check=False``), and where it takes longer
        than ``timeout`` seconds; then it is killed.
        """
        process = self.open(
            words, host, cwd=cwd, environment=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            raise ClusterError(f"{shown(words)} on {host} took more than {timeout} s\n{out}{err}") from None
        if check and process.returncode:
            raise ClusterError(f"{shown(words)} on {host}: exit code {process.returncode}\n{out}{err}")
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def open(
        self,
        words: Sequence[str | Path],
        host: str = LOGIN,
        *,
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
        **options: Any,
    ) -> subprocess.Popen[str]:
        """Starts a command on a host and returns at once; ``options`` are Popen's, such as ``stdout``.

        The Popen is that of `nsenter`, which waits for the command and has its exit code; SIGKILL of it kills the
        command as well, other signals do not reach it.
        """
        options = {"stdin": subprocess.DEVNULL, "text": True, **options}
        return subprocess.Popen(self.line(words, host, cwd, environment), env=self.environment(), **options)

    def line(
        self, words: Sequence[str | Path], host: str, cwd: Path | None, environment: Mapping[str, str] | None
    ) -> list[str]:
        """What to start here to have ``words`` run on ``host``, in ``cwd``, by default this process' folder."""
        added = [f"{name}={value}" for name, value in (environment or {}).items()]
        return [*self.enter(host), "env", f"--chdir={cwd or Path.cwd()}", *added, *map(str, words)]

    def submit(self, *words: str | Path, cwd: Path | None = None) -> str:
        """`sbatch` with these words -> the job's number. Its output goes to ``cwd``, by default where the logs are."""
        return self.run(["sbatch", "--parsable", *words], cwd=cwd or self.folder).stdout.strip()

    def show(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says: {"JobState": "RUNNING", "Restarts": "0", "NodeList": "n1", ...}."""
        return parse(self.run(["scontrol", "--oneliner", "show", "job", job]).stdout)

    def show_node(self, node: str) -> dict[str, str]:
        """What `scontrol show node` says: {"State": "IDLE", ...}."""
        return parse(self.run(["scontrol", "--oneliner", "show", "node", node]).stdout)

    def wait(self, job: str, *states: str, restarts: int = 0, seconds: float = PATIENCE) -> dict[str, str]:
        """Waits until a job is in one of ``states``, after at least ``restarts`` requeues -> what ``show`` says.

        Raises ClusterError after ``seconds``, or when the job has ended otherwise.
        """

        def there() -> bool:
            said.update(self.show(job))
            return said["JobState"] in states and int(said["Restarts"]) >= restarts

        said: dict[str, str] = {}
        until(lambda: there() or said["JobState"] in ENDED, seconds)
        if not there():
            wanted = f"{' or '.join(states)} after {restarts} restarts"
            printed = Path(said.get("StdOut", os.devnull))
            tail = "".join(printed.read_text().splitlines(keepends=True)[-30:]) if printed.exists() else ""
            raise ClusterError(f"job {job} is {said['JobState']}, not {wanted}, in {seconds} s\n{said}\n{tail}")
        return said

    def wait_idle(self, *nodes: str, seconds: float = PATIENCE) -> None:
        """Waits until ``nodes`` (all, where none is named) are idle. Raises ClusterError after ``seconds``."""
        wanted, said = nodes or self.nodes, {}

        def idle() -> bool:
            lines = self.run(["sinfo", "-hN", "-p", "main", "-o", "%N %T"], check=False).stdout.splitlines()
            said.update(line.split() for line in lines)
            return all(said.get(node) == "idle" for node in wanted)

        if not until(idle, seconds):
            raise ClusterError(f"not all of {', '.join(wanted)} are idle after {seconds} s: {said}\n{self.log_ends()}")

    def log_ends(self) -> str:
        """The last lines of all logs."""
        files = sorted(self.folder.glob("*.log"))
        return "\n".join(f"--- {file}\n" + "\n".join(file.read_text().splitlines()[-12:]) for file in files)


def parse(text: str) -> dict[str, str]:
    """`A=1 B=x=y` -> {"A": "1", "B": "x=y"}; words without a sign are dropped."""
    return dict(word.split("=", 1) for word in text.split() if "=" in word)


def shown(words: Sequence[str | Path]) -> str:
    return " ".join(map(str, words))


def until(true: Callable[[], bool], seconds: float) -> bool:
    """Whether ``true()`` becomes true within ``seconds``; asked every 50 ms."""
    deadline = time.monotonic() + seconds
    while not (done := true()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return done
