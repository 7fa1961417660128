"""Preemption: SIGTERM and SIGUSR1 ask the run to save and end, which all ranks do after the same step.

A signal may reach one rank or all of them, each at another moment of its step. So every step begins an asynchronous
all-reduce of 8 bytes that asks whether any rank has received a signal. Its answer is read when the step is over. It has
arrived long before, so training never waits for it.

Proof: tests/test_faults.py::test_signal_to_one_rank_saves_and_ends_all,
tests/test_faults.py::test_sigterm_to_torchrun_ranks_and_data_workers.
"""

import signal

import torch
import torch.distributed as dist

EXIT_PREEMPTED = 75  # sysexits.h's EX_TEMPFAIL, "try again later": the run was stopped by a signal, and is saved
REQUESTS = (signal.SIGTERM, signal.SIGUSR1)


class Preemption:
    """Catches both signals, which no longer end this process, until `close`. Its methods are collectives."""

    def __init__(self):
        self.received = 0
        self.previous = {number: signal.signal(number, self._receive) for number in REQUESTS}
        self._ask()

    def _receive(self, number: int, _frame) -> None:
        self.received = number

    def _ask(self) -> None:
        self.flag = torch.tensor(self.received)
        self.work = dist.all_reduce(self.flag, op=dist.ReduceOp.MAX, async_op=True)

    def poll(self) -> str | None:
        """The name of the signal that some rank had received at the last call; else None, and asks again."""
        self.work.wait()
        if self.flag.item() in map(int, REQUESTS):
            return signal.Signals(self.flag.item()).name
        self._ask()
        return None

    def close(self) -> None:
        """Restores the signals' handlers, and waits for the last question, which must not outlive its process group."""
        self.work.wait()
        for number, handler in self.previous.items():
            signal.signal(number, handler)
