"""What produced a run: code, versions, machines, and how it was started.

    RUN/starts.jsonl    one line for each time that a process group began to train: first start, restarts, resumptions

Lines are only ever added. Nothing reads them but results of sweeps, which say where runs were trained, and who wants to
know, a year later, why step 40,000 is another.
"""

import dataclasses
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from train.config import RunConfig
from train.metrics import refusals_named

STARTS_FILE = "starts.jsonl"
# Variables that change what a run does, or say where it runs, by the beginnings of their names. Of others, which may
# hold secrets, nothing is written down.
VARIABLES = (
    *("CUDA_", "NCCL_", "GLOO_", "NVIDIA_VISIBLE_DEVICES", "TORCH_", "TORCHINDUCTOR_", "PYTORCH_", "TRITON_"),
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "MASTER_", "TORCHELASTIC_R"),
    *("SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_JOB_NODELIST", "SLURM_NNODES", "SLURM_RESTART_COUNT", "JOB_COMPLETION_"),
)
SECRET = ("KEY", "TOKEN", "SECRET", "PASS", "CREDENTIAL")  # in a name, wherever it begins


def environment() -> dict[str, Any]:
    """Commit and versions: not needed to resume, but to understand a run later."""
    return {
        "commit": _commit(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def record_start(run: RunConfig, step: int, processes: int, device: torch.device) -> None:
    """Adds a line to RUN/starts.jsonl, on disk when this returns.

    Args:
        run: its whole configuration is written.
        step: that the run goes on after; 0: from scratch.
        processes: of all machines.
        device: of this process; its name stands for all.

    Raises:
        MetricsError: the disk refused; names the file.
    """
    on_gpu = device.type == "cuda"
    line = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "step": step,
        "processes": processes,
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.processor() or platform.machine(),
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if on_gpu else None,
        **environment(),
        "argv": sys.argv,
        "variables": {name: os.environ[name] for name in sorted(os.environ) if is_recorded(name)},
        "config": dataclasses.asdict(run),
    }
    path = Path(run.output) / STARTS_FILE
    with refusals_named(path), path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":  # who wrote before was killed in the middle
                file.write(b"\n")
        file.write(json.dumps(line).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def last_place(run_dir: Path) -> dict[str, Any]:
    """Device, versions and commit of the last process group that trained a run.

    Raises:
        OSError: there is no RUN/starts.jsonl.
    """
    last = json.loads((run_dir / STARTS_FILE).read_text(encoding="utf-8").splitlines()[-1])
    return {key: last[key] for key in ("device", "versions", "commit")}


def is_recorded(name: str) -> bool:
    """Whether an environment variable is written down."""
    return name.startswith(VARIABLES) and not any(word in name.upper() for word in SECRET)


def _commit() -> str | None:
    """The commit of this source tree; None where it is not a git checkout or git is not installed."""
    git = shutil.which("git")
    if git is None:
        return None
    answer = subprocess.run(
        [git, "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return answer.stdout.strip() if answer.returncode == 0 else None
