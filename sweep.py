#!/usr/bin/env python3
"""Prune, heal and evaluate many block sizes in one process; finished points are skipped.

    python sweep.py hparams/demo.yaml [--block_sizes 2,4,6] [--heal_modes none,joint] [--path own] [--control]
    python sweep.py hparams/demo.yaml --shard 1/2      # every second point; the other half by 2/2

Default: every block size from 1 to half the depth, without healing and with joint healing.
"""

from __future__ import annotations

import sys

from speechllm_prune.cli import open_run
from speechllm_prune.runtime import FAULT, verb


@verb
def main(argv: list[str]) -> int | None:
    """Entry point: see the module's docstring."""
    run = open_run("sweep", __doc__ or "", argv)
    if run is None:
        return None
    from speechllm_prune.stages.plan import choose_start_layer, decoder_depth
    from speechllm_prune.sweep import plan_points, run_sweep, shard_of
    from speechllm_prune.workbench import Workbench

    bench, hparams = Workbench(run), run.hparams
    bench.require_training()
    points = plan_points(
        hparams["block_sizes"], hparams["heal_modes"], decoder_depth(bench), hparams["control"]
    )
    mine = shard_of(points, hparams["shard"])
    if hparams["start_layer"] < 0:  # a path that does not exist is no fault of single points
        for size in {point.block_size for point in mine}:
            choose_start_layer(bench, size, hparams["path"], decoder_depth(bench))
    if run.flags.dry_run:
        for point in mine:
            print(f"would run {point}")
        return None
    failed = run_sweep(bench, mine)
    print(
        f"{len(mine) - len(failed)} of {len(mine)} points are done"
        + "".join(f"\nfailed: {line}" for line in failed)
    )
    return FAULT if failed else None


if __name__ == "__main__":
    sys.exit(main())
