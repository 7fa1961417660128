"""Decides when to save, which checkpoints to keep and which one to load.

A checkpoint is a folder `step-N`. The folder gets this name when all its files are on the disk (writer.py):

    *.distcp, .metadata   the tensors. torch's distributed checkpoint (DCP) describes each tensor as a whole, therefore
                          a checkpoint loads into any layout
    state.json            step, tokens and samples seen, the model's arguments (state.py)
    manifest.json         size and SHA-256 of every other file (integrity.py)

Other names: `incomplete-*` is removed by the next start, `corrupt-*` is damaged, `superseded-*` is newer than a step
that the run went back to.

Proof: tests/test_saves.py::test_keep_every_and_latest_k, tests/test_damaged_checkpoints.py::test_damaged_checkpoint,
tests/test_train.py::test_resume_is_exact_on_the_same_layout.
"""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass

import torch.distributed as dist
from torch import Tensor

from checkpoint.integrity import SafeReader, find_damage
from checkpoint.state import ModelState, TrainState, read_state
from checkpoint.writer import PARTIAL, SUPERSEDED, SaveFailed, Staging, set_aside, write_checkpoint
from collectives import gather_objects, on_rank0
from errors import ConfigError
from hf import load_hf

# Model arguments that may differ between a checkpoint and the run that loads it. An entry covers all names that begin
# with it. A resumed run may change how the model learns, but not what it computes.
IGNORED_ON_RESUME = ("init_std", "expert_bias_speed", "balance_loss_weight", "mtp_loss_weight")
# A new run from initial_load_path may also change what no weight depends on.
IGNORED_ON_INIT = (*IGNORED_ON_RESUME, "max_seq_len", "rope_")
# With exclude_from_loading it may also have other tensors. The shapes of those that it loads are still compared.
IGNORED_WITH_EXCLUDE = (*IGNORED_ON_INIT, "vocab_size", "n_layers", "n_dense_layers", "n_mtp_layers", "tie_embeddings")
CORRUPT = "corrupt-"


@dataclass
class CheckpointManager:
    """Saves and loads one run's checkpoints. The keywords are the options of [checkpoint]; config.py explains them.
    Every method but `wait_for_staging` is a collective.

    saved_step     step of the newest checkpoint that is complete; None before the first save
    failed_saves   number of failed saves; the run continues after each, and the next interval tries again
    """

    dump_folder: str
    model_state: ModelState
    _: KW_ONLY
    enable: bool
    folder: str
    interval: int
    async_mode: str
    keep_latest_k: int
    keep_every: int
    load_step: int
    initial_load_path: str
    initial_load_in_hf: bool
    exclude_from_loading: list[str]

    def __post_init__(self):
        self.folder = os.path.join(self.dump_folder, self.folder)
        self.saved_step, self.failed_saves, self.is_run_complete = None, 0, False
        self.staging = self.thread = self.pending = None
        # The thread's collectives must not mix with those of training, so they have a group to themselves.
        self.group = dist.new_group(backend="gloo") if self.enable else None
        if self.enable and self.async_mode != "disabled":
            self.staging = Staging(pinned=self.async_mode == "async_with_pinned_mem")
            self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    # --------------------------------------------------------------------------------------------- save

    def maybe_save(self, state: TrainState, *, is_last: bool) -> None:
        """Saves at every interval and at the run's last step."""
        self.is_run_complete = is_last
        if self.enable and (is_last or state.step % self.interval == 0):
            self.save(state)

    def save(self, state: TrainState) -> None:
        """Waits for the save before, then saves or starts to. Call `wait_for_staging` before changing a weight."""
        self.wait()
        if state.step == self.saved_step:
            return
        tensors = self.model_state.tensors()
        numbers = dict(vars(state), model_args=dict(vars(self.model_state.model_args)))
        if self.staging is None:
            self._write(numbers, tensors)
        else:
            self.pending = self.thread.submit(self._write, numbers, *self.staging.copy(tensors))

    def wait_for_staging(self) -> None:
        """Call this before the optimizer's step: the weights must not change while they are copied."""
        if self.staging is not None:
            self.staging.wait()

    def wait(self) -> None:
        """Waits for the pending save, if there is one."""
        if self.pending is not None:
            self.pending.result()
            self.pending = None

    def finish(self, state: TrainState) -> bool | None:
        """Ends saving and returns whether the run's last step is on the disk; None if checkpoints are disabled. Saves a
        run that was asked to stop before its last step. The save of a complete run is not tried a second time."""
        if not self.enable:
            return None
        if not self.is_run_complete:
            self.save(state)
        self.wait()
        return self.saved_step == state.step

    def _write(self, numbers: dict, tensors: dict[str, Tensor], wait_until_copied=lambda: None) -> None:
        wait_until_copied()
        step = numbers["step"]
        try:
            write_checkpoint(self.folder, f"step-{step}", tensors, numbers, self.group)
        except SaveFailed as failure:
            self.failed_saves += 1
            _log(
                f"WARNING: step {step} was NOT saved ({failure}); the run goes on, and tries again at the next "
                f"interval. Saves that failed so far: {self.failed_saves}."
            )
            return
        self.saved_step = step
        _log(f"saved {self._path(step)}")
        if dist.get_rank() == 0 and self.keep_latest_k > 0:
            self._delete_old()

    def _delete_old(self) -> None:
        try:
            for step in self._steps()[: -self.keep_latest_k]:
                if self.keep_every == 0 or step % self.keep_every:
                    # Renamed first: a folder that is half deleted must not look like a checkpoint.
                    shutil.rmtree(set_aside(self._path(step), PARTIAL))
        except OSError as error:
            print(f"WARNING: cannot delete {error.filename}: {error.strerror}.", flush=True)

    # --------------------------------------------------------------------------------------------- load

    def load(self, state: TrainState) -> None:
        """Resumes from load_step or, if that is -1, from the newest intact checkpoint, and sets the numbers of `state`.
        If there is no checkpoint, loads the weights of initial_load_path, if given, and `state` stays as it is.
        ConfigError if load_step is missing or damaged, if all checkpoints are damaged, or if a checkpoint is of another
        model: the run never starts anew instead."""
        step = self._step_to_resume() if self.enable else None
        if step is None:
            if self.initial_load_path:
                self._load_initial_weights(self.initial_load_path)
            return
        path = self._path(step)
        saved = read_state(path)
        if saved.get("weights_only"):
            raise ConfigError(
                f"{path} holds the weights alone (checkpoint.last_save_model_only of an earlier version): a run cannot "
                "resume from it; give an earlier --checkpoint.load_step, or start a new run from it with "
                "--checkpoint.initial_load_path."
            )
        self.model_state.load(SafeReader(path), ignored_args=IGNORED_ON_RESUME, group=self.group)
        for other in on_rank0(self._steps, self.group):
            if other > step:
                self._set_aside(other, SUPERSEDED, "is newer")
        self.saved_step = state.step = step
        state.tokens_seen, state.samples_consumed = saved["tokens_seen"], saved["samples_consumed"]
        _log(f"resumed at step {step} ({state.tokens_seen:,} tokens seen)")
        if saved["data_fingerprint"] != state.data_fingerprint:
            _log("warning: data, tokenizer, seed or seq_len is not that checkpoint's; samples go on in the new order")

    def _step_to_resume(self) -> int | None:
        """Returns load_step or the newest step with an intact checkpoint. Renames damaged checkpoints that it meets."""
        on_rank0(self._remove_partial, self.group)
        steps = on_rank0(self._steps, self.group)
        if self.load_step >= 0:
            path = self._path(self.load_step)
            is_there = self.load_step in steps
            damage = self._damage(path) if is_there else f"there is no such checkpoint; complete ones: {steps}"
            if damage:
                raise ConfigError(f"checkpoint.load_step {self.load_step}: {path}: {damage}.")
            return self.load_step
        for step in reversed(steps):
            damage = self._damage(self._path(step))
            if damage is None:
                return step
            self._set_aside(step, CORRUPT, f"is not used, {damage}")
        corrupt = on_rank0(lambda: self._names(CORRUPT), self.group)
        if corrupt:
            raise ConfigError(
                f"{self.folder} has no intact checkpoint, but damaged ones: {', '.join(corrupt)}; to begin from step "
                "0, move them away or give another job.dump_folder."
            )
        return None

    def _load_initial_weights(self, path: str) -> None:
        tensors = self.model_state.model_tensors()
        # A pipeline stage has only some of the names.
        names = {name for names in gather_objects(list(tensors), self.group) for name in names}
        for prefix in self.exclude_from_loading:
            if not any(f"{name}.".startswith(f"model.{prefix}.") for name in names):
                raise ConfigError(
                    f'checkpoint.exclude_from_loading: the model has no parameter that is, or begins with, "{prefix}"; '
                    "parameters have names such as layers.0.attention.wq.weight."
                )
        excluded = tuple(f"model.{prefix}." for prefix in self.exclude_from_loading)
        tensors = {name: tensor for name, tensor in tensors.items() if not f"{name}.".startswith(excluded)}
        if self.initial_load_in_hf:
            tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
            load_hf(path, tensors, self.model_state.model_args)
            return
        damage = self._damage(path)
        if damage:
            raise ConfigError(f"{path} is not a complete checkpoint: {damage}.")
        ignored = IGNORED_WITH_EXCLUDE if excluded else IGNORED_ON_INIT
        self.model_state.load_tensors(SafeReader(path), tensors, ignored_args=ignored, may_cast=True, group=self.group)

    def _damage(self, path: str) -> str | None:
        """Returns why a checkpoint cannot be used, as found by any rank. Each rank hashes some of the files."""
        damage = find_damage(path, dist.get_rank(), dist.get_world_size())
        found = [damage for damage in gather_objects(damage, self.group) if damage]
        if found:
            return found[0]
        try:  # Files that are as they were written may still be no checkpoint.
            on_rank0(lambda: bool(SafeReader(path).read_metadata() and read_state(path)), self.group)
        except ConfigError as error:
            return str(error).rstrip(".")
        return None

    def _path(self, step: int) -> str:
        return os.path.join(self.folder, f"step-{step}")

    def _names(self, prefix: str) -> list[str]:
        names = os.listdir(self.folder) if os.path.isdir(self.folder) else []
        return sorted(name for name in names if name.startswith(prefix))

    def _steps(self) -> list[int]:
        return sorted(int(name[5:]) for name in self._names("step-") if name[5:].isdecimal())

    def _set_aside(self, step: int, prefix: str, why: str) -> None:
        """Renames a checkpoint, so that no later start resumes from it. It is never deleted."""
        aside = on_rank0(lambda: set_aside(self._path(step), prefix), self.group)
        _log(f"warning: checkpoint of step {step} {why}; it was renamed {aside}")

    def _remove_partial(self) -> None:
        for name in self._names(PARTIAL):
            path = os.path.join(self.folder, name)
            print(f"removing {path}, whose run ended while it was written", flush=True)
            shutil.rmtree(path)


def _log(line: str) -> None:
    if dist.get_rank() == 0:
        print(line, flush=True)
