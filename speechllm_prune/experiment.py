"""The experiment folder: where each stage writes, when it is complete, and who made each file.

Contract (design: docs/EXPERIMENT_FOLDER.md): a stage writes only its own folder, every file atomically, and DONE.json
last. Whoever reads a folder without DONE.json is told which command makes it. No torch here.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speechllm_prune import __version__ as PACKAGE_VERSION
from speechllm_prune.lock import LOCK_FILE
from speechllm_prune.runtime import UserError

SCHEMA = 1
"""Version of the layout of all JSON files in an experiment folder."""


def sha256_file(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hex SHA-256 of a JSON value in canonical form (sorted keys, no spaces).

    Example
    -------
    >>> sha256_json({"a": 1, "b": 2}) == sha256_json({"b": 2, "a": 1})
    True
    """
    return hashlib.sha256(
        json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()


def write_text(path: str | Path, text: str) -> Path:
    """Write a text file so that a reader sees the old or the new content, never a part of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes it private; results are meant to be shared
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def write_json(path: str | Path, value: Any) -> Path:
    """Write JSON atomically, indented, with a final newline. NaN is refused (it is not JSON)."""
    return write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON file that this package wrote.

    Raises
    ------
    UserError
        If the file is missing or does not parse.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} is not valid JSON ({error}); delete it and run the command that writes it"
        ) from None


@functools.cache
def git_commit() -> str:
    """Commit of the checkout that this package runs from, with '-dirty' for local changes; 'unknown' outside git."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        ).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        return commit + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


@functools.cache
def versions() -> dict[str, str]:
    """Versions of what the results depend on, by name."""
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "peft", "speechbrain", "jiwer", "sacrebleu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def provenance(
    config_hash: str, inputs: Iterable[Path] = (), root: Path | None = None
) -> dict[str, Any]:
    """The fields that every JSON artefact carries: schema, versions, commit, config hash, hashes of its inputs.

    Arguments
    ---------
    config_hash : str
        Identity of the configuration that produced the artefact.
    inputs : iterable of Path
        Files that the artefact was made from.
    root : Path, optional
        Folder that the input paths are written relative to.
    """
    return {
        "schema": SCHEMA,
        "package_version": PACKAGE_VERSION,
        "versions": versions(),
        "git_commit": git_commit(),
        "config_hash": config_hash,
        "inputs": {os.path.relpath(path, root or Path.cwd()): sha256_file(path) for path in inputs},
    }


class Experiment:
    """The folder `results/<experiment_name>/<seed>/` and the state of its stages.

    Arguments
    ---------
    results_folder : str or Path
        Parent of all experiments.
    experiment_name : str
        Name of the experiment.
    seed : int
        Seed of the run; `--debug` runs live beside it in `<seed>-debug`.
    debug : bool
        Whether this is a `--debug` run.

    Example
    -------
    >>> Experiment("results", "demo", 3407).stage("measure/speech").as_posix()
    'results/demo/3407/measure/speech'
    """

    def __init__(
        self, results_folder: str | Path, experiment_name: str, seed: int, debug: bool = False
    ) -> None:
        self.results_folder = Path(results_folder)
        self.name = experiment_name
        self.seed = seed
        self.root = (
            self.results_folder / experiment_name / (f"{seed}-debug" if debug else str(seed))
        )

    def stage(self, name: str) -> Path:
        """Folder of a stage, such as `train` or `prune/l18n08`. It is not created."""
        return self.root / name

    def archive(self) -> Path:
        """The training stage's archived YAML, the authority on what this experiment is."""
        return self.stage("train") / "hyperparams.yaml"

    def holds_training(self) -> bool:
        """Whether training has saved anything yet: until then its archive binds nobody."""
        saved = (self.stage("train") / "save").glob("CKPT+*")
        return self.is_done("train") or any(saved)

    def is_done(self, stage: str) -> bool:
        """Whether a stage is complete (its DONE.json exists)."""
        return (self.stage(stage) / "DONE.json").is_file()

    def require(self, stage: str, command: str) -> Path:
        """Folder of a stage that must be complete.

        Raises
        ------
        UserError
            Naming the command that completes it.
        """
        if not self.is_done(stage):
            state = "is not finished" if self.stage(stage).is_dir() else "does not exist"
            raise UserError(f"{self.stage(stage)} {state} (no DONE.json); run: {command}")
        return self.stage(stage)

    def begin(self, stage: str, config_hash: str, overwrite: bool = False) -> bool:
        """Prepare to run a stage: True if there is work to do, False if it is already complete.

        A complete stage of another configuration is refused unless `overwrite` is given, which empties the folder.

        Raises
        ------
        UserError
            If DONE.json belongs to another configuration.
        """
        folder = self.stage(stage)
        if overwrite:
            self._empty(folder)
        if self.is_done(stage):
            done = read_json(folder / "DONE.json")
            if done.get("config_hash") != config_hash:
                raise UserError(
                    f"{folder} was made with another configuration (config hash {done.get('config_hash', '?')[:12]}, "
                    f"now {config_hash[:12]}); use --overwrite to make it again, or another experiment_name or --tag"
                )
            self.check_inputs(folder / "DONE.json", done)
            print(f"{folder} is already done; --overwrite makes it again")
            return False
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "STOPPED.json").unlink(missing_ok=True)
        return True

    @staticmethod
    def _empty(folder: Path) -> None:
        """Delete all that a stage holds but the lock of the run that makes it again."""
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != LOCK_FILE:
                path.unlink()

    def check_inputs(self, file: Path, record: dict[str, Any]) -> None:
        """Refuse a finished result whose inputs have changed since (a retrained model, another manifest).

        A plan does not count: it changes when another path chooses the same block, which shares the block's results.

        Raises
        ------
        UserError
            Naming the inputs that differ.
        """
        changed = [
            name
            for name, digest in record.get("inputs", {}).items()
            if Path(name).name != "plan.json"
            and (self.root / name).is_file()
            and sha256_file(self.root / name) != digest
        ]
        if changed:
            raise UserError(
                f"{file} was made from other inputs: {', '.join(changed)} changed since; put them back, or "
                "--overwrite makes it again"
            )

    def finish(
        self, stage: str, config_hash: str, inputs: Iterable[Path] = (), **facts: Any
    ) -> None:
        """Mark a stage complete: writes DONE.json, the last file of every stage."""
        record = provenance(config_hash, inputs, self.root) | {"stage": stage, **facts}
        write_json(self.stage(stage) / "DONE.json", record)

    def stopped(self, stage: str, config_hash: str, signal_name: str, **facts: Any) -> None:
        """Leave a note that a stage was stopped by a signal and can be resumed."""
        self.stage(stage).mkdir(parents=True, exist_ok=True)
        record = provenance(config_hash) | {"stage": stage, "signal": signal_name, **facts}
        write_json(self.stage(stage) / "STOPPED.json", record)


HEAL_MODES = ("none", "decoder", "projector", "joint")
"""What a variant may be healed by, in the order of tables."""


@dataclass(frozen=True)
class Variant:
    """A system of an experiment: the full model, or a block removed and healed in some way.

    Arguments
    ---------
    start_layer : int or None
        None for the full model.
    block_size : int
        0 for the full model.
    heal_mode : str
        none | decoder | projector | joint.
    tag : str
        Tells apart variants that differ in something else.
    control : bool
        Nothing is removed, but the same healing is done.

    Raises
    ------
    UserError
        If the tag cannot be part of a folder's name.

    Example
    -------
    >>> Variant.parse("control-l18n08-joint+kl")
    Variant(start_layer=18, block_size=8, heal_mode='joint', tag='kl', control=True)
    >>> Variant(18, 8, "none").name
    'l18n08-none'
    """

    start_layer: int | None = None
    block_size: int = 0
    heal_mode: str = "none"
    tag: str = ""
    control: bool = False

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.-]*", self.tag):
            raise UserError(
                f"tag {self.tag!r} becomes part of a folder's name: use letters, digits, '_', '.' and '-'"
            )

    @property
    def name(self) -> str:
        """As in folder names."""
        block = "full" if self.start_layer is None else f"{self.block}-{self.heal_mode}"
        return ("control-" if self.control else "") + block + (f"+{self.tag}" if self.tag else "")

    @property
    def block(self) -> str:
        """Name of the block, `l18n08`: the folder of its plan."""
        return f"l{self.start_layer:02d}n{self.block_size:02d}"

    @property
    def is_healed(self) -> bool:
        """Whether the variant has a stage in `heal/`: all but the full model and the plain cut have."""
        return self.start_layer is not None and (self.heal_mode != "none" or bool(self.tag))

    @classmethod
    def parse(cls, name: str) -> Variant:
        """Read a variant's name.

        Raises
        ------
        UserError
        """
        tagged = re.fullmatch(r"full(?:\+([\w.-]+))?", name)
        if tagged:
            return cls(tag=tagged[1] or "")
        match = re.fullmatch(
            rf"(control-)?l(\d{{2,}})n(\d{{2,}})-({'|'.join(HEAL_MODES)})(?:\+([\w.-]+))?", name
        )
        if not match:
            raise UserError(
                f"{name!r} is no variant; examples: full, l18n08-none, l18n08-joint, control-l18n08-joint"
            )
        return cls(int(match[2]), int(match[3]), match[4], match[5] or "", bool(match[1]))
