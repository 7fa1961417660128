"""Sees to it that no rank outlives another, and that each leaves its stack when it is stuck.

A rank that fails says so in the process group's store; a thread in each rank looks there twice a second. So a rank that
sleeps in a collective, or outside of one, for a peer that is gone ends too, within seconds, and the stacks of all its
threads go to `stacks/rank-N.txt` in the dump folder. So they do when a rank gets SIGTERM, which is what torchrun sends
to those that are left, and when it crashes.

A collective that hangs raises after comm.timeout_seconds in the ranks that wait in it, and from there on the same
happens. On a GPU the CPU waits for a kernel then, and raises nothing: there NCCL writes its last collectives beside the
stacks (its flight recorder), and that this file appears is what the thread takes for the rank's failure. NCCL's own end
of the process, an abort, may come much later, and says less.
"""

import faulthandler
import os
import signal
import sys
import threading
import time

from torch_private import default_store

FAILURE = "nano_train/failure"
NCCL_FILE = "TORCH_FR_DUMP_TEMP_FILE"  # where NCCL writes, to which it adds the rank's number
POLL_SECONDS = 0.5
GRACE_SECONDS = 3.0  # for this rank's own error, which says more, to be reported first


def stacks_folder(dump_folder: str) -> str:
    return os.path.join(dump_folder, "stacks")


def record_nccl(dump_folder: str) -> None:
    """Before the process group exists: NCCL's last collectives are kept, and written when one times out."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # collectives
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault(NCCL_FILE, os.path.join(os.path.abspath(stacks_folder(dump_folder)), "nccl-rank-"))


class Watchdog(threading.Thread):
    """Make it after `record_nccl` and Preemption (it hands SIGTERM on), stop it before the process group ends."""

    def __init__(self, dump_folder: str, rank: int):
        super().__init__(name="watchdog", daemon=True)
        self.folder, self.rank, self.stopped = stacks_folder(dump_folder), rank, threading.Event()
        self.failure = None  # what another rank has told
        os.makedirs(self.folder, exist_ok=True)
        self.path = os.path.join(self.folder, f"rank-{rank}.txt")
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - written to in a crash
        self.nccl_path = f"{os.environ[NCCL_FILE]}{rank}"  # not always in this folder: it may have been set by the user
        self.nccl_before = _version(self.nccl_path)  # an earlier run's
        faulthandler.enable(self.file)
        faulthandler.register(signal.SIGTERM, self.file, chain=True)
        try:
            # A connection of its own: the process group's is locked while it waits for a key.
            self.store = default_store().clone()
        except RuntimeError:  # a simulated process group has no peers to watch
            self.store = None
        else:
            self.start()

    def run(self) -> None:
        while not self.stopped.wait(POLL_SECONDS):
            if _version(self.nccl_path) != self.nccl_before:
                self.tell(
                    f"rank {self.rank} failed: one of NCCL's collectives was not done after comm.timeout_seconds; its "
                    f"last ones are in {self.nccl_path}"
                )
            try:
                failure = self.store.get(FAILURE).decode() if self.store.check([FAILURE]) else None
            except Exception:
                failure = "the process that holds the store is gone"
            if failure and not self.stopped.is_set():
                self.failure = failure
                self.dump(failure)
                if not self.stopped.wait(GRACE_SECONDS):
                    print(f"rank {self.rank} ends: {failure}; its stack is in {self.path}", file=sys.stderr, flush=True)
                    os._exit(1)

    def dump(self, why: str) -> None:
        self.file.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} rank {self.rank}: {why}\n")
        self.file.flush()
        faulthandler.dump_traceback(self.file)

    def tell(self, failure: str) -> bool:
        """Tells all ranks that this one fails. Whether it is the first to, as far as can be told."""
        if self.store is None or self.failure is not None:
            return self.failure is None
        try:
            return self.store.compare_set(FAILURE, "", failure).decode() == failure
        except Exception:  # the store has gone first
            return True

    def hears_of_another(self, seconds: float) -> bool:
        """Waits until another rank has told of a failure, or is gone, but not longer than so many seconds."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.store is not None:
            try:
                if self.failure or self.store.check([FAILURE]):
                    return True
            except Exception:
                return True
            time.sleep(POLL_SECONDS)
        return False

    def stop(self) -> None:
        self.stopped.set()

    def close(self) -> None:
        """At a run's good end."""
        self.stop()
        faulthandler.unregister(signal.SIGTERM)
        faulthandler.disable()
        self.file.close()
        if os.path.getsize(self.path) == 0:
            os.remove(self.path)


def _version(path: str) -> tuple | None:
    """What changes when a file is written; None where there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def running_watchdog() -> Watchdog | None:
    return next((thread for thread in threading.enumerate() if isinstance(thread, Watchdog)), None)
