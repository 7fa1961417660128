"""Locks the dump folder, since two runs in it would write into the same metrics and delete each other's checkpoints.

Proof: tests/test_faults.py::test_two_jobs_in_one_folder_the_second_is_refused.
"""

import fcntl
import os
import socket
import time
from typing import TextIO

import torch
import torch.distributed as dist

from errors import ConfigError

WAIT_SECONDS = 5  # a killed process may need a moment to end, and the next run may start before that


def lock_folder(folder: str) -> TextIO | None:
    """Locks a folder until rank 0 closes the file that this returns there (on other ranks None). A collective;
    ConfigError on all ranks if another run holds the lock. It is a record lock of the kernel, which ends with the
    process, so a crash leaves nothing behind, and which NFS keeps for all machines. (flock's would be inherited by data
    workers, and outlive the run.)"""
    file, refusal = None, ""
    if dist.get_rank() == 0:
        try:
            os.makedirs(folder, exist_ok=True)
            file = open(os.path.join(folder, ".lock"), "a+", encoding="utf-8")  # noqa: SIM115 - held open
            if not _lock(file):
                file.seek(0)
                refusal = (
                    f"another run is using job.dump_folder {folder} ({file.read().strip()}); wait for it, end it, or "
                    "give this one another folder."
                )
        except OSError as error:
            refusal = f"cannot use job.dump_folder {folder}: {error.strerror}."
    refused = torch.tensor(int(refusal != ""))
    dist.all_reduce(refused)
    if refused:
        raise ConfigError(refusal or f"job.dump_folder {folder} was refused to rank 0.")
    return file


def _lock(file: TextIO) -> bool:
    for _ in range(10 * WAIT_SECONDS):
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            time.sleep(0.1)
            continue
        file.truncate(0)
        print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
        return True
    return False
