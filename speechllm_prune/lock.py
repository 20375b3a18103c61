"""A stage's folder is written by one run at a time: `run.lock` in it says which. No torch here."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from speechllm_prune.runtime import UserError, warn

LOCK_FILE = "run.lock"

GONE = "gone"
"""Instead of a start time: the process has ended, and its parent has not asked for its exit code yet."""


class RunLock:
    """The right to write in a folder, from `acquire` to `release`.

    Two processes of a sharded sweep share an experiment, never the folder of a stage.

    Arguments
    ---------
    folder : Path
        Of a stage; made if it is not there.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> lock = RunLock(folder).acquire()
    >>> (folder / "run.lock").is_file()
    True
    >>> lock.release()
    >>> list(folder.iterdir())
    []
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / LOCK_FILE
        self.record = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "process_start": _process_start(os.getpid()),
            "job": os.environ.get("SLURM_JOB_ID"),
            "restart": os.environ.get("SLURM_RESTART_COUNT"),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }

    def acquire(self) -> RunLock:
        """Take the lock; that of a process which is gone is taken over with a warning.

        Raises
        ------
        UserError
            If another run holds it, or may hold it: on another host nobody can tell.
        """
        self.file.parent.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                self._create()
                return self
            except FileExistsError:
                self._take_over()

    def _create(self) -> None:
        """Make the lock with its content: killed on the way, it is there whole or not at all.

        Raises
        ------
        FileExistsError
        """
        whole = self.file.with_name(f".{LOCK_FILE}.{os.getpid()}")
        whole.write_text(json.dumps(self.record), encoding="utf-8")
        try:
            os.link(whole, self.file)
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            with open(self.file, "x", encoding="utf-8") as stream:
                json.dump(self.record, stream)
        finally:
            whole.unlink()

    def _take_over(self) -> None:
        """Remove a lock that nobody holds any more, or refuse."""
        remedy = f"if you know that it is gone, delete {self.file} and run the command again"
        try:
            text = self.file.read_text(encoding="utf-8")
        except FileNotFoundError:  # released in between
            return
        try:
            held: dict[str, Any] = json.loads(text)
            owner = f"process {held['pid']} on {held['host']}, since {held['since']}"
        except (json.JSONDecodeError, KeyError, TypeError):
            raise UserError(
                f"{self.file} is unreadable: another run may be at work; {remedy}"
            ) from None
        # A requeued job keeps its number, and its former life is over, whatever host that was on.
        same_job = held["job"] is not None and held["job"] == self.record["job"]
        requeued = same_job and held.get("restart") != self.record["restart"]
        if held["host"] != self.record["host"] and not requeued:
            raise UserError(
                f"{self.file.parent} is being written by {owner}, which cannot be asked from here; {remedy}"
            )
        if held["host"] == self.record["host"] and _is_running(held):
            raise UserError(
                f"{self.file.parent} is being written by {owner}; wait for it, end it, or use another --experiment_name"
            )
        warn(f"{self.file} was left behind by {owner}, which is gone: taken over")
        with contextlib.suppress(FileNotFoundError):  # somebody else was faster
            if self.file.read_text(encoding="utf-8") == text:
                self.file.unlink()

    def release(self) -> None:
        """Give the folder back; a lock that somebody else has taken since stays."""
        try:
            if json.loads(self.file.read_text(encoding="utf-8")) == self.record:
                self.file.unlink()
        except (OSError, json.JSONDecodeError):
            pass


def _is_running(held: dict[str, Any]) -> bool:
    """Whether the process that wrote a lock on this host is still there, and is not another one of that number."""
    try:
        os.kill(held["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it runs, under another user
        pass
    start = _process_start(held["pid"])
    if start == GONE:
        return False
    return start is None or held["process_start"] in (None, start)


def _process_start(pid: int) -> str | None:
    """When a process was started (clock ticks since boot), where the system tells; GONE if it has ended."""
    try:
        # The name in parentheses may hold spaces and parentheses.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return GONE if fields[0] == "Z" else f"{fields[19]}@{boot}"
