"""Locks the dump folder, since two runs in it would write into the same metrics and delete each other's checkpoints.

Proof: tests/test_faults.py::test_two_jobs_in_one_folder_the_second_is_refused.
"""

import fcntl
import os
import socket
import time

import torch
import torch.distributed as dist

from errors import ConfigError

WAIT_SECONDS = 5  # a killed process may need a moment to end, and the next run may start before that


class FolderLock:
    """A record lock of the kernel, which rank 0's process holds until `close`. The lock ends with the process, so a
    crash leaves nothing behind. NFS keeps record locks for all machines. (flock would be inherited by data workers,
    which would then hold it after the run.) The constructor is a collective; ConfigError on all ranks if another run
    holds the lock."""

    def __init__(self, folder: str):
        self.file = refusal = None
        if dist.get_rank() == 0:
            try:
                refusal = self._take(folder)
            except OSError as error:
                refusal = f"cannot use job.dump_folder {folder}: {error.strerror}."
        refused = torch.tensor(int(refusal is not None))
        dist.all_reduce(refused)
        if refused:
            raise ConfigError(refusal or f"job.dump_folder {folder} was refused to rank 0.")

    def _take(self, folder: str) -> str | None:
        """Takes the lock, or returns why it could not."""
        os.makedirs(folder, exist_ok=True)
        self.file = open(os.path.join(folder, ".lock"), "a+", encoding="utf-8")  # noqa: SIM115 - held open
        deadline = time.monotonic() + WAIT_SECONDS
        while True:
            try:
                fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except (BlockingIOError, PermissionError):
                if time.monotonic() > deadline:
                    self.file.seek(0)
                    return (
                        f"another run is using job.dump_folder {folder} ({self.file.read().strip()}); wait for it, end "
                        "it, or give this one another folder."
                    )
                time.sleep(0.1)
        self.file.truncate(0)
        self.file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self.file.flush()
        return None

    def close(self) -> None:
        if self.file:
            self.file.close()
