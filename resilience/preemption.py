"""Preemption: SIGTERM and SIGUSR1 ask the run to save and end, which all ranks do after the same step.

A signal may reach one rank or all of them, each at another moment of its step. So every step begins an asynchronous
all-reduce of 8 bytes that asks whether any rank has received a signal. The answer is read when the step is over: it has
arrived long before, and training never waits for it.

Proof: tests/test_faults.py::test_signal_to_one_rank_saves_and_ends_all,
tests/test_faults.py::test_sigterm_to_torchrun_ranks_and_data_workers.
"""

import signal

import torch
import torch.distributed as dist

EXIT_PREEMPTED = 75  # sysexits.h's EX_TEMPFAIL, "try again later": the run was stopped by a signal, and is saved
REQUESTS = (signal.SIGTERM, signal.SIGUSR1)


class Preemption:
    """Catches both signals, which no longer end this process, until `close`. `poll` and `requested` are collectives."""

    def __init__(self):
        self.received = 0
        self.previous = {number: signal.signal(number, self._receive) for number in REQUESTS}
        self.pending = None

    def _receive(self, number: int, _frame) -> None:
        self.received = number

    def poll(self) -> None:
        """Begins to ask all ranks whether they have received a signal, and does not wait."""
        flag = torch.tensor(self.received)
        self.pending = flag, dist.all_reduce(flag, op=dist.ReduceOp.MAX, async_op=True)

    def requested(self) -> str | None:
        """Waits for the last poll: the name of the signal that some rank had received by then. None if there was no
        signal, or no poll since the last call."""
        if self.pending is None:
            return None
        (flag, work), self.pending = self.pending, None
        work.wait()
        return signal.Signals(flag.item()).name if flag.item() in map(int, REQUESTS) else None

    def close(self) -> None:
        """Restores the signals' handlers, and waits for a pending poll: its all-reduce must not outlive its group."""
        self.requested()
        for number, handler in self.previous.items():
            signal.signal(number, handler)
