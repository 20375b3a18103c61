"""docs/SHIPPING.md: the blocks that need neither a GPU nor a package that is not installed are run as printed."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import yaml

from speechllm_prune.prune.card import mergekit_yaml
from tests.conftest import REPO_ROOT
from tests.recipes.conftest import Study
from tests.recipes.verbs import audio_of, hypotheses, load_rows

PAGE = (REPO_ROOT / "docs/SHIPPING.md").read_text(encoding="utf-8")
SECTIONS = re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]
EXPORT = "results/demo/3407/heal/l07n04-joint/export"


def blocks(section: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("utterance", [0, 3])
def test_blocks_run_one_after_the_other(
    study: Study, utterance: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variant = study.variant(2)
    expected = hypotheses(study.root, variant)
    name = list(expected)[utterance]
    monkeypatch.chdir(tmp_path)
    shutil.copytree(study.root / "heal" / variant / "export", EXPORT)
    audio = audio_of(study.corpus, name)
    Path("recording.flac").symlink_to(audio)  # of any format: it is recognised by its content
    names: dict[str, object] = {}
    for section in SECTIONS[:3]:
        (code,) = blocks(section, "python")
        exec(compile(code, section.split("\n")[0], "exec"), names)
    assert names["texts"] == [expected[name]]
    rows = load_rows(study.root / "eval" / variant / "librispeech-test-clean" / "hyps.jsonl")
    positions = {row["id"]: row["num_tokens"] for row in rows}
    assert positions[name] > 0, "an empty text would prove nothing"


def test_sections_that_were_not_run_say_so() -> None:
    titles = [section.split("\n")[0] for section in SECTIONS]
    assert all("not run here" not in title for title in titles[:3])
    assert all(title.endswith("(not run here)") for title in titles[3:])
    for section in SECTIONS[3:5]:
        for code in blocks(section, "python"):
            compile(code, "docs/SHIPPING.md", "exec")


def test_the_mergekit_example_is_what_an_export_writes() -> None:
    (shown,) = blocks(SECTIONS[5], "yaml")
    kept = [*range(18), 26, 27]
    written = mergekit_yaml("Qwen/Qwen2.5-7B", None, "", kept, "bfloat16")
    assert yaml.safe_load(shown) == yaml.safe_load(written)
