"""What a user means by AUDIO: files, folders of files, lists of files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from speechllm_prune.runtime import UserError

AUDIO_SUFFIXES = frozenset(".wav .flac .mp3 .ogg .opus .aif .aiff .aifc .au .w64 .caf".split())
LIST_SUFFIXES = frozenset(".txt .lst .list".split())


def expand_audio(names: Iterable[str]) -> list[str]:
    """Audio files in the order given: a folder stands for the audio files in and below it, sorted; a list
    (`.txt`, `.lst`, `.list`) for its lines, relative to the folder of the list, without empty ones and `#` comments.

    Raises
    ------
    UserError
        Naming what does not exist or is empty.

    Example
    -------
    >>> expand_audio(["nowhere.flac"])
    Traceback (most recent call last):
    speechllm_prune.runtime.UserError: no such file: nowhere.flac
    """
    files: list[str] = []
    missing: list[str] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            found = sorted(
                str(file)
                for file in path.rglob("*")
                if file.is_file() and file.suffix.lower() in AUDIO_SUFFIXES
            )
        elif path.is_file() and path.suffix.lower() in LIST_SUFFIXES:
            found = _read_list(path)
        else:
            found = [name]
        if not found:
            raise UserError(
                f"{name} names no audio file (known endings: {' '.join(sorted(AUDIO_SUFFIXES))})"
            )
        missing += [file for file in found if not Path(file).is_file()]
        files += found
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(f"no such file: {', '.join(missing[:3])}{more}")
    return files


def _read_list(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path} is no list of audio files (it is not UTF-8 text)") from None
    names = [line.strip() for line in lines]
    return [str(path.parent / name) for name in names if name and not name.startswith("#")]
