"""What a run's numbers may depend on besides its configuration: interpreter, packages, machine, sources."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = (
    "shoestring",
    "torch",
    "triton",
    "deepspeed",
    "numpy",
    "safetensors",
    "tokenizers",
    "hydra-core",
    "omegaconf",
)


def versions() -> dict[str, object]:
    """What the run's numbers may depend on besides its configuration."""
    tracked = _git("ls-files", "--error-unmatch", Path(__file__).name) is not None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "packages": {name: _version(name) for name in PACKAGES},
        # None where the sources are installed, not checked out: a repository around them would be someone else's.
        "git": {"revision": _git("rev-parse", "HEAD"), "dirty": bool(_git("status", "--porcelain"))}
        if tracked
        else None,
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git(*words: str) -> str | None:
    """What git says about the sources, or None where they are not a checkout or git is missing."""
    # Fixed words, no shell.
    command = ["git", "-C", str(Path(__file__).parent), *words]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
        return result.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
