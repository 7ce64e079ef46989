"""The Python that runs untrusted text, and the files that it needs: executable, standard library, shared libraries."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from trl_ext.executor.base import NoIsolation

_ASK = (
    "import json, os, sys, sysconfig as s; p = s.get_paths(); print(json.dumps([os.path.realpath("
    "getattr(sys, '_base_executable', sys.executable)), sorted({p['stdlib'], p['platstdlib']})]))"
)
_LIBRARY = re.compile(r"(?:=>\s*|^\s*)(/\S+) \(0x", re.MULTILINE)


@dataclass(frozen=True)
class Interpreter:
    """`executable`; `files` and folders that it reads; `hidden`: folders in these that hold other people's packages."""

    executable: str
    files: tuple[str, ...]
    hidden: tuple[str, ...]


@functools.cache
def find_interpreter(python: str = sys.executable) -> Interpreter:
    """What `python` needs to run with its standard library alone. NoIsolation when it cannot be found out."""
    try:
        asked = subprocess.run([python, "-I", "-c", _ASK], capture_output=True, text=True, check=True)
        executable, folders = json.loads(asked.stdout)
        binaries = [executable, *(str(so) for folder in folders for so in Path(folder).glob("lib-dynload/*.so"))]
        linked = subprocess.run(["ldd", *binaries], capture_output=True, text=True, check=False).stdout
    except (OSError, subprocess.CalledProcessError, ValueError) as error:
        raise NoIsolation(f"cannot find out which files {python} needs: {error}") from error
    libraries = sorted({path for path in _LIBRARY.findall(linked) if Path(path).exists()})
    hidden = [f"{folder}/{name}" for folder in folders for name in ("site-packages", "dist-packages")]
    return Interpreter(executable, (executable, *folders, *libraries), tuple(h for h in hidden if Path(h).is_dir()))
