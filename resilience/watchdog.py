"""Ends every rank soon after any rank has failed, and writes each rank's stack when it is stuck.

A rank that fails writes so into the process group's store, where a thread of every rank looks twice a second. So a rank
that sleeps, or waits in a collective for a peer that is gone, ends within seconds too. The stacks of its threads go to
`stacks/rank-N.txt` in the dump folder, also when it crashes or gets SIGTERM, which torchrun sends to remaining ranks.

On a CPU a collective that hangs raises an error after comm.timeout_seconds. On a GPU the CPU waits for a kernel, and no
error is raised. But NCCL's flight recorder writes its last collectives to a file beside the stacks, and this thread
takes a new file for the rank's failure. NCCL also aborts the process, but much later, with a less useful message.

Proof: tests/test_faults.py::test_kill_9_of_one_rank, tests/test_faults.py::test_rank_asleep_ends_the_collective,
tests/test_cuda_faults.py::test_collective_that_hangs_ends_the_run.
"""

import faulthandler
import os
import signal
import sys
import threading
import time

from torch_private import default_store

FAILURE = "nano_train/failure"  # the store's key
NCCL_FILE = "TORCH_FR_DUMP_TEMP_FILE"  # the path of NCCL's file, to which NCCL adds the rank's number
POLL_SECONDS = 0.5
GRACE_SECONDS = 3.0  # this rank's own error says more, so it gets this time to be reported


def record_nccl(dump_folder: str) -> None:
    """Makes NCCL keep its last 2000 collectives, and write them when one times out. Call before `init_distributed`."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault(NCCL_FILE, os.path.abspath(os.path.join(dump_folder, "stacks", "nccl-rank-")))


class Watchdog(threading.Thread):
    """Make it after `record_nccl` and Preemption, to which it passes SIGTERM on. Stop it before the group ends."""

    def __init__(self, dump_folder: str, rank: int):
        super().__init__(name="watchdog", daemon=True)
        self.rank, self.stopped, self.failure = rank, threading.Event(), None  # failure: another rank's
        self.folder = os.path.join(dump_folder, "stacks")
        os.makedirs(self.folder, exist_ok=True)
        self.path = os.path.join(self.folder, f"rank-{rank}.txt")
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - written to in a crash
        self.nccl_path = f"{os.environ[NCCL_FILE]}{rank}"  # in another folder if the user has set NCCL_FILE
        self.nccl_before = _time_written(self.nccl_path)  # the file may be an earlier run's
        faulthandler.enable(self.file)
        faulthandler.register(signal.SIGTERM, self.file, chain=True)
        try:
            # The process group's connection to the store is locked while it waits for a key.
            self.store = default_store().clone()
        except RuntimeError:  # a simulated process group has no peers to watch
            self.store = None
        else:
            self.start()

    def run(self) -> None:
        while not self.stopped.wait(POLL_SECONDS):
            if _time_written(self.nccl_path) != self.nccl_before:
                self.report_failure(
                    f"rank {self.rank} failed: one of NCCL's collectives was not done after comm.timeout_seconds; its "
                    f"last ones are in {self.nccl_path}"
                )
            failure = self._read()
            if failure and not self.stopped.is_set():
                self.failure = failure
                self.dump(failure)
                if not self.stopped.wait(GRACE_SECONDS):
                    print(f"rank {self.rank} ends: {failure}; its stack is in {self.path}", file=sys.stderr, flush=True)
                    os._exit(1)

    def _read(self) -> str | None:
        """The failure that a rank has reported, or None."""
        try:
            return self.store.get(FAILURE).decode() if self.store.check([FAILURE]) else None
        except Exception:
            return "the process that holds the store is gone"

    def dump(self, why: str) -> None:
        print(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} rank {self.rank}: {why}", file=self.file, flush=True)
        faulthandler.dump_traceback(self.file)

    def report_failure(self, failure: str) -> bool:
        """Tells all ranks that this rank has failed; whether, as far as it knows, it is the first rank that has."""
        if self.store is None or self.failure is not None:
            return self.failure is None
        try:
            return self.store.compare_set(FAILURE, "", failure).decode() == failure
        except Exception:  # the store is gone
            return True

    def peer_failed(self, seconds: float) -> bool:
        """Waits until another rank has reported a failure or is gone, at most so many seconds; whether it has."""
        deadline = time.monotonic() + seconds
        while self.store is not None and time.monotonic() < deadline:
            if self.failure or self._read():
                return True
            time.sleep(POLL_SECONDS)
        return False

    def close(self) -> None:
        """Stops watching at the end of a run that did not fail, and removes its file if it is empty."""
        self.stopped.set()
        faulthandler.unregister(signal.SIGTERM)
        faulthandler.disable()
        self.file.close()
        if os.path.getsize(self.path) == 0:
            os.remove(self.path)


def _time_written(path: str) -> int | None:
    """When a file was last written, in nanoseconds; None if there is no file."""
    return os.stat(path).st_mtime_ns if os.path.exists(path) else None
