"""What every verb shares at its edges: user errors, exit codes, signals and seeds.

No heavy import here: `report.py` and `--help` must start without torch.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import logging
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

from speechllm_prune.redaction import redact

DONE, FAULT, USER_ERROR, STOPPED = 0, 1, 2, 75
"""Exit codes: finished (or already finished), a fault, a user's mistake, stopped by a signal and resumable."""

_NO_WRITING = {
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST), USER_ERROR
    ),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), FAULT),
}
"""Exit codes where the place for the results cannot be written, or is full."""


class UserError(Exception):
    """A mistake that the user can mend. The message says what was given, what is allowed and what to run next."""


class Fault(Exception):
    """Something broke that is no mistake of the command. The message says what is intact and what to do."""


class Stopped(Exception):
    """A signal asked the process to stop. The work so far is saved; running the command again resumes it.

    Arguments
    ---------
    signal_name : str
        Such as SIGTERM.
    **facts
        For STOPPED.json, such as the step.
    """

    def __init__(self, signal_name: str = "", **facts: Any) -> None:
        super().__init__(signal_name)
        self.facts = facts


def warn(text: str) -> None:
    """Say something on stderr, and in the log of the stage if there is one."""
    print(f"warning: {text}", file=sys.stderr)
    if logging.getLogger().handlers:
        logging.getLogger(__name__).warning(text)


def verb(main: Callable[[list[str]], int | None]) -> Callable[..., int]:
    """Turn `main(argv)` of a command into one that reports mistakes in one message and returns an exit code.

    Arguments
    ---------
    main : callable
        Takes the list of command-line arguments, returns None or an exit code.

    Returns
    -------
    callable
        `main(argv=None) -> int`; `argv` defaults to `sys.argv[1:]`.

    Example
    -------
    >>> @verb
    ... def main(argv):
    ...     raise UserError("no such folder")
    >>> main([])
    2
    """

    @functools.wraps(main)
    def wrapped(argv: list[str] | None = None) -> int:
        try:
            with graceful_stop():
                return main(sys.argv[1:] if argv is None else list(argv)) or DONE
        except UserError as error:
            print(f"error: {redact(str(error))}", file=sys.stderr)
            return USER_ERROR
        except Fault as error:
            print(f"error: {redact(str(error))}", file=sys.stderr)
            return FAULT
        except BrokenPipeError:  # such as `| head`: nobody reads on
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return FAULT
        except OSError as error:
            if error.errno not in _NO_WRITING:
                raise
            print(
                f"error: cannot write {error.filename or 'a file'}: {error.strerror}; make room or give another "
                "--results_folder, and run the same command again",
                file=sys.stderr,
            )
            return _NO_WRITING[error.errno]
        except SystemExit as leave:  # argparse: --help is 0, a wrong command line 2
            return leave.code if isinstance(leave.code, int) else DONE
        except (Stopped, KeyboardInterrupt) as reason:
            print(
                f"stopped: {str(reason) or 'Ctrl-C'}; run the same command again to resume",
                file=sys.stderr,
            )
            return STOPPED

    return wrapped


_stop_signal: str | None = None


class graceful_stop:
    """Context: the first SIGTERM or SIGUSR1 sets a flag that the loops poll, the second one exits at once.

    Outside the main thread (where Python refuses signal handlers) it does nothing.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __enter__(self) -> graceful_stop:
        global _stop_signal
        _stop_signal = None
        self._owner = os.getpid()
        try:
            self._previous = {
                number: signal.signal(number, self._handle) for number in self.SIGNALS
            }
        except ValueError:
            self._previous = {}
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        global _stop_signal
        # A forked DataLoader worker inherits the handler: it must die as it would have without us.
        if os.getpid() != self._owner or _stop_signal is not None:
            os._exit(128 + number)
        _stop_signal = signal.Signals(number).name
        print(f"{_stop_signal} received: stopping at the next safe point", file=sys.stderr)


def stop_requested() -> str | None:
    """The name of the signal that asked to stop, or None."""
    return _stop_signal


def raise_if_stopped() -> None:
    """Raise `Stopped` when a signal has asked for it: for loops whose finished parts are already on disk."""
    if _stop_signal is not None and not _all_together:
        raise Stopped(_stop_signal)


_all_together = False


@contextlib.contextmanager
def all_together() -> Iterator[None]:
    """Context: `raise_if_stopped` holds still, because several ranks stop together or not at all."""
    global _all_together
    before, _all_together = _all_together, True
    try:
        yield
    finally:
        _all_together = before


def derive_seed(seed: int, stage: str, rank: int = 0) -> int:
    """One 31-bit seed from (seed, stage, rank), so that no stage depends on what ran before it.

    Example
    -------
    >>> derive_seed(1, "train") == derive_seed(1, "train")
    True
    >>> derive_seed(1, "train") == derive_seed(1, "heal")
    False
    """
    digest = hashlib.sha256(f"{seed}/{stage}/{rank}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def spoken(seconds: float) -> str:
    """A duration as people say it.

    Example
    -------
    >>> spoken(41.2), spoken(375), spoken(9000)
    ('41 s', '6 min', '2.5 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def seed_everything(seed: int, stage: str, rank: int = 0) -> int:
    """Seed Python, NumPy and torch from (seed, stage, rank). Returns the derived seed."""
    import numpy
    import torch

    derived = derive_seed(seed, stage, rank)
    random.seed(derived)
    numpy.random.seed(derived)
    torch.manual_seed(derived)
    return derived


def random_state() -> dict[str, Any]:
    """State of the generators of Python, NumPy and torch, in plain values and tensors."""
    import numpy
    import torch

    state: Any = numpy.random.get_state()
    name, keys, *rest = state
    return {
        "python": random.getstate(),
        "numpy": (str(name), torch.from_numpy(keys.astype("int64")), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Go on drawing where `random_state` was called."""
    import numpy
    import torch

    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    numpy.random.set_state((name, keys.numpy().astype("uint32"), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
