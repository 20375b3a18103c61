#!/usr/bin/env bash
# Table 2 as commands: En-De and Fr-En are prepared, trained and measured, then pruned on their own path and on the ASR system's.
#   bash recipes/CoVoST2/run.sh [--dry_run] COVOST2_FOLDER [DIRECTION...] [-- KEY VALUE...]
# DIRECTION: ende fren (default: both), each a leaf covost2_DIRECTION_qwen7b.yaml. What follows -- goes to every verb.
# The ASR path is that of librispeech_qwen7b: run recipes/LibriSpeech/run.sh first, or its columns are left out. Blocks that
# both paths choose share their results. RESULTS, SEED, GPUS, PYTHON, LAUNCH: see recipes/steps.sh. Finished stages are skipped.
set -euo pipefail
usage() { sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

dry_run=0
while [ $# -gt 0 ]; do
  case $1 in
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
directions=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do directions+=("$1"); shift; done
if [ $# -gt 0 ]; then shift; fi
keys=("$@")
if [ ${#directions[@]} -eq 0 ]; then directions=(ende fren); fi
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source recipes/steps.sh
for direction in "${directions[@]}"; do
  case $direction in ende | fren) ;; *) fail "unknown direction '$direction': give ende or fren" ;; esac
done

asr_path=$results/librispeech_qwen7b/$seed/measure/speech/path.json
blocks=3,6,9,12 # 10.7, 21.4, 32.1 and 42.9 % of 28 layers
folders=()
for direction in "${directions[@]}"; do
  leaf=hparams/covost2_${direction}_qwen7b.yaml
  verb_on_all train "$leaf" --data_folder "$data" ${batch[@]+"${batch[@]}"} ${keys[@]+"${keys[@]}"}
  verb measure "$leaf" ${keys[@]+"${keys[@]}"}
  verb_on_all sweep "$leaf" --block_sizes "$blocks" --heal_modes joint ${keys[@]+"${keys[@]}"}
  if [ "$dry_run" = 1 ] || [ -f "$asr_path" ]; then
    verb_on_all sweep "$leaf" --block_sizes "$blocks" --heal_modes joint --path "$asr_path" ${keys[@]+"${keys[@]}"}
  else
    echo "no $asr_path: the columns of the ASR path are left out" >&2
  fi
  folders+=("$results/covost2_${direction}_qwen7b/$seed")
done
run "$python" report.py "${folders[@]}" --tolerance 0.10
