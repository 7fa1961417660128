"""When to save, what to load, which checkpoints to keep. (How one is written: storage.py; how checked: manifest.py.)

A checkpoint is a folder `step-N`: files of torch's distributed checkpoint (DCP), which describe every tensor as a whole
under its name and so load into any layout; `state.json` with the numbers that are not tensors; and `manifest.json` with
the checksums of all of them. What bears that name is complete, and is never written into again.
"""

import os
import re
import shutil
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
import torch.distributed as dist
from torch import Tensor

from checkpoint.manifest import find_damage
from checkpoint.safe_metadata import SafeReader
from checkpoint.staging import Staging
from checkpoint.state import ModelState, read_state
from checkpoint.storage import PARTIAL, SaveFailed, free_name, write_checkpoint
from errors import ConfigError
from hf.load import load_hf

# Of the model's arguments, those that decide how it learns and not what it computes: they may change on the way.
TRAINING_ONLY = ("init_std", "expert_bias_speed", "balance_loss_weight", "mtp_loss_weight")
# What weights to start from may also have otherwise; where a part is left out, sizes that only that part may have.
NOT_WEIGHTS = (*TRAINING_ONLY, "max_seq_len", "rope_")
NOT_SHARED = ("vocab_size", "n_layers", "n_dense_layers", "n_mtp_layers", "tie_embeddings")
CORRUPT = "corrupt-"


class CheckpointManager:
    """Owns one run's folder of checkpoints. Every method but `wait_for_staging` is a collective.

    failed_saves   how many saves failed; the run goes on, and the next interval tries again
    """

    def __init__(
        self,
        folder: str,
        *,
        trained: ModelState,
        enable: bool,
        interval: int,
        async_mode: str,
        keep_latest_k: int,
        keep_every: int,
        last_save_dtype: torch.dtype | None,
    ):
        """async_mode: as in config.py. last_save_dtype: the last save holds the weights alone, in this; None: all."""
        self.folder, self.trained = folder, trained
        self.enable, self.interval, self.last_save_dtype = enable, interval, last_save_dtype
        self.keep_latest_k, self.keep_every = keep_latest_k, keep_every
        self.saved_step, self.failed_saves = None, 0
        self.group = self.staging = self.thread = None
        self.pending: tuple[int, Future] | None = None
        if enable:
            # Tensors on the CPU, and beside training's own communication: a group that only saving uses.
            self.group = dist.new_group(backend="gloo")
        if enable and async_mode != "disabled":
            self.staging = Staging(pinned=async_mode == "async_with_pinned_mem")
            self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    # --------------------------------------------------------------------------------------------- save

    def maybe_save(self, step: int, *, is_last: bool, **numbers) -> None:
        """Saves at every interval and at the last step; numbers go to state.json and come back from `load`."""
        if self.enable and (is_last or step % self.interval == 0):
            self.save(step, is_last=is_last, **numbers)

    def save(self, step: int, *, is_last: bool = False, **numbers) -> bool:
        """Saves, or begins to (after an earlier one is done): `wait_for_staging` before changing any weight. False if
        the save is known to have failed."""
        self.wait()
        if step == self.saved_step:
            return True
        weights_only = is_last and self.last_save_dtype is not None
        state = dict(step=step, weights_only=weights_only, model_args=dict(vars(self.trained.model_args)), **numbers)
        tensors = self.trained.exported_tensors(self.last_save_dtype) if weights_only else self.trained.tensors()
        if self.staging is None:
            return self._write(step, tensors, state)
        copies, copied = self.staging.copy(tensors)

        def write() -> bool:
            copied()
            return self._write(step, copies, state)

        self.pending = step, self.thread.submit(write)
        return True

    def wait_for_staging(self) -> None:
        """Call before the optimizer's step: weights must not change while they are copied."""
        if self.staging is not None:
            self.staging.wait()

    def wait(self) -> bool:
        """Until what was begun is done: whether all that was asked for since the last call is saved."""
        if self.pending is None:
            return True
        (_, future), self.pending = self.pending, None
        return future.result()

    def close(self) -> None:
        """Waits for the last save."""
        self.wait()
        if self.thread is not None:
            self.thread.shutdown()

    def _write(self, step: int, tensors: dict[str, Tensor], state: dict) -> bool:
        is_first = dist.get_rank() == 0
        try:
            write_checkpoint(self.folder, f"step-{step}", tensors, state, self.group)
        except SaveFailed as failure:
            self.failed_saves += 1
            if is_first:
                print(
                    f"WARNING: step {step} was NOT saved ({failure}); the run goes on, and tries again at the next "
                    f"interval. Saves that failed so far: {self.failed_saves}.",
                    flush=True,
                )
            return False
        self.saved_step = step
        if is_first:
            print(f"saved {self._path(step)}", flush=True)
            self._delete_old()
        return True

    def _delete_old(self) -> None:
        steps = self._listed_steps()
        old = steps[: -self.keep_latest_k] if self.keep_latest_k > 0 else []
        try:
            for step in old:
                if self.keep_every == 0 or step % self.keep_every:
                    # Renamed first: a folder that is half deleted must not look like a checkpoint.
                    aside = free_name(self.folder, f"{PARTIAL}deleted-{step}")
                    os.rename(self._path(step), aside)
                    shutil.rmtree(aside)
        except OSError as error:
            print(f"WARNING: cannot delete {error.filename}: {error.strerror}.", flush=True)

    # --------------------------------------------------------------------------------------------- load

    def load(
        self, load_step: int, initial_load_path: str, initial_load_in_hf: bool, exclude: Sequence[str] = ()
    ) -> dict | None:
        """Resumes from load_step, or from the newest intact checkpoint if it is -1, and returns its state.json. If
        there is none, reads just the weights of initial_load_path, if given, and returns None; that is a checkpoint's
        folder, or with initial_load_in_hf a Hugging Face one, and of it all but what is named in `exclude`, each a
        parameter's name or the beginning of some.

        ValueError when load_step is not there or damaged, when no checkpoint is intact but there were some, or when one
        does not hold this model: never a fresh start instead.
        """
        step = self._step_to_resume(load_step) if self.enable else None
        if step is None:
            if initial_load_path:
                self._load_weights(initial_load_path, initial_load_in_hf, exclude)
            return None
        path = self._path(step)
        reader, state = SafeReader(path), read_state(path)
        if state["weights_only"]:
            raise ConfigError(
                f"{path} holds the weights alone (checkpoint.last_save_model_only): a run cannot go on from it; give "
                "an earlier --checkpoint.load_step, or begin another with --checkpoint.initial_load_path."
            )
        slots = self.trained.empty_optimizer_slots(reader)
        self.trained.read(reader, self.trained.model_tensors() | slots, free=TRAINING_ONLY, group=self.group)
        self.trained.load_optimizer(slots)
        self._set_aside([s for s in self._everywhere(self._listed_steps) if s > step], "superseded-", "is newer")
        self.saved_step = step
        return state

    def _step_to_resume(self, load_step: int) -> int | None:
        """load_step, or the newest step whose checkpoint is intact; damaged ones are renamed on the way."""
        self._everywhere(self._remove_partial)
        steps = self._everywhere(self._listed_steps)
        if load_step >= 0:
            if load_step not in steps:
                raise ConfigError(
                    f"checkpoint.load_step {load_step}: there is no {self._path(load_step)}; complete ones: {steps}."
                )
            damage = self._damage(self._path(load_step))
            if damage:
                raise ConfigError(f"checkpoint.load_step {load_step}: {self._path(load_step)}: {damage}.")
            return load_step
        for step in reversed(steps):
            damage = self._damage(self._path(step))
            if damage is None:
                return step
            self._set_aside([step], CORRUPT, f"is not used, {damage}")
        set_aside = self._everywhere(lambda: [n for n in self._names() if n.startswith(CORRUPT)])
        if set_aside:
            raise ConfigError(
                f"{self.folder} has no intact checkpoint, but damaged ones: {', '.join(sorted(set_aside))}; to begin "
                "from step 0, move them away or give another job.dump_folder."
            )
        return None

    def _damage(self, path: str) -> str | None:
        """Why a checkpoint cannot be used, on any rank; each looks at some of the files."""
        everywhere = [None] * dist.get_world_size()
        damage = find_damage(path, dist.get_rank(), dist.get_world_size())
        dist.all_gather_object(everywhere, damage, group=self.group)
        return next((found for found in everywhere if found), None) or self._everywhere(lambda: _unreadable(path))

    def _set_aside(self, steps: list[int], prefix: str, why: str) -> None:
        """Renames checkpoints so that no later start takes them up: damaged ones, and after going back to an older step
        the newer ones, which belong to another history. They are never deleted."""

        def rename() -> None:
            for step in steps:
                aside = free_name(self.folder, f"{prefix}step-{step}")
                os.rename(self._path(step), aside)
                print(f"warning: checkpoint of step {step} {why}; it was renamed {aside}", flush=True)

        self._everywhere(rename)

    def _remove_partial(self) -> None:
        for name in self._names():
            if name.startswith(PARTIAL):
                print(f"removing {os.path.join(self.folder, name)}, whose run ended while it was written", flush=True)
                shutil.rmtree(os.path.join(self.folder, name))

    def _load_weights(self, path: str, is_hf: bool, exclude: Sequence[str]) -> None:
        tensors = {name.removeprefix("model."): t for name, t in self.trained.model_tensors().items()}
        everywhere = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, list(tensors), group=self.group)  # a pipeline stage has only some
        names = {name for of_rank in everywhere for name in of_rank}
        for start in exclude:
            if not any(_begins(name, start) for name in names):
                raise ConfigError(
                    f'checkpoint.exclude_from_loading: the model has no parameter that is, or begins with, "{start}"; '
                    "they are called layers.0.attention.wq.weight and so on."
                )
        tensors = {name: t for name, t in tensors.items() if not any(_begins(name, start) for start in exclude)}
        if is_hf:
            load_hf(path, tensors, self.trained.model_args)
            return
        damage = self._damage(path)
        if damage:
            raise ConfigError(f"{path} is not a complete checkpoint: {damage}.")
        tensors = {f"model.{name}": tensor for name, tensor in tensors.items()}
        free = (*NOT_WEIGHTS, *NOT_SHARED) if exclude else NOT_WEIGHTS
        self.trained.read(SafeReader(path), tensors, free=free, may_cast=True, group=self.group)

    # --------------------------------------------------------------------------------------------- names

    def _path(self, step: int) -> str:
        return os.path.join(self.folder, f"step-{step}")

    def _names(self) -> list[str]:
        return os.listdir(self.folder) if os.path.isdir(self.folder) else []

    def _listed_steps(self) -> list[int]:
        """Steps of the checkpoints, ascending."""
        return sorted(int(m[1]) for m in (re.fullmatch(r"step-(\d+)", name) for name in self._names()) if m)

    def _everywhere(self, do):
        """What `do` returns on rank 0, on all ranks: they must not each look at a folder that changes. An error of the
        file system is raised on all of them."""
        result = [None, None]
        if dist.get_rank() == 0:
            try:
                result[0] = do()
            except OSError as error:
                result[1] = f"{error.filename}: {error.strerror}."
        dist.broadcast_object_list(result, group=self.group)
        if result[1]:
            raise ConfigError(result[1])
        return result[0]


def _unreadable(path: str) -> str | None:
    """Why what was written, as it was written, is no checkpoint."""
    try:
        SafeReader(path).read_metadata()
        read_state(path)
    except ValueError as error:
        return str(error).rstrip(".")
    return None


def _begins(name: str, start: str) -> bool:
    return name == start or name.startswith(f"{start}.")
