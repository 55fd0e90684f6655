"""A script in two processes, as torchrun starts them."""

from __future__ import annotations

import os
import subprocess
import sys

TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def run_in_two(script, folder, *arguments, fails=False):
    """script: its text, written into the folder."""
    (folder / "script.py").write_text(script)
    result = subprocess.run(
        [*TWO, str(folder / "script.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert (result.returncode != 0) == fails, result.stderr[-3000:]
