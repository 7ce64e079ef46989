"""On what a result was found: versions, commit, machine."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any


def version_of(package: str) -> str | None:
    """The installed version, None when it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_state(checkout: Path) -> dict[str, Any] | None:
    """{"commit", "dirty"} of the checkout that holds this code; None when it is not a checkout or git is missing.

    A checkout without a commit has commit None.
    """
    if not (checkout / ".git").exists():
        return None

    def git(*words: str) -> subprocess.CompletedProcess[str]:
        command = ["git", "-C", str(checkout), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)

    try:
        head, status = git("rev-parse", "--verify", "-q", "HEAD"), git("status", "--porcelain")
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    if status.returncode != 0:
        return None
    return {"commit": head.stdout.strip() or None, "dirty": bool(status.stdout.strip())}


def cpu_name() -> str:
    """The processor's model name, or the architecture where the system does not tell."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
