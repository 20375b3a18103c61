# Sourced by the run.sh of a corpus: settings from the environment, and how one command is run.
#   RESULTS (results)  SEED (3407)  GPUS (1): processes of training and healing  PYTHON (python, or that of .venv)
#   LAUNCH: instead of GPUS, the words that start a script on all processes, such as "srun torchrun --nnodes=2 ..."
# SIGTERM, SIGUSR1 and Ctrl-C are passed on to the command that runs, which saves and stops. A run that was stopped ends with
# 75, and with whatever the command returned if it failed: run the same line again to go on.
results=${RESULTS:-results}
seed=${SEED:-3407}
gpus=${GPUS:-1}
python=${PYTHON:-}
if [ -z "$python" ]; then
  python=python
  if [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
fi

fail() {
  echo "error: $*" >&2
  exit 2
}

# Every leaf of the paper has 8 utterances in a step: batch_size 4 on each of two GPUs. Other numbers keep the product.
batch=()
case $gpus in
  1) batch=(--grad_accumulation_factor 2) ;;
  2) ;;
  4) batch=(--batch_size 2) ;;
  8) batch=(--batch_size 1) ;;
  *) fail "GPUS=$gpus: give 1, 2, 4 or 8, which keep the 8 utterances of a step" ;;
esac
all_processes=("$python")
if [ -n "${LAUNCH:-}" ]; then
  read -r -a all_processes <<<"$LAUNCH"
elif [ "$gpus" -gt 1 ]; then
  all_processes=("$python" -m torch.distributed.run --standalone --nproc_per_node="$gpus")
fi

# Print a command and, unless dry_run is 1, run it.
run() {
  echo "+ $*"
  if [ "${dry_run:-0}" = 1 ]; then return; fi
  local stamp child status=0 caught=0 seen=-1
  stamp=$(mktemp)
  "$@" &
  child=$!
  # Only the command itself: torchrun tells its workers, and a worker that is told twice leaves without saving.
  trap 'caught=$((caught + 1)); kill -TERM "$child" 2>/dev/null || true' TERM USR1 INT
  while [ "$seen" -ne "$caught" ]; do # a trap ends `wait` early
    seen=$caught status=0
    wait "$child" || status=$?
  done
  trap - TERM USR1 INT
  local stopped=""
  if [ -d "$results" ]; then stopped=$(find "$results" -name STOPPED.json -newer "$stamp" -print -quit); fi
  rm -f "$stamp"
  if [ "$status" -eq 0 ] && [ "$caught" -eq 0 ]; then return; fi
  # torchrun turns a worker's 75 into 1, so the file decides, too.
  if [ "$status" -eq 75 ] || [ "$status" -eq 0 ] || [ -n "$stopped" ]; then
    echo "stopped; the same command goes on from here" >&2
    exit 75
  fi
  exit "$status"
}

# A verb on a leaf in one process, and in all of them.
verb() { local script=$1 leaf=$2; shift 2; run "$python" "$script.py" "$leaf" --results_folder "$results" --seed "$seed" "$@"; }
verb_on_all() {
  local script=$1 leaf=$2
  shift 2
  run "${all_processes[@]}" "$script.py" "$leaf" --results_folder "$results" --seed "$seed" "$@"
}
