#!/usr/bin/env bash
# Table 2 from nothing, on a CPU: a translation corpus, one decoder for ASR, En-De and Fr-En, and their pruning paths.
#   bash recipes/Demo/run_ast.sh [RESULTS_FOLDER]
# English speech and its encoder are those of run.sh; they are made if they are not there. Blocks that the path measured on
# translation and the one measured on ASR both choose share their results, and the table says so. Finished stages are
# skipped, so run it again to go on. Last, the three systems become tasks of one pruned decoder (results/exports/demo_ast).
# SEED=N (default 3407) is a study of its own; JOBS=1 runs one process at a time.
set -euo pipefail

usage() { sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
case ${1:-} in
  -h | --help) usage; exit 0 ;;
  -*) echo "error: unknown option $1" >&2; usage >&2; exit 2 ;;
esac
if [ $# -gt 1 ]; then usage >&2; exit 2; fi
results=${1:-}
if [ -n "$results" ]; then mkdir -p "$results"; results=$(cd "$results" && pwd); fi
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
results=${results:-results}
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; fi
fi
seed=${SEED:-3407}
jobs=${JOBS:-2}
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false # two processes share the cores: one thread each
started=$SECONDS

say() { echo "==> [$((SECONDS - started)) s] $*"; }
# Two functions side by side, or one after the other; a failure of either ends the script.
side_by_side() { # $1 and $2: names of functions
  local status=0
  "$1" & local first=$!
  if [ "$jobs" -lt 2 ]; then wait "$first" || exit $?; fi
  "$2" & local second=$!
  if [ "$jobs" -ge 2 ]; then wait "$first" || status=$?; fi
  wait "$second" || status=$?
  if [ "$status" -ne 0 ]; then exit "$status"; fi
}
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT

# ------------------------------------------------------------ corpora and manifests
suffix=""
if [ "$seed" != 3407 ]; then suffix="-$seed"; fi
english=$results/corpora/demo$suffix
corpus=$results/corpora/demo_ast$suffix
manifests=$results/manifests$suffix # a seed is another corpus under the same names
say "synthesising speech into $english and $corpus"
"$PYTHON" recipes/Demo/synthesise.py "$english" --seed "$seed"
"$PYTHON" recipes/Demo/synthesise_ast.py "$corpus" --seed "$seed"
prepare() { # $1 and $2: source and target language
  "$PYTHON" recipes/CoVoST2/covost2_prepare.py "$corpus/cv" "$manifests/demo_$1_$2_standard" --source "$1" --target "$2"
}
prepare en de
prepare fr en

# ------------------------------------------------------------ stand-ins
english_models=$results/stand_ins/demo$suffix
models=$results/stand_ins/demo_ast$suffix
bootstrap() { "$PYTHON" recipes/Demo/bootstrap.py "$@" --seed "$seed"; }
decoder() { bootstrap decoder --corpus "$corpus" --stand_ins "$models"; }
encoders() {
  bootstrap encoder --corpus "$english" --stand_ins "$english_models" &&
    bootstrap encoder --corpus "$corpus" --language fr --stand_ins "$models"
}
say "stand-in encoders (English, French) and one decoder into $english_models and $models"
side_by_side decoder encoders

# ------------------------------------------------------------ the study
common=(--results_folder "$results" --manifest_folder "$manifests" --seed "$seed" --decoder_hub "$models/decoder")
run() { local verb=$1 leaf=$2; shift 2; "$PYTHON" "$verb.py" "hparams/$leaf.yaml" "${common[@]}" "$@"; }
asr() {
  local verb=$1; shift
  run "$verb" demo --experiment_name demo_ast_asr --data_folder "$english" --encoder_hub "$english_models/encoder" \
    --eval_manifests "[demo/test-clean]" "$@"
}
ende() { local verb=$1; shift; run "$verb" demo_ende --data_folder "$corpus" --encoder_hub "$english_models/encoder" "$@"; }
fren() { local verb=$1; shift; run "$verb" demo_fren --data_folder "$corpus" --encoder_hub "$models/encoder" "$@"; }

sizes=[2,4,6,8] modes=[none,joint]
asr_path=$results/demo_ast_asr/$seed/measure/speech/path.json
asr_first() { asr train && asr measure; }
ende_first() { ende train && ende measure && ende measure --measure_input text && ende evaluate --shuffle_audio True; }
fren_first() { fren train && fren measure && fren evaluate --shuffle_audio True; }
random_text() {
  "$PYTHON" measure.py hparams/demo_ende.yaml --results_folder "$results" --manifest_folder "$manifests" --seed "$seed" --measure_input text \
    --experiment_name demo_ast_random --decoder_hub "$models/decoder_random" --encoder_hub "$english_models/encoder"
}
asr_rest() { random_text && asr sweep --block_sizes "$sizes" --heal_modes "$modes"; }
say "training the projectors (ASR, En-De, Fr-En), measuring angular distances, shuffled-audio checks"
side_by_side asr_first ende_first
side_by_side fren_first asr_rest

sweep() { # $1: ende or fren
  "$1" sweep --block_sizes "$sizes" --heal_modes "$modes" &&
    "$1" sweep --block_sizes "$sizes" --heal_modes "$modes" --path "$asr_path"
}
ende_sweep() { sweep ende; }
fren_sweep() { sweep fren; }
say "pruning and healing on the own path, then on the ASR path: block sizes $sizes, heal modes $modes"
side_by_side ende_sweep fren_sweep

say "report"
"$PYTHON" report.py "$results/demo_ende/$seed" "$results/demo_fren/$seed" "$results/demo_ast_asr/$seed" \
  "$results/demo_ast_random/$seed"
# ------------------------------------------------------------ one pruned decoder for all three tasks
shared=$results/exports/demo_ast$suffix
share() { # $1: asr, ende or fren; $2: the task's name
  "$1" heal --path "$asr_path" --block_size 4 --heal_mode joint --into "$shared" --task_name "$2"
}
say "one decoder without the 4 layers that the ASR path names, for ASR, En-De and Fr-En: $shared"
share asr asr
share ende en_de
share fren fr_en
english_clip=$(cut -f 1 "$corpus/cv/en/covost_v2.en_de.test.tsv" | sed -n 2p)
french_clip=$(cut -f 1 "$corpus/cv/fr/covost_v2.fr_en.test.tsv" | sed -n 2p)
say "what it makes of one English clip (asr, en_de) and of one French clip (fr_en)"
"$PYTHON" transcribe.py "$shared" "$corpus/cv/en/clips/$english_clip" --task asr
"$PYTHON" transcribe.py "$shared" "$corpus/cv/en/clips/$english_clip" --task en_de
"$PYTHON" transcribe.py "$shared" "$corpus/cv/fr/clips/$french_clip" --task fr_en
say "done; open $results/report/report.html"
