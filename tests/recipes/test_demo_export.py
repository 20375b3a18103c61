"""How the demo ends: the model that Table 1 chooses is exported and hears one held-out file."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny
from tests.conftest import REPO_ROOT
from tests.recipes.conftest import Study, copy_study
from tests.recipes.verbs import hypotheses


def end_of_demo(study: Study) -> str:
    """Run what run.sh does after its report, on another experiment."""
    script = (REPO_ROOT / "recipes" / "Demo" / "run.sh").read_text(encoding="utf-8")
    last = script.partition(
        "# ------------------------------------------------------------ the chosen model\n"
    )
    assert last[2]
    head = f"""
        set -euo pipefail
        PYTHON={sys.executable} results={study.results} name=tiny seed=3407 models=() full=0 started=$SECONDS
        root={study.corpus}/LibriSpeech tests=,tiny/test-clean,tiny/test-other
        say() {{ echo "==> $*"; }}
        run() {{ local verb=$1; shift; "$PYTHON" "$verb.py" {study.leaf} "$@"; }}
    """
    process = subprocess.run(
        ["bash", "-c", head + last[2]],
        cwd=REPO_ROOT,
        env=tiny.environment(REPO_ROOT),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


@pytest.mark.parametrize("within", [True, False])
def test_the_demo_ends_with_its_chosen_model(study: Study, tmp_path: Path, within: bool) -> None:
    own = copy_study(study, tmp_path)
    sizes = (1, 2)
    chosen = study.variant(2 if within else min(sizes))
    table = own.root / "report" / "table1.csv"
    with open(table, "w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, ["row", "variant"], lineterminator="\n")
        writer.writeheader()
        writer.writerow({"row": "full", "variant": "full"})
        if within:
            writer.writerow({"row": "largest", "variant": chosen})
    out = end_of_demo(own)
    assert f"exporting {chosen}" in out and "already done" in out  # nothing is healed again
    assert (own.root / "heal" / chosen / "export" / "model.safetensors").is_file()
    name, text = min(hypotheses(own.root, chosen).items())
    heard = next(line for line in out.splitlines() if "\t" in line)
    assert heard == f"{next(iter(study.corpus.rglob(name + '.*')))}\t{' '.join(text.split())}"
    assert f"reference: {name} " in out
