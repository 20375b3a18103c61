#!/usr/bin/env python3
"""Decode and score the full model or a pruned variant on the evaluation manifests.

    python evaluate.py hparams/demo.yaml [--variant full|l04n06-none|l04n06-joint]
    python evaluate.py hparams/demo.yaml --shuffle_audio      # sanity check: every utterance hears another one

Results: results/<experiment_name>/<seed>/eval/<variant>/<corpus>-<split>/ (hyps.jsonl, metrics.json, wer.txt).
"""

from __future__ import annotations

import sys

from speechllm_prune.cli import open_run
from speechllm_prune.runtime import verb


@verb
def main(argv: list[str]) -> int | None:
    """Entry point: see the module's docstring."""
    run = open_run("evaluate", __doc__ or "", argv)
    if run is None:
        return None
    if run.flags.dry_run:
        print(
            f"would evaluate {run.hparams['variant']} on {', '.join(run.hparams['eval_manifests'])}"
        )
        return None
    from speechllm_prune.stages.evaluate import evaluate
    from speechllm_prune.workbench import Workbench

    bench = Workbench(run)
    bench.require_training()
    evaluate(bench, run.hparams["variant"])
    return None


if __name__ == "__main__":
    sys.exit(main())
