#!/usr/bin/env python3
"""Copy the train splits of a small corpus at other speeds: a projector that hears few recordings learns them by heart.

    python recipes/Demo/perturb.py CORPUS OUT [--speeds 0.85,0.92,1.08,1.15] [--max_hours 4]

CORPUS is in LibriSpeech layout; OUT/LibriSpeech/train-speed-085/... gets a split for each speed (pitch changes along).
Running it again is a no-op while the corpus is as it was.
"""

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from recipes.Demo.corpus import Corpus, load_corpus, read_audio
from speechllm_prune.experiment import SCHEMA, read_json, sha256_file, sha256_json, write_json
from speechllm_prune.runtime import UserError, raise_if_stopped, verb

SAMPLE_RATE = 16000
SPEEDS = "0.85,0.92,1.08,1.15"


def perturb(corpus: Corpus, out: Path, percents: list[int], max_hours: float) -> int:
    """Write the copies. Returns the number of utterances written, 0 if they are there already.

    Arguments
    ---------
    corpus : Corpus
        Its train splits are copied.
    out : Path
        Folder to write; it appears whole or not at all.
    percents : list of int
        Speeds in percent of the original.
    max_hours : float
        The copies of one speed stop where this much of the original has been copied.
    """
    train = {name: sha256_file(path) for name, (path, _) in corpus.train.items()}
    identity = sha256_json([SCHEMA, percents, max_hours, train])
    record = out / "perturb.json"
    if record.is_file() and read_json(record).get("identity") == identity:
        return 0
    out.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        written = sum(_copy(corpus, building, percent, max_hours) for percent in percents)
        write_json(building / "perturb.json", {"schema": SCHEMA, "identity": identity})
        shutil.rmtree(out, ignore_errors=True)
        building.chmod(0o755)
        os.rename(building, out)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return written


def _copy(corpus: Corpus, out: Path, percent: int, max_hours: float) -> int:
    """One speed."""
    import soundfile
    import torch
    from torchaudio.functional import resample

    seconds, written = 0.0, 0
    for name, (path, text) in corpus.train.items():
        raise_if_stopped()
        samples = torch.from_numpy(read_audio(path, SAMPLE_RATE))
        seconds += len(samples) / SAMPLE_RATE
        if seconds > 3600 * max_hours:
            break
        folder = out / "LibriSpeech" / f"train-speed-{percent:03d}" / "/".join(path.parts[-3:-1])
        folder.mkdir(parents=True, exist_ok=True)
        copy = f"{name}-speed{percent:03d}"
        faster = resample(samples, percent * SAMPLE_RATE // 100, SAMPLE_RATE)
        soundfile.write(folder / f"{copy}.flac", faster.numpy(), SAMPLE_RATE)
        with open(
            folder / f"{'-'.join(path.parts[-3:-1])}.trans.txt", "a", encoding="utf-8"
        ) as lines:
            lines.write(f"{copy} {text.upper()}\n")
        written += 1
    return written


@verb
def main(argv: list[str]) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("corpus", help="folder in LibriSpeech layout, or its parent")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--speeds", default=SPEEDS, help=f"factors (default: {SPEEDS})")
    parser.add_argument("--max_hours", type=float, default=4.0, help="of the original (default: 4)")
    arguments = parser.parse_args(argv)
    try:
        percents = sorted({round(100 * float(speed)) for speed in arguments.speeds.split(",")})
    except ValueError:
        raise UserError(
            f"--speeds {arguments.speeds!r} is no list of numbers such as {SPEEDS}"
        ) from None
    if not all(50 <= percent <= 200 and percent != 100 for percent in percents):
        raise UserError(f"--speeds {arguments.speeds!r}: give factors from 0.5 to 2, and not 1")
    written = perturb(load_corpus(arguments.corpus), arguments.out, percents, arguments.max_hours)
    print(f"{arguments.out}: {f'{written} utterances' if written else 'is already there'}")


if __name__ == "__main__":
    sys.exit(main())
