#!/usr/bin/env bash
# Table 1 as commands: every system is trained, measured on speech and on text, pruned, healed, evaluated and reported.
#   bash recipes/LibriSpeech/run.sh [OPTION...] LIBRISPEECH_FOLDER [SYSTEM...] [-- KEY VALUE...]
# SYSTEM: qwen7b qwen7b_lora qwen3b qwen1.5b llama8b llama3b llama1b (default: all), each a leaf librispeech_SYSTEM.yaml
#   --paper_blocks   only the block size that the paper's row removes (default: every size from 1 to L/2, joint healing)
#   --figure2        all sizes without healing and with each healing, the control, and on qwen7b the path from text
#   --dry_run        print the commands, run nothing
# What follows -- goes to every verb (--num_steps 1000 ...). LOQUACIOUS=FOLDER adds the out-of-domain column. Also RESULTS
# (results), SEED (3407), GPUS (1, 2, 4 or 8), PYTHON, LAUNCH: see recipes/steps.sh. Finished stages are skipped, so the
# same line goes on where it stopped; stopped by a signal it ends with 75 (slurm.sbatch puts it back into the queue then).
set -euo pipefail
usage() { sed -n '2,11s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

dry_run=0 blocks=all
while [ $# -gt 0 ]; do
  case $1 in
    --paper_blocks) blocks=paper; shift ;;
    --figure2) blocks=figure2; shift ;;
    --dry_run) dry_run=1; shift ;;
    -h | --help) usage; exit 0 ;;
    --) break ;;
    -*) echo "error: unknown option $1" >&2; usage >&2; exit 2 ;;
    *) break ;;
  esac
done
if [ $# -eq 0 ] || [ "$1" = -- ]; then usage >&2; exit 2; fi
data=$1
shift
if [ "$dry_run" = 0 ] && [ -d "$data" ]; then data=$(cd "$data" && pwd); fi
systems=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do systems+=("$1"); shift; done
if [ $# -gt 0 ]; then shift; fi
keys=("$@")
if [ ${#systems[@]} -eq 0 ]; then systems=(qwen7b qwen7b_lora qwen3b qwen1.5b llama8b llama3b llama1b); fi
loquacious=${LOQUACIOUS:-}
if [ "$dry_run" = 0 ] && [ -n "$loquacious" ] && [ -d "$loquacious" ]; then loquacious=$(cd "$loquacious" && pwd); fi
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source recipes/steps.sh

# Layers that the paper's row "+ Pruning" removes: its percentage of L as a whole number.
paper_block() {
  case $1 in
    qwen7b) echo 8 ;; qwen7b_lora) echo 5 ;; qwen3b) echo 11 ;; qwen1.5b) echo 7 ;;
    llama8b) echo 14 ;; llama3b) echo 11 ;; llama1b) echo 1 ;;
    *) fail "unknown system '$1': give qwen7b, qwen7b_lora, qwen3b, qwen1.5b, llama8b, llama3b or llama1b" ;;
  esac
}
for system in "${systems[@]}"; do paper_block "$system" >/dev/null; done

if [ -n "$loquacious" ]; then
  run "$python" recipes/Loquacious/loquacious_prepare.py "$loquacious" "$results/manifests/loquacious" --splits dev
else
  echo "LOQUACIOUS is not set: the column Loquacious dev stays empty" >&2
fi
folders=()
for system in "${systems[@]}"; do
  leaf=hparams/librispeech_$system.yaml
  verb_on_all train "$leaf" --data_folder "$data" ${batch[@]+"${batch[@]}"} ${keys[@]+"${keys[@]}"}
  verb measure "$leaf" ${keys[@]+"${keys[@]}"}
  verb measure "$leaf" --measure_input text ${keys[@]+"${keys[@]}"}
  case $blocks in
    paper) sizes=(--block_sizes "$(paper_block "$system")" --heal_modes joint) ;;
    all) sizes=(--heal_modes joint) ;;
    figure2) sizes=(--heal_modes none,decoder,projector,joint --control) ;;
  esac
  verb_on_all sweep "$leaf" "${sizes[@]}" ${keys[@]+"${keys[@]}"}
  if [ "$blocks" = figure2 ] && [ "$system" = qwen7b ]; then
    verb_on_all sweep "$leaf" --heal_modes joint --path text ${keys[@]+"${keys[@]}"}
  fi
  folders+=("$results/librispeech_$system/$seed")
done
run "$python" report.py "${folders[@]}"
