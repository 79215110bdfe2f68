"""The examples in launch/: on one machine with a process killed, under a SLURM that is a few scripts, and as YAML."""

import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.train.test_pretrain import assert_same_run, final_tensors
from tests.train.tiny import prepare_tiny, write_config
from train.checkpoint import latest_checkpoint, load_state
from train.environment import STARTS_FILE
from train.metrics import read_metrics
from train.pretrain import main, parse_arguments

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
STEPS = 24
PATIENCE = 120  # seconds for what a launcher is to do
SCRIPTS = ["one_machine.sh", "slurm.sbatch"]
# What SLURM's commands do for one job of one machine: tasks are what it starts, and signals go to them. A task that is
# queued again is only written down.
SLURM = {
    "srun": """while [[ $1 == --* ]]; do shift; done
echo "$@" >>"$STATE/commands"
[[ -z ${SLURM_RESTART_COUNT:-} ]] || exit 0
echo $$ >"$STATE/task"
exec "$@\"""",
    "scancel": '[[ "$*" == "--signal=TERM 7" ]] && kill -TERM "$(cat "$STATE/task")"',
    "scontrol": '[[ $1 == requeue ]] && echo "$2" >"$STATE/requeued" || echo localhost',
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_tiny(tmp_path_factory.mktemp("data"))


@contextmanager
def launched(script: str, arguments: list[str], **environment: str) -> Iterator[subprocess.Popen[str]]:
    """The script in a session of its own, of which nothing is left afterwards."""
    path = os.pathsep.join([environment.pop("path", ""), str(Path(sys.executable).parent), os.environ["PATH"]])
    process = subprocess.Popen(
        ["bash", str(LAUNCH / script), *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PATH": path} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        for worker in workers(process.pid):
            os.kill(worker, signal.SIGKILL)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def workers(launcher: int) -> list[int]:
    """Processes that train, in the order of their ranks."""
    found = {}
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((directory / "stat").read_text().rpartition(")")[2].split()[1])
            variables = (directory / "environ").read_bytes().split(b"\0")
        except (OSError, ValueError):  # ended meanwhile, or none of ours
            continue
        rank = next((int(one[5:]) for one in variables if one.startswith(b"RANK=")), None)
        if parent == launcher and rank is not None:
            found[rank] = int(directory.name)
    return [found[rank] for rank in sorted(found)]


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE
    while max((line["step"] for line in read_metrics(run_dir)), default=0) < step:
        assert process.poll() is None and time.monotonic() < deadline, "the run ended, or never came so far"
        time.sleep(0.01)


def finish(process: subprocess.Popen[str]) -> str:
    """What it said on stdout, once it has ended; here is also said what went wrong."""
    said, complaints = process.communicate(timeout=PATIENCE)
    print(said, complaints)
    return said


def long_run(run_dir: Path, data: Path, architecture: str = "dlcm", **sections: Any) -> str:
    changes: dict[str, Any] = {
        "schedule": {"steps": STEPS},
        "checkpoint": {"every": 5},
        "evaluation": {"every": STEPS},
    }
    return str(write_config(run_dir.with_suffix(".yaml"), architecture, data, run_dir, **changes | sections))


needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")


@needs_proc
def test_a_killed_process_is_started_again_and_the_run_comes_to_the_same(data: Path, tmp_path: Path):
    """As one process does with twice the micro-batches, to rounding; without draws, which it might turn over."""
    killed, alone = tmp_path / "killed", tmp_path / "alone"
    assert main([long_run(alone, data, "llama", batch={"accumulation": 2})]) == 0
    with launched("one_machine.sh", [long_run(killed, data, "llama")], PROCESSES="2", RESTARTS="1") as process:
        wait_for_step(killed, 11, process)  # the checkpoint of step 10 has waited for that of step 5
        os.kill(workers(process.pid)[1], signal.SIGKILL)
        said = finish(process)
    assert process.returncode == 0 and "continued after step" in said
    ours, theirs = final_tensors(killed), final_tensors(alone)
    assert load_state(latest_checkpoint(killed)).step == STEPS and ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=2e-5, msg=name)
    starts = [json.loads(line) for line in (killed / STARTS_FILE).read_text().splitlines()]
    assert [start["variables"]["TORCHELASTIC_RESTART_COUNT"] for start in starts] == ["0", "1"]
    assert starts[0]["step"] == 0 and starts[1]["step"] % 5 == 0 and 5 <= starts[1]["step"] < STEPS
    assert all(start["processes"] == 2 for start in starts)


@needs_proc
def test_a_preempted_job_is_queued_again_and_goes_on(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Told SIGTERM, it leaves a checkpoint of the very step, not one of those due; the same command goes on."""
    preempted, alone = tmp_path / "preempted", tmp_path / "alone"
    commands, state = tmp_path / "bin", tmp_path / "state"
    commands.mkdir(), state.mkdir()
    for name, lines in SLURM.items():
        (commands / name).write_text(f"#!/usr/bin/env bash\n{lines}\n")
        (commands / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "localhost", "STATE": str(state)}
    settings = job | {"path": str(commands), "PROCESSES": "1", "PORT": "0"}
    config = long_run(preempted, data, checkpoint={"every": 1000})
    with launched("slurm.sbatch", [config], **settings) as process:
        wait_for_step(preempted, 5, process)
        os.kill(process.pid, signal.SIGTERM)  # as --signal=B:TERM does: the script alone
        finish(process)
    assert process.returncode != 0 and (state / "requeued").read_text() == "7\n"
    stopped = load_state(latest_checkpoint(preempted)).step
    assert 5 <= stopped < STEPS
    (state / "requeued").unlink()
    with launched("slurm.sbatch", [config], **settings, SLURM_RESTART_COUNT="1") as process:
        finish(process)
    assert process.returncode == 0 and not (state / "requeued").exists()
    first, again = (state / "commands").read_text().splitlines()
    assert again == first.replace("--rdzv-id 7.0", "--rdzv-id 7.1") and again.endswith(f"-m train.pretrain {config}")
    assert main([config]) == 0 and f"continued after step {stopped}" in capsys.readouterr().out
    assert main([long_run(alone, data, checkpoint={"every": 1000})]) == 0
    assert_same_run(preempted, alone)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_bash(script: str):
    answer = subprocess.run(["bash", "-n", str(LAUNCH / script)], capture_output=True, text=True, check=False)
    assert (answer.returncode, answer.stderr) == (0, "")


def test_the_job_of_kubernetes_hangs_together():
    service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert (service["kind"], job["kind"], spec["completionMode"]) == ("Service", "Job", "Indexed")
    name = job["metadata"]["name"]
    assert service["metadata"]["name"] == pod["subdomain"] and service["spec"]["selector"] == {"job-name": name}
    assert service["spec"]["clusterIP"] == "None" and pod["restartPolicy"] == "Never"
    (container,) = pod["containers"]
    command = shlex.split(container["args"][0].replace("$((JOB_COMPLETION_INDEX == 0))", "1"))
    options = dict(itertools.pairwise(command))
    assert command[:2] == ["exec", "torchrun"]
    assert spec["completions"] == spec["parallelism"] == int(options["--nnodes"])
    assert options["--rdzv-endpoint"] == f"{name}-0.{pod['subdomain']}:29500"
    arguments = parse_arguments(command[command.index("train.pretrain") + 1 :])
    assert (ROOT / arguments.config).is_file() and len(arguments.overrides) == 4
    (timeout,) = (int(variable["value"]) for variable in container["env"] if "SHUTDOWN" in variable["name"])
    assert timeout < pod["terminationGracePeriodSeconds"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
