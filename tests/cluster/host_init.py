"""The first process of a host of the test cluster: what init is to a machine. When it ends, all of the host ends.

It is started in pid, mount, uts, ipc and network namespaces of its own and reads one line of JSON from its input:

    {"name": "n1", "folders": ["/run", ...], "files": {path: text}, "covers": {path: text}, "devices": [path]}

It gives the host its name, a /proc and memory-backed ``folders`` of its own, writes ``files`` into these, covers files
of the machine with others, makes ``devices``, and prints its process number as the machine counts. Then it waits for
its input to end, as it does when the test has gone; processes that lose their parent are collected by the kernel.
"""

import json
import os
import signal
import socket
import stat
import sys

FOLDER = "/run"  # one of the host's own, always


def mount(*words: str) -> None:
    number = os.posix_spawnp("mount", ["mount", *words], os.environ)
    if code := os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]):
        raise OSError(f"mount {' '.join(words)}: exit code {code}")


def settle(told: dict) -> None:
    """Makes of the namespaces a host."""
    socket.sethostname(told["name"])
    mount("-t", "proc", "proc", "/proc")
    for folder in (FOLDER, *told["folders"]):
        mount("-t", "tmpfs", "-o", "mode=1777", "shoestring", folder)
    for path, text in told["files"].items():
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w") as file:
            file.write(text)
    for number, (path, text) in enumerate(told["covers"].items()):
        with open(cover := f"{FOLDER}/cover{number}", "w") as file:
            file.write(text)
        mount("--bind", cover, path)
    for path in told["devices"]:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))  # what /dev/null is


def main() -> None:
    outside = os.readlink("/proc/self")  # in the machine's /proc, which is there until `settle`
    settle(json.loads(sys.stdin.readline()))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print(outside, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
