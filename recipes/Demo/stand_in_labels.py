"""Targets and objectives of the stand-in encoder: frame labels of synthetic speech, or CTC on transcripts."""

import numpy
import torch
from torch import Tensor, nn

from recipes.Demo.corpus import Corpus
from speechllm_prune.models.projector import stack_frames

FRAME_SECONDS = 0.02
_FRAME_CENTRE = 0.0125
_IGNORED = -100
_MAX_WORD_UNITS = 100
_WORD_STACK = 5


class FrameObjective(nn.Module):
    """Cross-entropy on the phoneme and the word that eSpeak says it was speaking in each frame.

    Arguments
    ---------
    corpus : Corpus
        Must have timed labels.
    width : int
        Width of an encoder frame.
    """

    name = "frames"

    def __init__(self, corpus: Corpus, width: int) -> None:
        super().__init__()
        self.events = corpus.labels()
        self.classes = {}
        for kind, silence in (("phonemes", "_"), ("words", "")):
            names = {name for row in self.events.values() for name, _ in row[kind]} - {silence}
            self.classes[kind] = {name: i for i, name in enumerate([silence, *sorted(names)])}
        self.heads = nn.ModuleDict(
            {kind: nn.Linear(width, len(names)) for kind, names in self.classes.items()}
        )

    def labels(self, uttid: str, frames: int, speed: float) -> dict[str, numpy.ndarray]:
        """Class of every frame; `speed` is the factor by which the audio was sped up."""
        times = (numpy.arange(frames) * FRAME_SECONDS + _FRAME_CENTRE) * speed
        tracks = {}
        for kind, names in self.classes.items():
            events = self.events[uttid][kind]
            current = numpy.searchsorted([start for _, start in events], times, side="right") - 1
            classes = numpy.array([names[name] for name, _ in events])
            tracks[kind] = numpy.where(current >= 0, classes[current], 0)
        tracks["words"][tracks["phonemes"] == 0] = 0  # the last word ends where silence begins
        return tracks

    def forward(
        self, features: Tensor, lengths: list[int], uttids: list[str], speed: float
    ) -> tuple[Tensor, dict[str, float]]:
        """Loss, and the share of right frames of each kind.

        Arguments
        ---------
        features : Tensor
            (B, T, D) encoder frames.
        lengths : list of int
            True number of frames.
        uttids : list of str
            Utterance ids.
        speed : float
            Speed factor of the batch.
        """
        targets = {kind: torch.full(features.shape[:2], _IGNORED) for kind in self.classes}
        for row, (uttid, length) in enumerate(zip(uttids, lengths, strict=True)):
            for kind, track in self.labels(uttid, length, speed).items():
                targets[kind][row, :length] = torch.from_numpy(track)
        loss, figures = features.new_zeros(()), {}
        for kind, target in targets.items():
            logits = self.heads[kind](features).transpose(1, 2)  # (B, C, T)
            loss = loss + nn.functional.cross_entropy(logits, target, ignore_index=_IGNORED)
            right = (logits.argmax(1) == target).sum() / (target != _IGNORED).sum()
            figures[f"{kind}_frame_accuracy"] = right.item()
        return loss, figures


class CtcObjective(nn.Module):
    """CTC on the transcripts: on words where there are few, else on characters.

    Words are read off stacks of frames, as the projector reads them: CTC finds a word among 10 vectors a second much
    sooner than among 50, nearly all of which would have to be blank.

    Arguments
    ---------
    corpus : Corpus
        Gives the train transcripts.
    width : int
        Width of an encoder frame.
    """

    name = "ctc"

    def __init__(self, corpus: Corpus, width: int) -> None:
        super().__init__()
        by_words = len(corpus.words) <= _MAX_WORD_UNITS
        self.unit = "words" if by_words else "characters"
        self.texts = {
            uttid: text.split() if by_words else list(text)
            for uttid, (_, text) in corpus.train.items()
        }
        units = sorted({unit for text in self.texts.values() for unit in text})
        self.ids = {unit: i for i, unit in enumerate(units, start=1)}  # 0 is the blank
        self.stack = _WORD_STACK if by_words else 1
        self.head = nn.Linear(width * self.stack, len(units) + 1)

    def forward(
        self, features: Tensor, lengths: list[int], uttids: list[str], speed: float | list[float]
    ) -> tuple[Tensor, dict[str, float]]:
        """Loss per unit, and the share of utterances that best-path decoding gets right."""
        targets = [[self.ids[unit] for unit in self.texts[uttid]] for uttid in uttids]
        total = sum(map(len, targets))
        stacks, counts = stack_frames(features, lengths, self.stack)
        log_probs = self.head(stacks).log_softmax(-1)
        loss = nn.functional.ctc_loss(
            log_probs.transpose(0, 1),
            torch.tensor([unit for target in targets for unit in target]),
            torch.tensor(counts),
            torch.tensor([len(target) for target in targets]),
            reduction="sum",
            zero_infinity=True,
        )
        paths = log_probs.argmax(-1)
        collapsed = [
            [unit for unit in path[:n].unique_consecutive().tolist() if unit]
            for path, n in zip(paths, counts, strict=True)
        ]
        right = sum(a == b for a, b in zip(collapsed, targets, strict=True))
        return loss / total, {f"{self.unit}_exact_match": right / len(targets)}
