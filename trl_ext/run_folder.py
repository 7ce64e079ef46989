"""Which folder a run writes to. A run never writes over another one: `runs/x`, then `runs/x-2`, `runs/x-3`, ...

`status.json` says whether a run finished; a folder without it is not ours, or its run was cut off before it began.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from trl_ext.checkpoints import CheckpointError, last_whole

STATUS = "status.json"


def mark(folder: str | Path, status: str) -> None:
    """Writes the state of the run in `folder`: "running" or "finished"."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / STATUS).write_text(json.dumps({"status": status}))


def finished(folder: Path) -> bool:
    """Whether the run in `folder` came to its end."""
    path = folder / STATUS
    return path.exists() and json.loads(path.read_text())["status"] == "finished"


def rounds_begun(folder: str | Path) -> bool:
    """Whether a loop in rounds (`trl_ext.loops.round_files`) began there: it goes on from its last whole file."""
    return (Path(folder) / "rounds" / "settings.json").exists()


def new_folder(base: str) -> str:
    """`base`, or the first of base-2, base-3, ... that holds nothing."""
    number, folder = 1, Path(base)
    while folder.exists() and any(folder.iterdir()):
        number += 1
        folder = Path(f"{base}-{number}")
    return str(folder)


def folder_to_resume(base: str) -> str:
    """The newest of base, base-2, ... that is not finished and holds a whole checkpoint or rounds.

    Raises CheckpointError when there is none, with the state of each folder.
    """
    states = []
    for folder in reversed(numbered(Path(base))):
        if finished(folder):
            states.append(f"{folder} is finished")
        elif last_whole(folder) is None and not rounds_begun(folder):
            states.append(f"{folder} holds no whole checkpoint")
        else:
            return str(folder)
    raise CheckpointError(
        f"nothing to resume: {'; '.join(states) or f'there is no folder {base}'}. Start without --resume; a checkpoint "
        "is written every `save_steps` steps."
    )


def numbered(base: Path) -> list[Path]:
    """The existing folders of one base name, oldest number first."""
    pattern = re.compile(rf"{re.escape(base.name)}(?:-(\d+))?")
    found = [(f, pattern.fullmatch(f.name)) for f in base.parent.glob(f"{base.name}*") if f.is_dir()]
    numbered = [(int(match.group(1) or 1), folder) for folder, match in found if match]
    return [folder for _, folder in sorted(numbered)]
