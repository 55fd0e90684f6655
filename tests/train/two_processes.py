"""A script in two processes, as torchrun starts them."""

from __future__ import annotations

import os
import subprocess
import sys

LAST = """
import atexit, os, pathlib, time, torch


def threads():
    for path in pathlib.Path("/proc/self/task").glob("*/comm"):
        try:
            yield path.read_text()
        except OSError:  # just ended
            pass


def nothing_is_left():
    deadline = time.monotonic() + 5  # a thread is listed for a moment after its end
    while torch.distributed.is_initialized() or any("gloo" in name for name in threads()):
        if time.monotonic() > deadline:
            os.write(2, b"the group of processes is still there")
            os._exit(1)
        time.sleep(0.01)


atexit.register(nothing_is_left)  # as the first, to be called last
"""
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def run_in_two(script, folder, *arguments, fails=False):
    """script: its text, written into the folder; where it ends well, it has to leave no group behind."""
    (folder / "script.py").write_text(script if fails else LAST + script)
    result = subprocess.run(
        [*TWO, str(folder / "script.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert (result.returncode != 0) == fails, result.stderr[-3000:]
    return result
