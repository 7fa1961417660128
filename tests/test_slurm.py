"""scripts/slurm.sh with two small scripts in place of SLURM's: how it starts a run, and how it ends one in time."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from conftest import ROOT
from helpers.ranks import free_port
from helpers.runs import TINY, argv, options, write_ragged_text

SRUN = """#!/usr/bin/env bash
# One node: runs the command that follows srun's options.
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
SCONTROL = """#!/usr/bin/env bash
if [[ $1 == show ]]; then echo localhost; else echo "$@" >> "$SLURM_LOG"; fi
"""


def submit(folder: Path, *settings: dict[str, str]) -> tuple[subprocess.Popen, Path]:
    """Starts the script as SLURM's first node does; the process and the file of its output."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    environment = os.environ | dict(
        PATH=os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]]),
        SLURM_LOG=str(folder / "requeued"), SLURM_SUBMIT_DIR=str(ROOT), SLURM_JOB_NODELIST="localhost",
        SLURM_JOB_NUM_NODES="1", SLURM_GPUS_ON_NODE="2", SLURM_JOB_ID="7", RDZV_PORT=str(free_port()),
    )  # fmt: skip
    output = folder / f"output-{len(list(folder.glob('output-*')))}"
    command = ["bash", "scripts/slurm.sh", *argv(TINY, *settings)]
    with open(output, "w") as file:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file), output


def test_time_limit_saves_and_queues_the_job_again(tmp_path):
    """After SIGUSR1 to the script both ranks save and end, and the job is queued again once. The same command then
    resumes from that step, ends with status 0, and does not queue the job."""
    settings = {"job.dump_folder": str(tmp_path / "run"), "data.cache_folder": str(tmp_path / "cache")}
    settings |= options(data__path=write_ragged_text(tmp_path), checkpoint__enable="true", checkpoint__interval=100000)
    job, output = submit(tmp_path, settings, options(training__steps="100000"))
    deadline = time.monotonic() + 120
    while "\nstep " not in output.read_text():
        assert job.poll() is None and time.monotonic() < deadline, output.read_text()
        time.sleep(0.1)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(60) != 0
    (ended,) = [line for line in output.read_text().splitlines() if line.startswith("SIGTERM ended the run after step")]
    assert ended.endswith("which is saved") and (tmp_path / "requeued").read_text() == "requeue 7\n"
    step = int(ended.split()[6].rstrip(","))

    job, output = submit(tmp_path, settings, options(training__steps=step + 2))
    assert job.wait(120) == 0, output.read_text()
    assert f"resumed at step {step} " in output.read_text()
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
