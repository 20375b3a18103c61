#!/usr/bin/env python3
"""Choose the block of layers to remove and write its plan; with --export also the pruned model, not healed.

    python prune.py hparams/demo.yaml --block_size 6 [--path own|text|tail|influence|random|rerank|FILE.json] [--export]
    python prune.py hparams/demo.yaml --block_size 6 --start_layer 4

Results: results/<experiment_name>/<seed>/prune/l04n06/plan.json (and export/).
"""

from __future__ import annotations

import sys

from speechllm_prune.cli import open_run
from speechllm_prune.experiment import Variant
from speechllm_prune.runtime import verb


@verb
def main(argv: list[str]) -> int | None:
    """Entry point: see the module's docstring."""
    run = open_run(
        "prune", __doc__ or "", argv, {"export": "write the pruned model as a Hugging Face folder"}
    )
    if run is None:
        return None
    from speechllm_prune.stages.export import export_if_asked
    from speechllm_prune.stages.plan import (
        choose_start_layer,
        decoder_depth,
        plan_block,
    )
    from speechllm_prune.workbench import Workbench

    bench, size, path = Workbench(run), run.hparams["block_size"], run.hparams["path"]
    if run.flags.dry_run:
        start = run.hparams["start_layer"]
        start = start if start >= 0 else choose_start_layer(bench, size, path, decoder_depth(bench))
        print(
            f"would write {run.experiment.stage(f'prune/{Variant(start, size).block}')}/plan.json"
        )
        return None
    plan = plan_block(bench, size, path, run.hparams["start_layer"])
    folder = run.experiment.stage(f"prune/{plan.name}")
    print(
        f"{folder}/plan.json: layers {plan.start_layer}..{plan.start_layer + size - 1} of {plan.num_layers} go"
    )
    export_if_asked(bench, Variant(plan.start_layer, size), folder / "export")
    return None


if __name__ == "__main__":
    sys.exit(main())
