#!/usr/bin/env python3
"""Stage 1: train the projector (and decoder LoRA, if the leaf asks for it), then evaluate the full model.

    python train.py hparams/demo.yaml
    torchrun --standalone --nproc_per_node=2 train.py hparams/librispeech_qwen7b.yaml --data_folder /path/to/LibriSpeech

Run it again to resume; a finished run is left as it is.
Results: results/<experiment_name>/<seed>/train/ (and export/ with --export) and eval/full/.
"""

from __future__ import annotations

import sys

from speechllm_prune.cli import open_run
from speechllm_prune.runtime import verb


@verb
def main(argv: list[str]) -> int | None:
    """Entry point: see the module's docstring."""
    run = open_run(
        "train", __doc__ or "", argv, {"export": "write the full model as a Hugging Face folder"}
    )
    if run is None:
        return None
    if run.flags.dry_run:
        stage = run.experiment.stage("train")
        state = "is done" if run.experiment.is_done("train") else "would be trained"
        print(
            f"{stage} {state}: {run.hparams['num_steps']} steps, then evaluation on {run.hparams['eval_manifests']}"
        )
        return None
    from speechllm_prune.experiment import Variant
    from speechllm_prune.stages.evaluate import evaluate
    from speechllm_prune.stages.export import export_if_asked
    from speechllm_prune.training import train
    from speechllm_prune.workbench import Workbench

    bench = Workbench(run)
    train(bench, run.flags.export)
    evaluate(bench, "full", must_exist=False)
    export_if_asked(bench, Variant(), run.experiment.stage("train") / "export")
    return None


if __name__ == "__main__":
    sys.exit(main())
