"""The processes that the stages of the GPU day start: this script again, and NVIDIA's tools."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditscale.bench.gpu_day import Unavailable

if TYPE_CHECKING:
    from ditscale.bench.gpu_day import Day

ROOT = Path(__file__).resolve().parent.parent  # of a checkout


def own_command(*arguments: str) -> list[str]:
    """This script with other arguments, in a process of its own."""
    return [*python_command(), "-m", "ditscale.bench.gpu_day", *arguments]


def python_command() -> list[str]:
    """Python as this process was started."""
    return [sys.executable, *(["-P"] if getattr(sys.flags, "safe_path", False) else [])]


def find_tool(name: str) -> str:
    """Where one of CUDA's tools is.

    Raises:
        Unavailable: nowhere.
    """
    found = shutil.which(name) or next(
        (str(p) for p in Path("/usr/local").glob(f"cuda*/**/{name}") if p.is_file()), None
    )
    if found is None:
        raise Unavailable(f"{name} is not on this machine")
    return found


def outcome(
    command: list[str],
    day: Day,
    *,
    cwd: Path | None = None,
    environment: dict[str, str] | None = None,
    most: float = float("inf"),
) -> tuple[int | None, str, str]:
    """Exit status, stdout and stderr; no status where ``most`` seconds or the time of this call were up, and what was written
    until then."""
    # In a session of its own, which ends as a whole: a child of a tool's would go on, and hold the device and the pipes.
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env=environment,
        start_new_session=True,
    )
    try:
        out, errors = process.communicate(timeout=max(1.0, min(most, day.seconds_left - 15)))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, errors = process.communicate()
        return None, out, errors
    return process.returncode, out, errors


def outcomes(commands: Sequence[list[str]], day: Day, **more: Any) -> list[tuple[int | None, str, str]]:
    """Of commands that run beside one another, at most one a core."""
    with ThreadPoolExecutor(min(len(commands), os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda command: outcome(command, day, **more), commands))


def without_places(text: str) -> str:
    """Output without where things are on this machine: what is written here is committed."""
    for place, name in ((ROOT, "."), (Path.home(), "~"), (sys.prefix, "(python)")):
        text = text.replace(str(place), name)
    return text
