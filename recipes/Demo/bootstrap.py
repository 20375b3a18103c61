#!/usr/bin/env python3
"""Make the stand-ins for pretrained models that a corpus is studied with where nothing can be downloaded.

    python recipes/Demo/bootstrap.py encoder --corpus FOLDER --stand_ins results/stand_ins/demo
    python recipes/Demo/bootstrap.py decoder --corpus FOLDER --stand_ins results/stand_ins/demo [--family llama]
    python recipes/Demo/bootstrap.py encoder --corpus AST_FOLDER --language fr --stand_ins results/stand_ins/demo_ast

writes STAND_INS/encoder, or STAND_INS/decoder and STAND_INS/decoder_random (same configuration and tokenizer, weights
untrained), each a folder as from the hub plus bootstrap.json. The two commands may run side by side. Only the train
splits are learned from. A model that was made from the same files and settings is kept; --fresh makes it again.
AST_FOLDER is a folder of synthesise_ast.py: its decoder transcribes English and translates En-De and Fr-En.
"""

import argparse
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from recipes.Demo.corpus import Corpus, load_corpus
from recipes.Demo.corpus_ast import ParallelText, is_translation_corpus, load_speech, load_text
from speechllm_prune.experiment import (
    PACKAGE_VERSION,
    SCHEMA,
    git_commit,
    read_json,
    sha256_file,
    sha256_json,
    write_json,
)
from speechllm_prune.runtime import verb

NOTE = (
    "a pretrained stand-in: a tiny model trained on the spot in the place of a large pretrained one"
)


def identity(corpus: Corpus | ParallelText, settings: dict) -> str:
    """Hash of all that decides the weights: the settings and the content of the corpus files."""
    files = {
        str(path.relative_to(corpus.root.parent)): sha256_file(path) for path in corpus.files()
    }
    return sha256_json({"settings": settings, "files": files})


def is_current(folders: list[Path], config_hash: str) -> bool:
    """Whether all folders hold a finished model of this identity."""
    records = [folder / "bootstrap.json" for folder in folders]
    return all(
        record.is_file() and read_json(record).get("config_hash") == config_hash
        for record in records
    )


def install(built: Path, target: Path, record: dict) -> None:
    """Put a finished model in its place: the folder appears whole, under its final name, or not at all."""
    write_json(built / "bootstrap.json", record)
    if target.exists():
        shutil.rmtree(target)
    os.rename(built, target)


def bootstrap(
    model: str, corpus: Corpus | ParallelText, stand_ins: Path, settings: dict, fresh: bool
) -> bool:
    """Make one of the two stand-ins unless it is there.

    Arguments
    ---------
    model : str
        ``encoder`` or ``decoder``.
    corpus : Corpus or ParallelText
        Where to learn from; parallel text makes a decoder that translates.
    stand_ins : Path
        Folder of the stand-ins.
    settings : dict
        Settings of the model.
    fresh : bool
        Make it even if it is there.

    Returns
    -------
    bool
        Whether it was made.
    """
    targets = {"trained": stand_ins / model}
    if model == "decoder":
        targets["random"] = stand_ins / "decoder_random"
    config_hash = identity(corpus, settings)
    if not fresh and is_current(list(targets.values()), config_hash):
        return False
    stand_ins.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{model}-", dir=stand_ins) as building:
        figures = _trainer(model, corpus)(corpus, settings, Path(building))
        for kind, target in targets.items():
            record = {
                "schema": SCHEMA,
                "package_version": PACKAGE_VERSION,
                "git_commit": git_commit(),
                "config_hash": config_hash,
                "note": NOTE if kind == "trained" else "untrained weights, for comparison",
                "corpus_splits": corpus.splits,
                "settings": settings,
            }
            install(Path(building, kind), target, record | (figures if kind == "trained" else {}))
    return True


def _trainer(model: str, corpus: Corpus | ParallelText) -> Callable[..., dict]:
    """The training function; imported late, since it needs torch."""
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    # transformers' WavLM gives torch a boolean mask beside a float position bias; torch warns at every start.
    warnings.filterwarnings("ignore", message="Support for mismatched key_padding_mask")
    torch.set_num_threads(1)  # encoder and decoder are made side by side, one core each
    if model == "encoder":
        from recipes.Demo.stand_in_encoder import train_encoder

        return train_encoder
    if isinstance(corpus, ParallelText):
        from recipes.Demo.stand_in_translator import train_translator

        return train_translator
    from recipes.Demo.stand_in_decoder import train_decoder

    return train_decoder


def parse(argv: list[str]) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("model", choices=["encoder", "decoder"], help="which one to make")
    parser.add_argument(
        "--corpus", required=True, help="folder in LibriSpeech layout or its parent, or AST_FOLDER"
    )
    parser.add_argument("--language", help="of the speech in AST_FOLDER that the encoder learns")
    parser.add_argument("--stand_ins", required=True, type=Path, help="folder to put the models in")
    parser.add_argument(
        "--family", choices=["qwen2", "llama"], default="qwen2", help="of the decoder"
    )
    parser.add_argument(
        "--labels",
        choices=["frames", "ctc"],
        help="what the encoder learns; default: frames if the corpus has frame_labels.jsonl, else ctc",
    )
    parser.add_argument("--prompt", default="Transcribe speech to text.", help="as in the YAML")
    parser.add_argument("--seed", type=int, default=3407, help="seed of the weights and batches")
    parser.add_argument("--fresh", action="store_true", help="make it again")
    return parser.parse_args(argv)


def plan(arguments: argparse.Namespace) -> tuple[Corpus | ParallelText, dict]:
    """What to learn from, and the settings."""
    translating = is_translation_corpus(arguments.corpus)
    if arguments.model == "encoder":
        from recipes.Demo.stand_in_encoder import encoder_settings

        if translating:
            speech: Corpus = load_speech(arguments.corpus, arguments.language or "")
        else:
            speech = load_corpus(arguments.corpus)
        default = "frames" if speech.labels_file else "ctc"
        return speech, encoder_settings(arguments.labels or default, arguments.seed)
    if translating:
        from recipes.Demo.stand_in_translator import translator_settings

        return load_text(arguments.corpus), translator_settings(arguments.family, arguments.seed)
    from recipes.Demo.stand_in_decoder import decoder_settings

    corpus = load_corpus(arguments.corpus)
    return corpus, decoder_settings(corpus, arguments.family, arguments.prompt, arguments.seed)


@verb
def main(argv: list[str]) -> None:
    """Command line."""
    arguments = parse(argv)
    corpus, settings = plan(arguments)
    made = bootstrap(arguments.model, corpus, arguments.stand_ins, settings, arguments.fresh)
    record = read_json(arguments.stand_ins / arguments.model / "bootstrap.json")
    figures = {key: value for key, value in record.items() if key.startswith("held_out")}
    state = f"made in {record['seconds']:.0f} s" if made else "is already there"
    print(f"{arguments.stand_ins / arguments.model} {state}; {figures}")


if __name__ == "__main__":
    sys.exit(main())
