"""Preemption: SIGTERM and SIGUSR1 are a request to save and end, which all ranks answer after the same step.

A signal may reach one rank or all, and each at another moment of its step, so every step begins a tiny all-reduce that
asks whether any rank has had one, and its end reads the answer: it has long arrived, and training never waits for it.
"""

import signal

import torch
import torch.distributed as dist

EXIT_PREEMPTED = 75  # sysexits.h's EX_TEMPFAIL, "try again later": saved after a signal, not finished
REQUESTS = (signal.SIGTERM, signal.SIGUSR1)


class Preemption:
    """From its making on, the two signals no longer end this process: `answer` says what it should do about them."""

    def __init__(self):
        self.received = 0
        self.previous = {number: signal.signal(number, self._receive) for number in REQUESTS}
        self.question = None

    def _receive(self, number: int, _frame) -> None:
        self.received = number

    def ask(self) -> None:
        """Begins to ask all ranks. A collective, as is `answer`, which waits for the last question's."""
        flag = torch.tensor(self.received)
        self.question = flag, dist.all_reduce(flag, op=dist.ReduceOp.MAX, async_op=True)

    def answer(self) -> str | None:
        """The name of a signal that some rank had received when all were asked."""
        flag, work = self.question
        work.wait()
        return signal.Signals(flag.item()).name if flag.item() in map(int, REQUESTS) else None

    def close(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
