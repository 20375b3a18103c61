"""Checkpoints: only what is trained, in safetensors, and never half a checkpoint under a valid name."""

from __future__ import annotations

import itertools
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from speechbrain.utils.checkpoints import (
    Checkpoint,
    Checkpointer,
)
from speechbrain.utils.distributed import ddp_barrier, ddp_broadcast, if_main_process
from torch import Tensor

from speechllm_prune.experiment import provenance, read_json, sha256_file, write_json
from speechllm_prune.recoverables import TrainableState
from speechllm_prune.runtime import Fault, UserError, warn

MODEL_FILE = "model.ckpt"
"""The trainable tensors in a checkpoint folder (safetensors; the ending is SpeechBrain's)."""

MANIFEST = "MANIFEST.json"
"""Sizes and hashes of a checkpoint's files, written last."""

PREFIX, REJECTED = "CKPT+", "REJECTED+"
"""Of the folder `CKPT+<step>+<number>`, and of one whose content is damaged."""


class AtomicCheckpointer(Checkpointer):
    """SpeechBrain's checkpointer for runs that are killed, fill the disk, or lose a bit.

    A checkpoint is written under a temporary name, MANIFEST.json with sizes and hashes last, and renamed once it is all
    on disk. The original writes its meta file first, so that a process killed while saving leaves a folder that counts
    as the newest checkpoint and makes every restart fail. Newer means a later step, not a later time.

    Arguments
    ---------
    checkpoints_dir : Path
        Where the checkpoints of one stage are.
    identity : mapping, optional
        What a checkpoint must agree in with this run, by name; another one is refused.
    """

    def __init__(self, checkpoints_dir: Path, identity: Mapping[str, Any] | None = None) -> None:
        super().__init__(checkpoints_dir)
        self.identity = dict(identity or {})
        self._warned: set[Path] = set()

    # ------------------------------------------------------------ saving

    def save_checkpoint(
        self, meta: Mapping[str, Any] = MappingProxyType({}), **kwargs: Any
    ) -> Checkpoint | None:
        """As the parent's; the folder appears under its final name once it is complete.

        Raises
        ------
        Fault
            If the weights are not finite, or there is no room; what was saved before is intact.
        """
        for state in self.recoverables.values():
            if isinstance(state, TrainableState):
                state.check_finite()
        problem = ddp_broadcast(self._lack_of_space() if if_main_process() else None)
        if problem:
            raise Fault(problem)
        try:
            saved = super().save_checkpoint(meta=dict(meta), **kwargs)
            ddp_barrier()
            if saved is not None:
                saved = self._publish(saved)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(self._temporary, ignore_errors=True)
            raise Fault(self._no_room(f"a checkpoint could not be saved ({error})")) from error
        ddp_barrier()
        return saved

    @property
    def _temporary(self) -> Path:
        return self.checkpoints_dir / ".saving"

    def _new_checkpoint_dirpath(self) -> Path:
        shutil.rmtree(self._temporary, ignore_errors=True)
        return self._temporary

    def _publish(self, saved: Checkpoint) -> Checkpoint:
        """Write the manifest, bring everything to the disk, rename, and read it all back."""
        step = int(saved.meta.get("optimizer_step", 0))
        files = sorted(saved.path.iterdir())
        record = provenance(self.identity.get("configuration", "")) | {
            "optimizer_step": step,
            "identity": self.identity,
            "files": {
                file.name: {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
                for file in files
            },
        }
        for path in (*files, write_json(saved.path / MANIFEST, record), saved.path):
            _sync(path)
        names = (f"{PREFIX}{step:08d}+{number:02d}" for number in itertools.count())
        final = next(
            path for path in map(self.checkpoints_dir.joinpath, names) if not path.exists()
        )
        os.rename(saved.path, final)
        _sync(self.checkpoints_dir)
        problem = find_damage(final)
        if problem:
            raise OSError(f"read back, {problem}")
        paths = {name: final / path.name for name, path in saved.paramfiles.items()}
        return Checkpoint(final, saved.meta, paths)

    def _lack_of_space(self) -> str | None:
        free = shutil.disk_usage(self.checkpoints_dir).free
        return self._no_room("a checkpoint was not saved") if free < self._bytes_needed() else None

    def _bytes_needed(self) -> int:
        states = self.recoverables.values()
        return 2**20 + sum(state.num_bytes() for state in states if hasattr(state, "num_bytes"))

    def _no_room(self, what: str) -> str:
        free = shutil.disk_usage(self.checkpoints_dir).free
        return (
            f"{what}: it needs {self._bytes_needed():,} bytes in {self.checkpoints_dir}, {free:,} are free. The "
            "checkpoints before it are intact: make room and run the same command again"
        )

    def save_and_prune(
        self, meta: dict[str, Any], min_key: str | None, max_key: str | None
    ) -> None:
        """Save; keep the newest, the one before it, and the best by the given key."""
        self.save_checkpoint(meta=meta)
        if if_main_process():
            every = self.list_checkpoints()
            kept = [*every[:2], *self.find_checkpoints(min_key=min_key, max_key=max_key)[:1]]
            for checkpoint in every:
                if checkpoint.path not in [other.path for other in kept]:
                    self._discard(checkpoint.path)
        ddp_barrier()

    def _discard(self, folder: Path) -> None:
        """Delete a checkpoint; killed on the way, it leaves nothing that looks like one."""
        condemned = self.checkpoints_dir / ".deleting"
        shutil.rmtree(condemned, ignore_errors=True)
        os.rename(folder, condemned)
        shutil.rmtree(condemned)

    # ------------------------------------------------------------ finding

    def list_checkpoints(self) -> list[Checkpoint]:
        """The checkpoints whose files are all there, latest step first; the others are warned about."""
        good: list[Path] = []
        for folder in sorted(self.checkpoints_dir.glob(f"{PREFIX}*"), reverse=True):
            problem = find_damage(folder, hashes=False)
            if problem is None:
                good.append(folder)
            elif folder not in self._warned:
                self._warned.add(folder)
                warn(f"the checkpoint {folder} is not used: {problem}")
        return self._construct_checkpoint_objects(good)

    def find_checkpoints(
        self,
        importance_key: Callable[[Checkpoint], Any] | None = None,
        max_key: str | None = None,
        min_key: str | None = None,
        ckpt_predicate: Callable[[Checkpoint], bool] | None = None,
        max_num_checkpoints: int | None = None,
    ) -> list[Checkpoint]:
        """As the parent's, but the order among equals is that of the steps."""
        found = [c for c in self.list_checkpoints() if ckpt_predicate is None or ckpt_predicate(c)]
        key = max_key or min_key
        if key:
            found = [checkpoint for checkpoint in found if key in checkpoint.meta]
            found.sort(key=lambda checkpoint: checkpoint.meta[key], reverse=bool(max_key))
        elif importance_key is not None:
            found.sort(key=importance_key, reverse=True)
        return found[:max_num_checkpoints]

    def best(self, min_key: str | None = None, max_key: str | None = None) -> Checkpoint:
        """The best checkpoint by a key of its meta, among those whose content is what was saved."""
        return self._first_undamaged(
            lambda: self.find_checkpoints(min_key=min_key, max_key=max_key)
        )

    def recover_if_possible(self, *args: Any, **kwargs: Any) -> Checkpoint | None:
        """Load the newest checkpoint whose content is what was saved; None if nothing has been saved yet.

        Raises
        ------
        UserError
            If it belongs to another run, or there are checkpoints and none can be used: a run that has got somewhere
            never starts from scratch by itself.
        """
        chosen = ddp_broadcast(self._newest() if if_main_process() else None)
        if isinstance(chosen, UserError):
            raise chosen
        if chosen is not None:
            self.load_checkpoint(chosen)
            if if_main_process():
                print(f"resumed:  from step {chosen.meta['optimizer_step']} ({chosen.path})")
        return chosen

    def _newest(self) -> Checkpoint | UserError | None:
        for leftover in (self._temporary, self.checkpoints_dir / ".deleting"):
            shutil.rmtree(leftover, ignore_errors=True)
        if not any(self._saved()):
            return None
        try:
            checkpoint = self._first_undamaged(self.list_checkpoints)
            self._check_identity(checkpoint.path)
        except UserError as error:
            return error
        return checkpoint

    def _saved(self) -> Iterator[Path]:
        return (p for p in self.checkpoints_dir.iterdir() if p.name.startswith((PREFIX, REJECTED)))

    def _first_undamaged(self, ranked: Callable[[], list[Checkpoint]]) -> Checkpoint:
        """The first checkpoint whose hashes are right; damaged ones before it are renamed and count no more."""
        for checkpoint in ranked():
            problem = find_damage(checkpoint.path)
            if problem is None:
                return checkpoint
            aside = checkpoint.path.with_name(REJECTED + checkpoint.path.name)
            warn(f"the checkpoint {checkpoint.path} is not used: {problem}; it is {aside.name} now")
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(checkpoint.path, aside)
        raise UserError(
            f"none of the {len(list(self._saved()))} checkpoints in {self.checkpoints_dir} can be used (see the "
            "warnings); put a good copy of one back, or use --overwrite, which starts again"
        )

    def _check_identity(self, folder: Path) -> None:
        saved = read_json(folder / MANIFEST)["identity"]
        problems = [
            f"{name} {_short(saved.get(name))} there, {_short(value)} now"
            for name, value in self.identity.items()
            if saved.get(name) != value
        ]
        if problems:
            raise UserError(
                f"{folder} was saved by another run: {'; '.join(problems)}. Put back what belongs to this run, or use "
                "--overwrite, which starts again"
            )


def find_damage(folder: Path, hashes: bool = True) -> str | None:
    """What is wrong with a checkpoint's folder, by its manifest; None if nothing is.

    Arguments
    ---------
    folder : Path
        The checkpoint.
    hashes : bool
        False: only look at the sizes of the files.
    """
    try:
        files = read_json(folder / MANIFEST)["files"]
    except (UserError, KeyError, TypeError) as error:
        return f"no usable manifest: {error}"
    for name, saved in files.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != saved["bytes"]:
            return f"{name} has {file.stat().st_size} bytes instead of {saved['bytes']}"
        if hashes and sha256_file(file) != saved["sha256"]:
            return f"the content of {name} is not what was saved (sha256)"
    return None


def _short(value: Any) -> str:
    """A value for a message; of a hash the first digits."""
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1", str(value))


def _sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def load_checkpoint_tensors(folder: Path, sha256: str | None = None) -> dict[str, Tensor]:
    """The trainable tensors of a checkpoint folder, on the CPU.

    Arguments
    ---------
    folder : Path
        The checkpoint.
    sha256 : str, optional
        What the file's hash must be (`checkpoint_sha256` in the stage's DONE.json).

    Raises
    ------
    UserError
        If the file is missing, is not the one that was saved, or is damaged.
    """
    path = folder / MODEL_FILE
    remedy = "put the right file back, or make the stage again with --overwrite"
    if not path.is_file():
        raise UserError(
            f"{folder} holds no {MODEL_FILE}; the checkpoint was deleted or never finished"
        )
    if sha256 is not None and sha256_file(path) != sha256:
        raise UserError(f"{path} is not the file that was saved (its sha256 differs); {remedy}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}); {remedy}") from None
