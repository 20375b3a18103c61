"""Access tokens must not reach a file: what looks like one is refused in a YAML and on a command line, and is blanked
out of messages and logs. No heavy import here."""

from __future__ import annotations

import logging
import os
import re

BLANK = "[redacted]"

_SHAPES = re.compile(
    r"\b(?:hf|api_org)_[A-Za-z0-9]{16,}"  # Hugging Face
    r"|\b(?:ghp|gho|ghs|github_pat)_\w{20,}"
    r"|\bsk-[\w-]{20,}"
    r"|\bAKIA[A-Z0-9]{16}\b"
    r"|(?<=://)[^\s/@:]*:[^\s@\"'<>]+(?=@)"  # user:password@host; a password may hold a slash
    r"|(?:(?<=http://)|(?<=https://))[^\s/@:]+(?=@)"  # token@host; ssh://git@host has none
)
_NAMES = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY", re.IGNORECASE)


def _known() -> list[str]:
    """Values of the environment's own secrets, longest first; short ones would blank ordinary words."""
    values = {
        value
        for name, value in os.environ.items()
        if _NAMES.search(name) and len(value) >= 12 and not value.startswith("/")  # a path is none
    }
    return sorted(values, key=len, reverse=True)


def redact(text: str) -> str:
    """The text without anything that looks like a token or is a secret of the environment.

    Example
    -------
    >>> redact("--prompt hf_" + "a" * 34)
    '--prompt [redacted]'
    >>> redact("https://me:word@host/x")
    'https://[redacted]@host/x'
    >>> redact("https://me:wo/rd@host/x https://0a1b2c@host/x ssh://git@host/x")
    'https://[redacted]@host/x https://[redacted]@host/x ssh://git@host/x'
    """
    for value in _known():
        text = text.replace(value, BLANK)
    return _SHAPES.sub(BLANK, text)


def holds_secret(text: str) -> bool:
    """Whether `redact` would change the text."""
    return redact(text) != text


class RedactingFilter(logging.Filter):
    """Blanks secrets out of the records of a log."""

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if holds_secret(message):
            record.msg, record.args = redact(message), None
        return True
