#!/usr/bin/env python3
"""Prune, heal and evaluate many block sizes in one process; finished points are skipped.

    python sweep.py hparams/demo.yaml [--block_sizes 2,4,6] [--heal_modes none,joint] [--path own,text] [--control]
    python sweep.py hparams/demo.yaml --dry_run        # all points, and about how long they will take
    python sweep.py hparams/demo.yaml --plan coarse    # every third size, then those around the tolerance
    python sweep.py hparams/demo.yaml --shard 1/2      # every second point; the other half by 2/2

Default: every block size from 1 to half the depth, without healing and with joint healing.
"""

from __future__ import annotations

import sys

from speechllm_prune.cli import open_run
from speechllm_prune.runtime import FAULT, UserError, verb


@verb
def main(argv: list[str]) -> int | None:
    """Entry point: see the module's docstring."""
    run = open_run("sweep", __doc__ or "", argv)
    if run is None:
        return None
    from speechllm_prune.stages.plan import decoder_depth
    from speechllm_prune.sweep import (
        all_sizes,
        listing,
        on_paths,
        plan_points,
        remarks,
        run_sweep,
        shard_of,
        start_layers,
    )
    from speechllm_prune.sweep_coarse import coarse_sizes, refine, require_judgement
    from speechllm_prune.workbench import Workbench

    bench, hparams = Workbench(run), run.hparams
    bench.require_training()
    depth = decoder_depth(bench)
    tested = sizes = all_sizes(hparams["block_sizes"], depth)
    if hparams["plan"] == "coarse":
        require_judgement(bench)
        tested = coarse_sizes(sizes)
    starts = start_layers(bench, sizes)
    points = plan_points(tested, hparams["heal_modes"], depth, hparams["control"])
    points = shard_of(on_paths(points, starts), hparams["shard"])
    if run.flags.dry_run:
        points += refine(bench, points, sizes, starts) if tested != sizes else []
        print("\n".join([*listing(bench, points), *remarks(bench, points)]))
        return None
    if bench.rank == 0:
        print("".join(f"{line}\n" for line in remarks(bench, points)), end="")
    failed = run_sweep(bench, points)
    if tested != sizes and not failed:
        more = refine(bench, points, sizes, starts)
        failed += run_sweep(bench, more)
        points += more
    if bench.rank == 0:
        print(f"{len(points) - len(failed)} of {len(points)} points are done")
        print("".join(f"failed: {point}: {error}\n" for point, error in failed), end="")
    if failed and len(failed) == len(points) and all(isinstance(e, UserError) for _, e in failed):
        raise UserError(f"no point could be run; the first: {failed[0][1]}")
    return FAULT if failed else None


if __name__ == "__main__":
    sys.exit(main())
