#!/usr/bin/env bash
# The whole study from nothing, on a CPU: corpus, stand-in models, train, measure, prune and heal, report.
#   bash recipes/Demo/run.sh [--full] [LIBRISPEECH_LAYOUT_FOLDER [RESULTS_FOLDER]]
# Without a folder the speech is synthesised (experiment `demo`); with one, the same is done on that corpus (experiment
# `demo_<folder name>`). --full also removes every other block size up to 10, heals in ways beyond the paper
# (compensation, distillation, adapters on all layers), follows the path from text and the tail rule, and ends with the
# translation study (run_ast.sh). Finished stages are skipped, so run it again to go on. SEED=N (default 3407) is a study of its own.
set -euo pipefail

usage() { sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
full=0
while [ $# -gt 0 ]; do
  case $1 in
    --full) full=1; shift ;;
    -h | --help) usage; exit 0 ;;
    -*) echo "error: unknown option $1" >&2; usage >&2; exit 2 ;;
    *) break ;;
  esac
done
if [ $# -gt 2 ]; then usage >&2; exit 2; fi
if [ -n "${1:-}" ] && [ ! -d "$1" ]; then echo "error: no such folder: $1" >&2; exit 2; fi
corpus=${1:+$(cd "$1" && pwd)}
results=${2:-}
if [ -n "$results" ]; then mkdir -p "$results"; results=$(cd "$results" && pwd); fi
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
results=${results:-results}
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; fi
fi
seed=${SEED:-3407}
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false # two processes share the cores: one thread each
started=$SECONDS

say() { echo "==> [$((SECONDS - started)) s] $*"; }
# Two commands side by side; both are waited for, and a failure of either ends the script.
side_by_side() { # $1 and $2: names of functions
  "$1" & local first=$!
  "$2" & local second=$!
  local status=0
  wait "$first" || status=$?
  wait "$second" || status=$?
  if [ "$status" -ne 0 ]; then exit "$status"; fi
}
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT

# ------------------------------------------------------------ corpus
leaf=hparams/demo.yaml
note="pretrained stand-ins (tiny models trained on the spot), synthetic speech"
name=demo
suffix=""
if [ "$seed" != 3407 ]; then suffix="-$seed"; fi
if [ -z "$corpus" ]; then
  corpus=$results/corpora/demo$suffix
  say "synthesising speech into $corpus"
  "$PYTHON" recipes/Demo/synthesise.py "$corpus" --seed "$seed"
else
  name=demo_$(basename "$corpus" | tr -c 'A-Za-z0-9_.+\n-' '_')
  note="pretrained stand-ins (tiny models trained on the spot on the train split of $(basename "$corpus"))"
  note+="; decoder text: train transcripts and random strings over the train vocabulary"
fi
root=$corpus
if [ -d "$corpus/LibriSpeech" ]; then root=$corpus/LibriSpeech; fi
train="" tests="" found=""
for folder in "$root"/*/; do
  split=$(basename "$folder")
  if ! compgen -G "$folder*/*/*.trans.txt" >/dev/null; then continue; fi
  found+=" $split"
  case $split in
    train*) train+=",$name/$split" ;;
  esac
done
for split in test-clean test-other $found; do # those two first, then the others there are
  case $split in train* | dev*) continue ;; esac
  case "$found " in *" $split "*) ;; *) continue ;; esac
  case "$tests," in *",$name/$split,"*) ;; *) tests+=",$name/$split" ;; esac
done
if [ -z "$train" ] || [ -z "$tests" ]; then
  echo "error: $root needs a train split and a test split in LibriSpeech layout; found:${found:- none}" >&2
  exit 2
fi
dev=dev-clean
case $found in *dev-clean*) ;; *dev-other*) dev=dev-other ;; esac
say "splits:$found"
for split in train-clean-100 dev-clean test-clean test-other ood; do
  case "$found " in *" $split "*) ;; *) say "no split $split: skipped" ;; esac
done

# ------------------------------------------------------------ stand-ins
stand_ins=$results/stand_ins/$name$suffix
encoder() { "$PYTHON" recipes/Demo/bootstrap.py encoder --corpus "$corpus" --stand_ins "$stand_ins" --seed "$seed"; }
decoder() { "$PYTHON" recipes/Demo/bootstrap.py decoder --corpus "$corpus" --stand_ins "$stand_ins" --seed "$seed"; }
say "stand-in encoder and decoder into $stand_ins"
side_by_side encoder decoder

# ------------------------------------------------------------ the study
manifests=$results/manifests$suffix
# Real speech is harder than synthetic speech, and there is little of it: the projector takes longer to its plateau, and
# learns from copies at other speeds, too.
longer=()
if [ "$name" != demo ]; then
  longer=(--num_steps 1000 --valid_interval 200 --valid_utterances 120)
  copies=$results/corpora/${name}_speed
  say "copies of the train split at other speeds into $copies"
  "$PYTHON" recipes/Demo/perturb.py "$corpus" "$copies"
  "$PYTHON" recipes/LibriSpeech/librispeech_prepare.py "$copies" "$manifests/${name}_speed"
  for folder in "$copies"/LibriSpeech/*/; do train+=",${name}_speed/$(basename "$folder")"; done
fi
common=(--results_folder "$results" --seed "$seed" --experiment_name "$name" --data_folder "$corpus")
common+=(--manifest_folder "$manifests") # a seed of the demo is another corpus under the same names
common+=(--train_manifests "[${train#,}]" --eval_manifests "[${tests#,}]")
common+=(--valid_manifest "$name/$dev" --measure_manifest "$name/$dev" --results_note "$note")
models=(--encoder_hub "$stand_ins/encoder" --decoder_hub "$stand_ins/decoder" ${longer[@]+"${longer[@]}"})
run() { local verb=$1; shift; "$PYTHON" "$verb.py" "$leaf" "${common[@]}" "$@"; }

say "training the projector"
run train "${models[@]}"

speech() { run measure "${models[@]}"; }
text() { run measure "${models[@]}" --measure_input text; }
random_text() {
  run measure --measure_input text --experiment_name "${name}_random" --encoder_hub "$stand_ins/encoder" \
    --decoder_hub "$stand_ins/decoder_random"
}
shuffled() { run evaluate "${models[@]}" --shuffle_audio True; }
say "measuring angular distances (speech, text, text through random weights); shuffled-audio check"
both_texts() { text && random_text; }
speech_and_shuffled() { speech && shuffled; }
side_by_side speech_and_shuffled both_texts

sizes=[4,6,8,10] modes=[none,decoder,projector,joint]
if [ "$full" = 1 ]; then modes=[none,none+comp,decoder,projector,joint,joint+comp,joint+kl,joint+all]; fi
sweep() { run sweep "${models[@]}" --block_sizes "$sizes" --heal_modes "$modes" --control "$@"; }
first_half() { sweep --shard 1/2; }
second_half() { sweep --shard 2/2; }
say "pruning and healing: block sizes $sizes, heal modes $modes"
side_by_side first_half second_half
if [ "$full" = 1 ]; then
  others() { run sweep "${models[@]}" --block_sizes [1,2,3,5,7,9] --heal_modes [none,joint]; }
  elsewhere() { run sweep "${models[@]}" --block_sizes "$sizes" --heal_modes [none,joint] --path text,tail; }
  say "the other block sizes; the path from text and the tail rule (blocks that were run already are not run again)"
  side_by_side others elsewhere
  on_dev=(--eval_manifests "[$name/$dev]")
  say "the choice on $dev alone"
  run evaluate "${models[@]}" "${on_dev[@]}"
  run sweep "${models[@]}" --heal_modes joint "${on_dev[@]}" --block_sizes [1,2,3,4,5,6,7,8,9,10]
fi

say "report"
"$PYTHON" report.py "$results/$name/$seed" "$results/${name}_random/$seed"

# ------------------------------------------------------------ the chosen model
# The largest block within tolerance after joint healing (Table 1), or else the smallest one that was healed jointly.
choose='
import csv, pathlib, re, sys
root = pathlib.Path(sys.argv[1])
rows = csv.DictReader(open(root / "report" / "table1.csv", encoding="utf-8"))
names = [row["variant"] for row in rows if row["row"] == "largest"]
healed = [done.parent.name for done in root.glob("heal/l*-joint/DONE.json")]
names += sorted(healed, key=lambda name: int(re.findall(r"[0-9]+", name)[1]))
print(names[0] if names else "")
'
chosen=$("$PYTHON" -c "$choose" "$results/$name/$seed")
if [ -n "$chosen" ]; then
  start=${chosen#l}
  start=$((10#${start%%n*}))
  size=${chosen#l*n}
  size=$((10#${size%%-*}))
  say "exporting $chosen, and what it hears in one held-out file"
  run heal "${models[@]}" --start_layer "$start" --block_size "$size" --heal_mode joint --export
  split=${tests#",$name/"}
  split=${split%%,*}
  audio=$(compgen -G "$root/$split/*/*/*.[fw][la][av]*" | sort | sed -n 1p)
  "$PYTHON" transcribe.py "$results/$name/$seed/heal/$chosen/export" "$audio"
  echo "reference: $(cat "$(dirname "$audio")"/*.trans.txt | grep "^$(basename "${audio%.*}") ")"
fi
if [ "$full" = 1 ] && [ "$name" = demo ]; then
  say "the translation study"
  SEED=$seed bash recipes/Demo/run_ast.sh "$results"
fi
say "done; open $results/$name/$seed/report/report.html"
