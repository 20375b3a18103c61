"""Train the stand-in for a pretrained LLM that translates: one tiny decoder for English ASR, En-De and Fr-En.

As the decoder of the English demo (`stand_in_decoder.py`), it learns from text alone to read stretched, noisy words
before a prompt. Here the prompt says what to write: the same English words, or their translation.
"""

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from recipes.Demo import parallel
from recipes.Demo.corpus_ast import ParallelText
from recipes.Demo.stand_in_decoder import SENTENCES, Batches, build_decoder, exact_match, optimise
from recipes.Demo.stand_in_decoder import SETTINGS as COPYING
from recipes.Demo.stand_in_text import SlamText, train_tokenizer
from speechllm_prune.runtime import derive_seed

# name: language of the speech, language of the text, prompt as in the YAML, share of the examples.
TASKS = {
    "asr_en": ("en", "en", "Transcribe speech to text.", 0.3),
    "ast_en_de": ("en", "de", "Translate English speech to German text.", 0.35),
    "ast_fr_en": ("fr", "en", "Translate French speech to English text.", 0.35),
}
SETTINGS = (
    COPYING
    | SENTENCES
    | {
        "version": 1,  # raise it when the code below changes what is trained
        "tasks": TASKS,
        "steps": 450,
        "batch_size": 48,
        "plain_share": 0.05,
        "max_words": 0,
    }
)


class Example(NamedTuple):
    """What is heard and what is to be written, under a task's prompt."""

    task: str
    source: str
    target: str


def translator_settings(family: str, seed: int) -> dict:
    """Everything that decides the weights, apart from the text."""
    return SETTINGS | {"family": family, "seed": seed}


def example_of(row: dict[str, str], task: str, tasks: dict = TASKS) -> Example:
    """A row of parallel text under a task. A transcript is written as it is spoken, a translation with case.

    Example
    -------
    >>> example_of({"en": "Sell two tables.", "de": "Verkauf zwei Tische."}, "ast_en_de")
    Example(task='ast_en_de', source='sell two tables', target='Verkauf zwei Tische.')
    """
    source, target, _, _ = tasks[task]
    heard = parallel.spoken(row[source])
    return Example(task, heard, heard if source == target else row[target])


class TaskText:
    """Turns an example into ids and labels: one SLAM layout per prompt.

    Arguments
    ---------
    tokenizer : PreTrainedTokenizer
        The decoder's tokenizer.
    settings : dict
        Of :func:`translator_settings`.
    """

    def __init__(self, tokenizer, settings: dict) -> None:
        options = (
            settings["stretch"],
            settings["pause"],
            settings["plain_share"],
            settings["max_pauses"],
        )
        self.layouts = {
            name: SlamText(tokenizer, prompt, *options)
            for name, (_, _, prompt, _) in settings["tasks"].items()
        }

    def __call__(
        self, example: Example, rng: random.Random, plain: bool | None = None
    ) -> tuple[list[int], list[int], int]:
        """Input ids, labels and the number of leading positions that stand for speech (see `SlamText`)."""
        layout = self.layouts[example.task]
        return layout(example.target, rng, plain, source=example.source)


def source_of(
    rows: list[dict[str, str]], tasks: dict, forbidden: frozenset[str] = frozenset()
) -> Callable[[random.Random], Example]:
    """A function that draws one example: a task by its share, then a row.

    Arguments
    ---------
    rows : list of dict
        Parallel text.
    tasks : dict
        Like ``TASKS``.
    forbidden : frozenset of str
        English sentences whose rows may not be drawn.
    """
    allowed = [row for row in rows if row["en"] not in forbidden]
    names, shares = list(tasks), [task[3] for task in tasks.values()]

    def draw(rng: random.Random) -> Example:
        (task,) = rng.choices(names, shares)
        return example_of(rng.choice(allowed), task, tasks)

    return draw


def make_tokenizer(rows: list[dict[str, str]], settings: dict):
    """A tokenizer with one token for each written or spoken word of the three languages, as far as words go."""
    forms: set[str] = set()
    for row in rows:
        for sentence in row.values():
            forms.update(sentence.rstrip(".").split(), parallel.spoken(sentence).split())
    prompts = " ".join(prompt for _, _, prompt, _ in settings["tasks"].values())
    return train_tokenizer(sorted(forms), prompts, settings["family"], settings["vocab_size"])


def train_translator(text: ParallelText, settings: dict, folder: Path) -> dict:
    """Train the decoder and save it, with its tokenizer, as a checkpoint of the hub would be.

    Arguments
    ---------
    text : ParallelText
        Gives the text; evaluation sentences are excluded.
    settings : dict
        Of :func:`translator_settings`.
    folder : Path
        Where to save: ``trained`` and ``random`` below it.

    Returns
    -------
    dict
        Figures for bootstrap.json.
    """
    torch.manual_seed(derive_seed(settings["seed"], "stand-in translator"))
    tokenizer = make_tokenizer(text.sentences, settings)
    layout = TaskText(tokenizer, settings)
    held_rng = random.Random(derive_seed(settings["seed"], "held-out parallel text"))
    held_out = held_rng.sample(text.sentences, min(settings["held_out"], len(text.sentences) // 2))
    forbidden = frozenset(row["en"] for row in held_out)
    draw = source_of(text.sentences, settings["tasks"], forbidden)
    model = build_decoder(settings, tokenizer)
    model.save_pretrained(folder / "random")
    tokenizer.save_pretrained(folder / "random")
    seed = derive_seed(settings["seed"], "translator text")
    started = time.monotonic()
    last_loss = optimise(model, Batches(draw, layout, settings["batch_size"], seed), settings)
    figures = {}
    for task in settings["tasks"]:
        examples = [example_of(row, task, settings["tasks"]) for row in held_out]
        laid_out = [layout(example, held_rng, plain=False) for example in examples]
        share = exact_match(model, laid_out, settings["embedding_noise"])
        figures[f"held_out_exact_match_{task}"] = share
    figures |= {
        "held_out_texts": len(held_out),
        "last_loss": round(last_loss, 4),
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocabulary": len(tokenizer),
        "seconds": round(time.monotonic() - started, 1),
        "text": "lm_parallel.tsv",
    }
    model.save_pretrained(folder / "trained")
    tokenizer.save_pretrained(folder / "trained")
    return figures
