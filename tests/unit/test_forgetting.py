"""What pruning forgets, and the worst utterances, against counts made by hand or another way."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from speechllm_prune.evaluation.scoring import score_bleu, score_wer
from speechllm_prune.experiment import sha256_file
from speechllm_prune.reporting import forgetting
from speechllm_prune.reporting.analysis import analyse
from speechllm_prune.reporting.collect import collect, read_point
from speechllm_prune.reporting.forgetting import Group, groups_of, what_pruning_forgets
from speechllm_prune.reporting.utterances import align_point, repeats, worst_utterances
from tests.unit import fake_results as fake

TRAINING = ["THE RED HOUSE"] * 12 + ["IT'S THE BOAT"] * 3 + ["SEVEN BOATS"]


def write_hyps(
    seed_folder: Path, variant: str, rows: list[tuple[str, str, float, bool]], task: str = "asr"
) -> Path:
    """A point with the given (reference, hypothesis, seconds, capped), scored as evaluate does."""
    ids = [f"u{index}" for index in range(len(rows))]
    refs, hyps = [row[0] for row in rows], [row[1] for row in rows]
    if task == "asr":
        wer = score_wer(ids, refs, hyps)
        counts = [vars(row) for row in wer.rows]
        facts = {"value": wer.wer, **vars(wer.total)}
    else:
        bleu = score_bleu(refs, hyps)
        counts = [{} for _ in rows]
        facts = {"value": bleu.bleu, "signature": bleu.signature, "metric": "bleu", "task": "ast"}
    folder = fake.write_point(
        seed_folder, variant, "librispeech", "test-clean", [0] * len(rows), **facts
    )
    lines = [
        {"id": i, "ref": ref, "hyp": hyp, "duration": seconds, "num_tokens": 9, "capped": capped}
        | count
        for i, (ref, hyp, seconds, capped), count in zip(ids, rows, counts, strict=True)
    ]
    (folder / "hyps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def write_training(seed_folder: Path, texts: list[str]) -> Path:
    """A training manifest, and a train stage that names it."""
    manifest = seed_folder.parents[1] / "manifests/librispeech/train.csv"
    manifest.parent.mkdir(parents=True, exist_ok=True)
    rows = "".join(f"t{i},1.0,t{i}.flac,{text}\n" for i, text in enumerate(texts))
    manifest.write_text("ID,duration,wav,text\n" + rows)
    train = seed_folder / "train"
    inputs = {"../../manifests/librispeech/train.csv": sha256_file(manifest)}
    fake.write(train / "DONE.json", fake.COMMON | {"inputs": inputs})
    (train / "hyperparams.yaml").write_text("train_manifests: [librispeech/train]\n")
    return manifest


def by_label(groups: list[Group]) -> dict[str, tuple[int, float]]:
    """{label: (size, value rounded)}"""
    return {group.label: (group.size, round(group.value, 2)) for group in groups}


@pytest.fixture
def seed_folder(tmp_path: Path) -> Path:
    return tmp_path / "results" / "tiny" / "1"


@pytest.fixture
def pruned(seed_folder: Path) -> Path:
    """A pruned and an unpruned point on the path, with a training text."""
    write_training(seed_folder, TRAINING)
    fake.write_measurement(seed_folder, "speech", fake.distance_matrix(4))
    fine = [
        ("THE RED HOUSE", "the red house", 1.0, False),
        ("THE BOAT", "the boat", 2.0, False),
        ("SEVEN GREEN BOATS", "seven green boats", 3.0, False),
        ("THE HOUSE", "the house", 4.0, False),
    ]
    write_hyps(seed_folder, "full", fine)
    path = json.loads((seed_folder / "measure/speech/path.json").read_text())["path"]
    worse = [
        ("THE RED HOUSE", "the red mouse", 1.0, False),  # a frequent word substituted
        ("THE BOAT", "the boat", 2.0, False),
        ("SEVEN GREEN BOATS", "six boats", 3.0, False),  # a number wrong, an unseen word lost
        ("THE HOUSE", "the house the house the house", 4.0, True),  # a loop: four insertions
    ]
    return write_hyps(seed_folder, f"l{path['2']:02d}n02-joint", worse)


def test_groups_of_words_and_utterances_by_hand(pruned, seed_folder):
    experiment = collect(seed_folder)
    training = forgetting.training_words(experiment)
    assert (training["the"], training["house"], training["is"], training["7"]) == (15, 12, 3, 1)
    point = next(point for point in experiment.points if point.is_pruned)
    assert by_label(groups_of(align_point(point), training)) == {
        "WER %, all": (4, 70.0),
        "WER %, words not in the training text": (1, 100.0),  # green
        "WER %, words seen 1 to 9 times": (2, 0.0),  # boat, boats
        "WER %, words seen 10 to 99 times": (
            6,
            83.33,
        ),  # house wrong once, `the` and `house` inserted twice
        "WER %, numbers": (1, 100.0),
        "WER %, 1.0 to 1.0 s long": (1, 33.33),
        "WER %, 2.0 to 2.0 s long": (1, 0.0),
        "WER %, 3.0 to 3.0 s long": (1, 66.67),
        "WER %, 4.0 to 4.0 s long": (1, 200.0),
        "% of words substituted": (10, 20.0),
        "% of words deleted": (10, 10.0),
        "% of words inserted": (10, 40.0),
        "% of utterances with a repetition loop": (4, 25.0),
        "% of utterances cut off at the token limit": (4, 25.0),
    }


def test_a_table_per_set_and_healing_with_a_column_per_depth(pruned, seed_folder):
    experiment = collect(seed_folder)
    found = what_pruning_forgets(experiment, analyse(experiment))
    assert found.problems == []
    (table,) = found.tables
    assert table.title == "tiny (seed 1), librispeech-test-clean, joint healing"
    assert table.columns == ["group", "size", "unpruned", "n = 2"]
    assert table.notes == [fake.NOTE]
    row = next(row for row in table.rows if row[0] == "WER %, numbers")
    assert row[1:] == ["1 words", "0.00 [0.00, 0.00]", "100.00 [100.00, 100.00]"]
    record = next(r for r in table.records if r["group"] == row[0] and r["block_size"] == 2)
    assert (record["value"], record["size"], record["unit"]) == (100.0, 1, "words")
    full, cut = found.worst
    assert full.utterances == []
    assert [(u.id, told) for u, told in cut.utterances] == [
        (
            "u3",
            "4 errors in 2 words; unpruned: 0 errors; repetition loop; cut off at the token limit",
        ),
        ("u2", "2 errors in 3 words; unpruned: 0 errors"),
        ("u0", "1 errors in 3 words; unpruned: 0 errors"),
    ]


def test_groups_add_up_to_the_wer(seed_folder):
    generator = random.Random(0)
    words = "THE A HOUSE RED BOAT SEVEN TWENTY IT'S COLOUR MR XYLOPHONE RUNNING 42 DON'T".split()

    def text() -> str:
        return " ".join(generator.choices(words, k=generator.randint(1, 12)))

    rows = [(text(), text().lower(), generator.random() * 9, False) for _ in range(60)]
    folder = write_hyps(seed_folder, "full", rows)
    point = read_point(folder, "tiny", "1")
    groups = groups_of(align_point(point), {"the": 5000, "house": 500, "red": 50, "boat": 5})
    of_words = [g for g in groups if g.label.startswith("WER") and g.unit == "words"]
    of_lengths = [g for g in groups if g.label.endswith("long")]
    kinds = [g for g in groups if g.label.startswith("% of words")]
    assert len(of_words) == 6 and len(of_lengths) == 4
    errors = sum(point.record[key] for key in ("substitutions", "deletions", "insertions"))
    for parts in (of_words, of_lengths):
        sums = sum(group.counts.sum(axis=0) for group in parts)
        assert sums.tolist() == [errors, point.record["reference_words"]]
    assert sum(group.counts[:, 0].sum() for group in kinds) == errors
    assert sum(group.size for group in of_lengths) == 60


def test_translations_have_missing_words_and_bleu_by_length(seed_folder):
    rows = [
        ("Das alte Haus ist rot.", "Rot ist das alte Haus.", 1.0, False),  # all there, other order
        ("Das Boot ist alt.", "Das Haus.", 2.0, False),
    ]
    point = read_point(write_hyps(seed_folder, "full", rows, "ast"), "tiny", "1")
    found = by_label(groups_of(align_point(point), {"das": 20, "haus": 3}))
    assert found["% missing, words seen 10 to 99 times"] == (2, 0.0)
    assert found["% missing, words seen 1 to 9 times"] == (1, 0.0)
    assert found["% missing, words not in the training text"] == (6, 50.0)
    assert found["length, % of the reference"] == (9, 77.78)
    assert found["BLEU, all"][1] == round(point.value, 2)
    alone = score_bleu([rows[0][0]], [rows[0][1]]).bleu
    assert found["BLEU, 1.0 to 1.0 s long"] == (1, round(alone, 2))
    assert not any(label.startswith("WER") for label in found)
    worst = worst_utterances(align_point(point), None)
    assert [u.id for u, _ in worst.utterances] == ["u1", "u0"]


def test_what_cannot_be_said_is_told_and_the_rest_stays(pruned, seed_folder):
    manifest = seed_folder.parents[1] / "manifests/librispeech/train.csv"
    manifest.write_text(manifest.read_text() + "t99,1.0,t99.flac,MORE\n")
    lines = [json.loads(line) for line in (pruned / "hyps.jsonl").read_text().splitlines()]
    lines[0]["hyp"], lines[1]["hyp"] = "red", "boat"  # not what its counts were made of
    experiment = collect(seed_folder)
    found = what_pruning_forgets(experiment, analyse(experiment))
    assert "has changed since the training" in found.problems[0]
    labels = [row[0] for row in found.tables[0].rows]
    assert "WER %, words other than numbers" in labels and "WER %, numbers" in labels
    (pruned / "hyps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = what_pruning_forgets(experiment, analyse(experiment))
    assert "aligned again" in found.problems[1]
    assert found.tables == []
    manifest.unlink()
    found = what_pruning_forgets(experiment, analyse(experiment))
    assert "is not there" in found.problems[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", 1),
        ("a", 1),
        ("a a", 2),
        ("a b a b a b a", 3),
        ("b a a a a c", 4),
        ("a b c d e f g h a b c d e f g h a b c d e f g h", 3),
        ("the cat and the dog and the cat", 1),
    ],
)
def test_repeats(text, expected):
    assert repeats(text.split()) == expected
