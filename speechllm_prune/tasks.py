"""What differs between the tasks: the metric, its direction, and how much degradation is accepted. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Task:
    """A speech task.

    Arguments
    ---------
    name : str
        asr | ast.
    metric : str
        wer | bleu.
    tolerance : float
        Accepted relative degradation (paper, section 4).
    """

    name: str
    metric: str
    tolerance: float

    @property
    def higher_is_better(self) -> bool:
        """Direction of the metric."""
        return self.metric == "bleu"


TASKS = {"asr": Task("asr", "wer", 0.25), "ast": Task("ast", "bleu", 0.10)}


@dataclass
class Score:
    """Score of a set of hypotheses.

    Arguments
    ---------
    value : float
        Percent.
    facts : dict
        Fields of metrics.json beside the value.
    rows : list of dict
        Error counts of each hypothesis (empty dicts for BLEU, which is no mean over rows).
    report : str
        For people: the alignment, or the score line.
    """

    value: float
    facts: dict[str, Any]
    rows: list[dict[str, int]]
    report: str


def score(
    task: Task,
    ids: Sequence[str],
    refs: Sequence[str],
    hyps: Sequence[str],
    target_language: str = "en",
) -> Score:
    """Score raw hypotheses by the task's metric."""
    from speechllm_prune.evaluation.scoring import score_bleu, score_wer

    if task.metric == "wer":
        wer = score_wer(ids, refs, hyps)
        facts = asdict(wer.total) | {"text_normaliser": wer.text_normaliser}
        return Score(wer.wer, facts, [asdict(row) for row in wer.rows], wer.alignment)
    bleu = score_bleu(refs, hyps, target_language)
    return Score(
        bleu.bleu,
        {"signature": bleu.signature},
        [{} for _ in refs],
        f"BLEU {bleu.bleu:.2f} {bleu.signature}\n",
    )
