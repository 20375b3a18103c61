#!/usr/bin/env python3
"""Remove a block of layers and heal the cut: LoRA on the receiving layer's MLP, the projector, or both.

    python heal.py hparams/demo.yaml --block_size 6 --heal_mode joint [--path own|text|... | --start_layer l]
    python heal.py hparams/demo.yaml --block_size 6 --heal_mode joint --control      # nothing removed, same healing
    python heal.py hparams/demo.yaml --block_size 6 --heal_mode joint --export [--into FOLDER [--task_name asr]]

Results: results/<experiment_name>/<seed>/heal/l04n06-joint/ (and export/ with --export). With --into the pruned decoder
is written unmerged into FOLDER, or found there, and this task's adapter and projector beside those of other tasks.
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
        "heal", __doc__ or "", argv, {"export": "write the healed model as a Hugging Face folder"}
    )
    if run is None:
        return None
    hparams = run.hparams
    if run.flags.dry_run:
        print(
            f"would heal block size {hparams['block_size']} by {hparams['heal_mode']}: {hparams['heal_steps']} steps"
        )
        return None
    from speechllm_prune.stages.export import export_if_asked
    from speechllm_prune.stages.heal import check_request, heal
    from speechllm_prune.stages.plan import plan_block
    from speechllm_prune.workbench import Workbench

    check_request(hparams["heal_mode"], hparams["compensate"], hparams["control"])
    bench = Workbench(run)
    bench.require_training()
    plan = plan_block(
        bench, hparams["block_size"], hparams["path"], hparams["start_layer"], hparams["control"]
    )
    name = heal(bench, plan, hparams["heal_mode"], hparams["tag"])
    folder = run.experiment.stage(f"heal/{name}")
    print(f"{folder} is done; next: {run.command('evaluate', f'--variant {name}')}")
    export_if_asked(bench, Variant.parse(name), folder / "export")
    return None


if __name__ == "__main__":
    sys.exit(main())
