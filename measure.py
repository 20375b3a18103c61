#!/usr/bin/env python3
"""Measure the angular distance between decoder layers and choose the pruning path.

    python measure.py hparams/demo.yaml
    python measure.py hparams/demo.yaml --measure_input text [--text_file sentences.txt]
    python measure.py hparams/demo.yaml --rerank 4     # also compare the 4 best blocks of every size by their loss

Speech needs a finished train stage, text only the decoder. Results: results/<experiment_name>/<seed>/measure/<input>/.
"""

from __future__ import annotations

import sys

from speechllm_prune.cli import open_run
from speechllm_prune.experiment import read_json
from speechllm_prune.runtime import verb


@verb
def main(argv: list[str]) -> int | None:
    """Entry point: see the module's docstring."""
    run = open_run("measure", __doc__ or "", argv)
    if run is None:
        return None
    if run.flags.dry_run:
        source = run.hparams["text_file"] or run.hparams["measure_manifest"]
        print(f"would measure {run.hparams['measure_input']} on {source}")
        return None
    from speechllm_prune.stages.measure import measure
    from speechllm_prune.stages.rerank import check_rerank, rerank_blocks
    from speechllm_prune.workbench import Workbench

    bench = Workbench(run)
    check_rerank(bench)
    folder = measure(bench)
    ranked = rerank_blocks(bench)
    if bench.rank == 0:
        found = read_json(folder / "path.json")
        print(f"{folder}: {found['count']} utterances, {found['num_layers']} layers")
        print(
            "block size n: start layer l  "
            + "  ".join(f"{n}: {start}" for n, start in found["path"].items())
        )
        if ranked is not None:
            chosen = read_json(ranked)["path"].items()
            print(f"{ranked}: by loss  " + "  ".join(f"{n}: {start}" for n, start in chosen))
    return None


if __name__ == "__main__":
    sys.exit(main())
