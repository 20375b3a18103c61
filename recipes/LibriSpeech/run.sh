#!/usr/bin/env bash
# Table 1, one row, as commands: train, measure, sweep, report. Finished stages are skipped, so run it again to go on.
#   bash recipes/LibriSpeech/run.sh /path/to/LibriSpeech [LEAF] [RESULTS_FOLDER]
# GPUS (default 1) trains by torchrun; the sweep runs as one process here, or as array jobs with --shard i/N.
set -euo pipefail
data=${1:?usage: run.sh LIBRISPEECH_FOLDER [LEAF] [RESULTS_FOLDER]}
cd "$(dirname "$0")/../.."
leaf=${2:-hparams/librispeech_qwen7b.yaml}
results=${3:-results}
python=${PYTHON:-python}

if [ "${GPUS:-1}" -gt 1 ]; then
  torchrun --standalone --nproc_per_node="$GPUS" train.py "$leaf" --data_folder "$data" --results_folder "$results"
fi
"$python" train.py "$leaf" --data_folder "$data" --results_folder "$results"
"$python" measure.py "$leaf" --results_folder "$results"
"$python" measure.py "$leaf" --results_folder "$results" --measure_input text
"$python" sweep.py "$leaf" --results_folder "$results" --heal_modes none,decoder,projector,joint --control
"$python" report.py "$results/$(basename "$leaf" .yaml)"
