"""Everything around the training loop: starts the process group, watches over the ranks, and ends the run.

Proof: tests/test_faults.py::test_kill_9_of_one_rank, tests/test_faults.py::test_signal_to_one_rank_saves_and_ends_all,
tests/test_faults.py::test_two_jobs_in_one_folder_the_second_is_refused.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from collectives import gather_objects
from errors import ConfigError
from options import save_config
from resilience.lock import lock_folder
from resilience.preemption import EXIT_PREEMPTED, Preemption
from resilience.process_group import init_distributed, set_determinism
from resilience.watchdog import Watchdog, record_nccl


class Run:
    """One run of train.py in its dump folder. `device` is this rank's; `log` prints on rank 0 and does nothing on other
    ranks. Every method but `save_config` is a collective."""

    def __init__(self, dump_folder: str, device: str, timeout_seconds: int, seed: int, deterministic: bool):
        """ConfigError on all ranks if another run uses dump_folder. The other arguments are explained in
        `init_distributed` and `set_determinism`."""
        record_nccl(dump_folder)  # NCCL reads its settings when the process group starts
        self.device = init_distributed(device, timeout_seconds)
        set_determinism(seed, deterministic)
        self.dump_folder, self.is_first = dump_folder, dist.get_rank() == 0
        self.log = print if self.is_first else lambda *_, **__: None
        self.lock = lock_folder(dump_folder)
        self.preemption = Preemption()
        self.watchdog = Watchdog(dump_folder, dist.get_rank())  # after Preemption, to which it passes SIGTERM on
        self.stop_signal = None  # the name of the signal that ended the run

    @staticmethod
    @contextmanager
    def first_on_each_machine() -> Iterator[None]:
        """Lets one rank of each machine run the body first. The other ranks run it afterwards, and find its cache."""
        is_first = int(os.environ.get("LOCAL_RANK", 0)) == 0
        if not is_first:
            dist.barrier()
        yield
        if is_first:
            dist.barrier()

    @staticmethod
    def require_same_on_all_ranks(**texts: str) -> None:
        """ConfigError unless every rank has the same text under each name. Machines may differ in their files, and
        ranks that read different data would train on without an error."""
        by_rank = gather_objects(texts)
        for name, text in texts.items():
            others = [rank for rank, theirs in enumerate(by_rank) if theirs[name] != text]
            if others:
                raise ConfigError(f"{name} differs between ranks: {dist.get_rank()} and {others}; give all the same.")

    def save_config(self, config: object) -> None:
        """Writes every option to config.toml in the dump folder; running from that file repeats the run."""
        if self.is_first:
            save_config(config, os.path.join(self.dump_folder, "config.toml"))

    def should_stop(self) -> bool:
        """Whether any rank had received a stop signal when the last step began. Call it when a step begins."""
        self.stop_signal = self.preemption.poll()
        return self.stop_signal is not None

    def close(self, *, step: int, is_saved: bool | None) -> int:
        """Ends the run after `step`. Returns the exit status: 0 after the last step, EXIT_PREEMPTED after a stop
        signal, 1 if the step should have been saved and is not. is_saved is None if checkpoints are off."""
        status = EXIT_PREEMPTED if self.stop_signal else 0
        if self.stop_signal:
            self.log(f"{self.stop_signal} ended the run after step {step}, which is {'' if is_saved else 'NOT '}saved")
        if is_saved is False:
            self.log("error: the last step could not be saved")
            status = 1
        dist.barrier()  # otherwise a watchdog takes a peer's normal exit for a crash
        self.watchdog.close()
        self.preemption.close()
        if self.lock:
            self.lock.close()  # last: this run writes nothing more
        return status
