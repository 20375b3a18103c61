"""The paper's own numbers through our functions, and that a changed cell changes a verdict."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest

from speechllm_prune.reporting.paper import (
    TABLE1,
    TABLE2,
    System,
    paper_claims,
    removed_layers,
    render_claims,
    system_of,
    tier_gaps,
)


def find(claims: list[dict], *parts: str) -> dict:
    """The one claim whose text holds all parts."""
    found = [claim for claim in claims if all(part in claim["claim"] for part in parts)]
    assert len(found) == 1, (parts, found)
    return found[0]


def test_kept_shares():
    claims = paper_claims()
    shares = {
        claim["printed"]: (claim["computed"], claim["verdict"])
        for claim in claims
        if "kept share" in claim["claim"]
    }
    assert shares == {
        63.8: (63.8, "agrees"),
        65.05: (65.05, "agrees"),
        86.5: (84.35, "disagrees"),
    }


def test_every_printed_percentage_is_a_whole_number_of_layers():
    claims = [claim for claim in paper_claims() if "% drop is n/L" in claim["claim"]]
    assert len(claims) == 7 + 4
    assert {claim["verdict"] for claim in claims} == {"agrees"}
    assert [removed_layers(s.drop, s.num_layers) for s in TABLE1] == [8, 5, 11, 7, 14, 11, 1]


def test_accepted_cells_fit_their_tolerance():
    claims = paper_claims()
    cells = [claim for claim in claims if "relative degradation at most" in claim["claim"]]
    assert len(cells) == 21
    assert {claim["verdict"] for claim in cells} == {"agrees"}
    assert max(claim["computed"] for claim in cells) == pytest.approx(24.85, abs=0.01)
    translations = [claim for claim in claims if "decrease of BLEU" in claim["claim"]]
    assert [claim["computed"] for claim in translations] == pytest.approx([7.456, 8.171], abs=1e-3)
    assert find(claims, "largest tested share")["computed"] == pytest.approx(100 * 9 / 28, abs=1e-3)


def test_adjacent_tier_gaps():
    assert list(tier_gaps().values()) == pytest.approx([52.9, 19.5, 14.5, 30.3], abs=0.05)
    claims = paper_claims()
    assert find(claims, "mean of the gaps")["computed"] == pytest.approx(29.3, abs=0.05)
    assert find(claims, "mean of the gaps")["verdict"] == "disagrees"
    assert find(claims, "median")["computed"] == pytest.approx(24.9, abs=0.05)
    assert find(claims, "summed WER")["computed"] == pytest.approx(14.0, abs=0.05)


def test_six_of_twelve_cells_are_beyond_the_next_smaller_tier():
    claims = [c for c in paper_claims() if "next smaller tier" in c["claim"]]
    cells = [claim for claim in claims if "summed" not in claim["claim"]]
    sums = [claim for claim in claims if "summed" in claim["claim"]]
    assert len(cells) == 12
    assert sum(claim["verdict"] == "disagrees" for claim in cells) == 6
    assert {claim["verdict"] for claim in sums} == {"agrees"}
    # Equal is not beyond: 4.83 against 4.83.
    tie = find(cells, "test-other", "Qwen2.5-7B + Pruning")
    assert (tie["printed"], tie["computed"], tie["verdict"]) == (4.83, 4.83, "agrees")


def test_exchanging_two_cells_of_a_row_changes_verdicts():
    clean, other, loquacious = TABLE1[0].pruned
    changed = (
        dataclasses.replace(TABLE1[0], pruned=(other, clean, loquacious)),
        *TABLE1[1:],
    )
    before = {claim["claim"]: claim["verdict"] for claim in paper_claims()}
    after = {claim["claim"]: claim["verdict"] for claim in paper_claims(changed)}
    turned = [text for text in before if after[text] != before[text]]
    assert any("Qwen2.5-7B + Pruning, LibriSpeech test-clean" in text for text in turned)
    assert any("joint healing, test-clean WER" in text for text in turned)


def with_cells(cells: dict[tuple[int, str, int], float]) -> list[System]:
    """Table 1 with other values in (row, unpruned | pruned, column)."""
    table = list(TABLE1)
    for (row, field, column), value in cells.items():
        values = list(getattr(table[row], field))
        values[column] = value
        table[row] = dataclasses.replace(table[row], **{field: tuple(values)})
    return table


def turned(cells: dict[tuple[int, str, int], float]) -> list[str]:
    """The claims whose verdict changes with the cells."""
    before, after = paper_claims(), paper_claims(with_cells(cells))
    return [
        one["claim"]
        for one, two in zip(before, after, strict=True)
        if one["verdict"] != two["verdict"]
    ]


@pytest.mark.parametrize("row", range(len(TABLE1)))
@pytest.mark.parametrize("field", ["unpruned", "pruned"])
@pytest.mark.parametrize("column", range(3))
def test_shuffling_one_cell_into_another_column_changes_a_verdict(row, field, column):
    first, second = (row, field, column), (row, field, (column + 1) % 3)
    values = getattr(TABLE1[row], field)
    texts = turned({first: values[second[2]], second: values[column]})
    assert any(TABLE1[row].model in text for text in texts)


def test_a_shuffle_that_changes_nothing_turns_no_verdict():
    """Or the test above could pass whatever the cells are."""
    for row, system in enumerate(TABLE1):
        cells = {(row, "unpruned", i): value for i, value in enumerate(system.unpruned)}
        cells |= {(row, "pruned", i): value for i, value in enumerate(system.pruned)}
        assert turned(cells) == []
    # Equal values in other places: 4.83, Qwen2.5-7B pruned and Qwen2.5-3B unpruned.
    assert TABLE1[0].pruned[1] == TABLE1[2].unpruned[1]
    assert turned({(0, "pruned", 1): TABLE1[2].unpruned[1], (2, "unpruned", 1): 4.83}) == []
    # A change too small for any claim.
    assert turned({(0, "pruned", 2): TABLE1[0].pruned[2] + 0.001}) == []


@pytest.mark.parametrize("row", range(len(TABLE1)))
@pytest.mark.parametrize("column", range(3))
def test_each_pruned_cell_is_held_by_a_verdict(row, column):
    pruned = list(TABLE1[row].pruned)
    pruned[column] *= 1.6
    changed = list(TABLE1)
    changed[row] = dataclasses.replace(TABLE1[row], pruned=tuple(pruned))
    assert [c["verdict"] for c in paper_claims(changed)] != [c["verdict"] for c in paper_claims()]


def test_a_worse_translation_moves_the_largest_share():
    row = dataclasses.replace(TABLE2[3], ast_path=(36.12, 20.0))
    claims = paper_claims(table2=(*TABLE2[:3], row, TABLE2[4]))
    largest = find(claims, "largest tested share")
    assert (largest["computed"], largest["verdict"]) == (pytest.approx(21.4286), "disagrees")


def test_json_has_the_published_keys(repo_root):
    done = subprocess.run(
        [sys.executable, "report.py", "--paper", "--json"],
        cwd=repo_root,
        capture_output=True,
        text=True,
        check=True,
    )
    claims = json.loads(done.stdout)
    assert claims == paper_claims()
    assert all(set(claim) == {"claim", "printed", "computed", "verdict"} for claim in claims)
    assert {claim["verdict"] for claim in claims} == {"agrees", "disagrees"}


def test_text_counts_the_verdicts():
    claims = paper_claims()
    agree = sum(claim["verdict"] == "agrees" for claim in claims)
    assert render_claims(claims).endswith(f"{agree} of {len(claims)} claims agree")


@pytest.mark.parametrize(
    ("hub", "lora", "model"),
    [
        ("Qwen/Qwen2.5-7B", False, "Qwen2.5-7B"),
        ("Qwen/Qwen2.5-7B", True, "Qwen2.5-7B + LoRA"),
        ("/models/Llama-3.2-1B/", False, "Llama-3.2-1B"),
        ("Qwen/Qwen2.5-0.5B", False, None),
        ("results/stand_ins/demo/decoder", False, None),
        ("Qwen/Qwen2.5-3B", True, None),
    ],
)
def test_a_decoder_is_one_of_the_paper_or_is_not(hub, lora, model):
    system = system_of(hub, lora)
    assert (system.model if system else None) == model
