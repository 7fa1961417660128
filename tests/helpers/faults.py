"""Runs of train.py with a fault in them: processes that are started, hurt, and waited for, but never tidied up."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from helpers.ranks import _context, free_port

ASLEEP = 3600  # seconds
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]


def start(world_size: int, arguments: list[str], output: str, fault: dict | None = None) -> list:
    """Processes that do what `torchrun train.py ARGUMENTS` does; their lines go to `output`; fault: see `inject`."""
    port = free_port()
    processes = [
        _context.Process(target=_run, args=(rank, world_size, port, arguments, output, fault or {}))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    return processes


def exit_codes(processes: list, timeout: float = 120) -> list[int]:
    """When all have ended by themselves."""
    deadline = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert None not in codes, f"still running after {timeout} s: {codes}"
    return codes


def _run(rank: int, world_size: int, port: int, arguments: list[str], output: str, fault: dict) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    status = run(arguments, fault)
    sys.stdout.flush()
    os._exit(status)


def run(arguments: list[str], fault: dict) -> int:
    import train
    from config import load_config
    from resilience.process_group import clean_exit

    if fault and fault.get("rank", 0) == int(os.environ["RANK"]):
        inject(**fault)
    with clean_exit():
        return train.main(load_config(arguments))


def inject(kind: str, step: int = 0, rank: int = 0) -> None:
    """Makes something go wrong on this rank: at the beginning of a step, in a layer during it, or when it is saved."""
    import checkpoint.writer
    import train

    count_valid_tokens, build_stages, counted = train.count_valid_tokens, train.build_stages, [0]

    def count(*args):
        counted[0] += 1
        if counted[0] == step:
            hurt(kind)
        return count_valid_tokens(*args)

    def build(*args):
        stages = build_stages(*args)
        for stage in stages:
            module = stage.layers["1"] if kind == "nan gradient" else stage.output
            module.register_forward_hook(spoil)
        return stages

    def spoil(_module, _inputs, out):
        if counted[0] != step:
            return out
        if kind == "nan gradient":
            first = out[0] if isinstance(out, tuple) else out
            first.register_hook(lambda grad: grad * torch.nan)
            return out
        return out * torch.nan if kind == "nan forward" else out + torch.inf  # whose gradient is finite

    def save(*args):
        if f"step-{step}" in args[1]:
            os.kill(os.getpid(), signal.SIGKILL)
        return commit(*args)

    def full(*args):
        raise OSError("injected")

    commit = checkpoint.writer._commit
    train.count_valid_tokens = count
    if kind == "NCCL's file, elsewhere":
        os.environ["TORCH_FR_DUMP_TEMP_FILE"] = os.path.join(tempfile.mkdtemp(), "rank-")
    if kind in ("nan gradient", "nan forward", "infinite loss"):
        train.build_stages = build
    if kind == "disk full":
        checkpoint.writer._prepare = full
    if kind == "kill in save":
        checkpoint.writer._commit = save


def hurt(kind: str) -> None:
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "crash":
        raise RuntimeError("injected")
    elif kind in ("SIGTERM", "SIGUSR1"):
        os.kill(os.getpid(), getattr(signal, kind))
    elif kind == "sleep":
        time.sleep(ASLEEP)
    elif kind.startswith("NCCL's file"):
        Path(os.environ["TORCH_FR_DUMP_TEMP_FILE"] + os.environ["RANK"]).write_text("its last collectives")
        time.sleep(ASLEEP)
    elif kind == "out of memory":
        torch.empty(2**58)
    elif kind == "out of GPU memory":
        torch.empty(2**50, device="cuda")
    elif kind == "GPU hangs":
        for _ in range(100):
            torch.cuda._sleep(2**31 - 1)  # a second, on a clock of 2 GHz


class TwoHosts:
    """Two network namespaces with a cable between them: two hosts, for whatever runs in them."""

    NAMES, ADDRESSES = ("nano-train-0", "nano-train-1"), ("10.77.0.1", "10.77.0.2")

    def ip(self, command: str) -> None:
        subprocess.run(["ip", *command.split()], check=True, capture_output=True)

    def __enter__(self) -> "TwoHosts":
        for name in self.NAMES:
            self.ip(f"netns add {name}")
        self.ip(f"link add nt0 netns {self.NAMES[0]} type veth peer name nt1 netns {self.NAMES[1]}")
        for i, (name, address) in enumerate(zip(self.NAMES, self.ADDRESSES, strict=True)):
            self.ip(f"-n {name} addr add {address}/24 dev nt{i}")
            self.ip(f"-n {name} link set nt{i} up")
            self.ip(f"-n {name} link set lo up")
        return self

    def __exit__(self, *_) -> None:
        for name in self.NAMES:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def torchrun(self, i: int, arguments: list[str], output: Path) -> subprocess.Popen:
        where = ["ip", "netns", "exec", self.NAMES[i], "env", f"GLOO_SOCKET_IFNAME=nt{i}"]
        to = [f"--rdzv_endpoint={self.ADDRESSES[0]}:29500", "--rdzv_backend=c10d", f"--local_addr={self.ADDRESSES[i]}"]
        to.append(f"--rdzv_conf=is_host={int(i == 0)}")  # the namespaces have one host name, and no name server
        with open(output, "w") as file:
            command = [*where, *TORCHRUN, "--nnodes=2", *to, "train.py", *arguments]
            return subprocess.Popen(command, stdout=file, stderr=file)


def main() -> None:
    """`torchrun tests/faults.py KIND STEP RANK ARGUMENTS`: the fault happens in the first start only, and not after
    torchrun has restarted the ranks."""
    kind, step, rank, *arguments = sys.argv[1:]
    is_first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    sys.exit(run(arguments, dict(kind=kind, step=int(step), rank=int(rank)) if is_first and kind != "none" else {}))


if __name__ == "__main__":
    main()
