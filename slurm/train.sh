#!/usr/bin/env bash
# Trains on the nodes of a Slurm job, and goes on after a time limit, a preemption or a crash.
#
#   sbatch slurm/train.sh                                               the embedded recipe
#   sbatch slurm/train.sh configs/NAME.yaml [section.key=value ...]
#   sbatch --array=1-4 slurm/train.sh SWEEP.txt [section.key=value ...]    index N trains line N of the file
#
# Submit it from the project folder. slurm/README.md: what to edit, how to watch, what each message means.

# What is asked of Slurm; the same options of sbatch outweigh these. A second # switches a line off.
#SBATCH --job-name=dist_gan
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
##SBATCH --partition=gpu
##SBATCH --time=24:00:00
##SBATCH --gpus-per-node=8
#SBATCH --signal=B:USR2@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

# What a cluster may need; edit it here, or set the variable before sbatch.
venv="${DIST_GAN_VENV:-}"                # virtual environment to activate
modules="${DIST_GAN_MODULES:-}"          # modules to load: "cuda/12.6 python/3.12"
container="${DIST_GAN_CONTAINER:-}"      # words before the launcher: "apptainer exec --nv gan.sif"
launch_file="${DIST_GAN_LAUNCH:-}"       # without it launch/many-nodes.yaml on GPUs, launch/cpu.yaml where there are none
cpu_processes="${DIST_GAN_PROCESSES:-1}" # processes a node where the job has no GPUs
head_address="${DIST_GAN_HEAD:-}"        # of the first node, as the others reach it
port="${DIST_GAN_PORT:-}"                # free on the first node, open to the others
join_s="${DIST_GAN_JOIN_S:-300}"         # seconds for all nodes to meet
max_crashes="${DIST_GAN_MAX_CRASHES:-5}" # times that this job is requeued after a crash

say() { printf 'dist_gan: %s\n' "$*"; }
fail() { say "$*"; exit 2; }
trap 'say "slurm/train.sh: line $LINENO failed"' ERR

[[ "${SLURM_JOB_ID:-}" =~ ^[0-9]+$ && -n "${SLURM_JOB_NODELIST:-}" ]] ||
  fail "SLURM_JOB_ID is '${SLURM_JOB_ID:-}', which is no job of Slurm; start this with: sbatch slurm/train.sh"
[[ -f train.py && -f slurm/join.py ]] ||
  fail "$PWD is not the project folder; submit from there, or with: sbatch --chdir=PROJECT PROJECT/slurm/train.sh"

# -- what is trained, and where ---------------------------------------------------------------------------------------

name="slurm-$SLURM_JOB_ID"
arguments=("$@")
if [[ -n "${SLURM_ARRAY_TASK_ID:-}" || "${1:-}" == *.txt ]]; then
  sweep="${1:-}" index="${SLURM_ARRAY_TASK_ID:-}"
  [[ "$sweep" == *.txt ]] || fail "array index $index without a config: give a file with a line for each index, SWEEP.txt"
  [[ -r "$sweep" ]] || fail "$sweep: cannot be read in $PWD"
  mapfile -t lines <"$sweep"
  [[ -n "$index" ]] || fail "$sweep is a sweep of ${#lines[@]}; start it with: sbatch --array=1-${#lines[@]} slurm/train.sh $sweep"
  line=""
  ((index < 1 || index > ${#lines[@]})) || line="${lines[index - 1]}"
  [[ "$line" == *[![:space:]]* ]] || fail "array index $index without a config: line $index of $sweep is empty or missing (it has ${#lines[@]} lines)"
  # xargs takes quotes and backslashes as a shell does, and expands and runs nothing.
  words="$(mktemp)"
  xargs printf '%s\0' <<<"$line" >"$words" 2>/dev/null || fail "line $index of $sweep: a quote has no partner; write 'a b', \"a b\" or a\\ b for a word with a blank"
  mapfile -d '' -t arguments <"$words"
  rm -f "$words"
  arguments+=("${@:2}")
  name="slurm-${SLURM_ARRAY_JOB_ID}_$index"
fi
plain_path() { # the path that train.py will read: YAML without its quotes, ~ and file:// as paths
  local value="$1" single="'" double='"'
  value="${value#"${value%%[![:space:]]*}"}" value="${value%"${value##*[![:space:]]}"}"
  if [[ "$value" == "$single"*"$single" && ${#value} -gt 1 ]]; then
    value="${value:1:-1}" value="${value//"$single$single"/"$single"}"
  elif [[ "$value" == "$double"*"$double" && ${#value} -gt 1 ]]; then
    value="${value:1:-1}"
    [[ "$value" != *[\\$double]* ]] || fail "run.dir: $1: escapes are not read here; write it in single quotes"
  fi
  case "$value" in
    *[[:cntrl:]]*) fail "run.dir: holds a sign that does not print; give another name" ;;
    [Ff][Ii][Ll][Ee]://localhost/*) value="${value:16}" ;;
    [Ff][Ii][Ll][Ee]:*) value="${value:5}" value="${value#//}" ;;
    *://* | [Pp][Ii][Pp][Ee]:* | [Dd][Aa][Tt][Aa]:*) fail "run.dir: no local folder; logs are appended to, so give a path on a disk" ;;
  esac
  case "$value" in
    \~) value="$HOME" ;;
    \~/*) value="$HOME/${value:2}" ;;
  esac
  plain="$value"
}
run_dir="" in_store="" # in a store, the run folder may be on the first node's own disk
for argument in "${arguments[@]}"; do
  if [[ "$argument" == run.dir=* ]]; then plain_path "${argument#run.dir=}" && run_dir="$plain"; fi
  if [[ "$argument" == checkpoint.url=*://* && "$argument" != checkpoint.url=[Ff][Ii][Ll][Ee]:* ]]; then in_store=1; fi
done
if [[ -z "$run_dir" ]]; then # the same at every requeue of this job
  run_dir="runs/$name"
  arguments+=("run.dir=$run_dir")
fi
say "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), in $run_dir"

# -- one job a run folder ---------------------------------------------------------------------------------------------

mkdir -p "$run_dir/slurm" || fail "run.dir: cannot write in $run_dir"
exec 9>>"$run_dir/slurm/lock"
# What an earlier start of this job has left behind on a lost node may still be ending.
flock --wait "$((${SLURM_RESTART_COUNT:-0} > 0 ? 120 : 0))" --conflict-exit-code 9 9 || {
  (($? == 9)) || fail "run.dir: the file system of $run_dir has no locks; mount it with them, or choose another run.dir"
  fail "run.dir: $run_dir is in use by job $(cut -d. -f1 "$run_dir/slurm/lock"); wait for it to end, or choose another run.dir"
}
mark="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"
echo "$mark" >"$run_dir/slurm/lock"

# A start that is refused owns no run folder, and leaves its outcome here; what an earlier attempt has left is not touched.
DIST_GAN_REFUSED="$(realpath "$run_dir")/slurm/refused.json"
export DIST_GAN_REFUSED
rm -f "$DIST_GAN_REFUSED"
outcome_file="$run_dir/outcome.json"
outcome_before="$(cat "$outcome_file" 2>/dev/null || true)"
field() { # of the outcome that this start has left; empty if it left none
  local file="$outcome_file"
  [[ -r "$file" && "$(<"$file")" != "$outcome_before" ]] || file="$DIST_GAN_REFUSED"
  [[ -r "$file" ]] || return 0
  sed -n "s/^ *\"$1\": \"\\(.*\\)\",\\{0,1\\}\$/\\1/p" "$file"
}
newest_commit() { # empty if there is none; in a store, that of the latest attempt, for the log may have been fetched
  if [[ -n "$in_store" ]]; then
    local log="$run_dir/events.jsonl" attempt began commit
    attempt="$(sed -n 's/^{"attempt": \([0-9]*\), "run": .*/\1/p' "$run_dir/attempts.jsonl" 2>/dev/null | tail -n 1)" || true
    [[ -n "$attempt" ]] || return 0
    began="$(grep "\"event\": \"\(start\|resume\)\".*\"attempt\": $attempt," "$log" 2>/dev/null | tail -n 1)" || true
    commit="$(field commit)" # its event is not in the log if the run was lost right after the commit
    if [[ -z "$commit" || -z "$began" || "$began" == *"\"checkpoint\": \"$commit\""* ]]; then
      commit="$(sed -n "/\"event\": \"checkpoint\".*\"attempt\": $attempt,/s/.*\"url\": \"\([^\"]*\)\".*/\1/p" "$log" 2>/dev/null | tail -n 1)" || true
    fi
    [[ -z "$commit" ]] || echo "$commit/COMMIT"
    return 0
  fi
  [[ ! -d "$run_dir/checkpoints" ]] || find "$run_dir/checkpoints" -mindepth 2 -maxdepth 2 -name COMMIT | sort -V | tail -n 1
}
commit_before="$(newest_commit)"

# -- the nodes --------------------------------------------------------------------------------------------------------

set +u # other people's scripts
if [[ -n "$modules" ]]; then read -ra modules <<<"$modules" && module load "${modules[@]}"; fi
# shellcheck disable=SC1091
if [[ -n "$venv" ]]; then source "$venv/bin/activate"; fi
set -u

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
if [[ -z "$head_address" ]]; then
  head_address="${nodes[0]}"
  getent ahosts "$head_address" >/dev/null || # names of nodes need not resolve: as Slurm itself reaches it
    head_address="$(scontrol --oneliner show node "${nodes[0]}" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')"
fi
port="${port:-$((10000 + SLURM_JOB_ID % 20000))}"
per_node="${SLURM_GPUS_ON_NODE:-0}"
if ((per_node > 0)); then
  launch_file="${launch_file:-launch/many-nodes.yaml}"
else
  launch_file="${launch_file:-launch/cpu.yaml}" per_node="$cpu_processes"
fi
say "${#nodes[@]} nodes (${nodes[*]}), $per_node processes each, $launch_file, meeting at $head_address:$port"

# Everything is said here, because neither sbatch nor an older srun hands it on by itself.
step=(srun --nodes="${#nodes[@]}" --ntasks="${#nodes[@]}" --ntasks-per-node=1 --distribution=block --mpi=none --export=ALL
  --cpus-per-task="${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}" --cpu-bind=cores --kill-on-bad-exit=1 --open-mode=append)

asked="" ended="" interrupted=""
# shellcheck disable=SC2317
on_usr2() {
  asked=1 interrupted=1
  say "the time limit is near (USR2): the run is asked to save and stop"
  scancel --signal=USR2 "$SLURM_JOB_ID" || true # every step, not this script
}
# shellcheck disable=SC2317
on_term() {
  ended=1 interrupted=1
  say "Slurm ends this job (TERM): preempted, cancelled, out of time or requeued"
}
trap on_usr2 USR2
trap on_term TERM
run_step() { # in the background, because bash looks at signals between commands and while it waits
  "${step[@]}" "$@" 9>&- &
  local pid=$! code
  while :; do
    interrupted="" code=0
    wait "$pid" || code=$?
    [[ -n "$interrupted" ]] || return "$code"
  done
}

export CONTAINER="$container" RUN_DIR="$run_dir"
seen=(--lock "$run_dir/slurm/lock" --mark "$mark") # by every node, unless the run is kept in a store
node_log=(--output="$run_dir/slurm/node-%n.log")
if [[ -n "$in_store" ]]; then # a name with %n would be opened on each node's own disk
  seen=() node_log=(--label --output="$run_dir/slurm/node-all.log")
fi
join_log="$run_dir/slurm/join.log"
: >"$join_log"
# shellcheck disable=SC2016
if ! run_step --output="$join_log" bash -c 'trap "" USR2; exec $CONTAINER python slurm/join.py "$@"' bash \
  --head "$head_address" --port "$port" --seconds "$join_s" "${seen[@]}" "${nodes[@]}"; then
  grep --max-count=1 '^dist_gan: ' "$join_log" || { say "the nodes did not meet:" && tail -n 20 "$join_log"; }
  exit 2
fi

# The signal is the trainer's, which sets its own handler: the launcher would die of it. Where a launcher fails it stays
# until this start has left an outcome, for the step ends with it, and a rank of another node may be about to say who was lost.
# shellcheck disable=SC2016
node='
  trap "" USR2
  trap : TERM
  $CONTAINER accelerate launch --machine_rank "$SLURM_NODEID" "$@" && exit 0
  for ((i = 0; i < 30; i++)); do [[ "$RUN_DIR/outcome.json" -nt "$RUN_DIR/slurm/lock" || -e "$DIST_GAN_REFUSED" ]] && break || sleep 0.5; done
  exit 1'
if [[ -n "$asked$ended" ]]; then
  say "stopped before the training began, and not requeued"
  exit 75
fi
run_step "${node_log[@]}" bash -c "$node" bash \
  --config_file "$launch_file" --gpu_ids all --rdzv_backend static --main_process_ip "$head_address" --main_process_port "$port" \
  --num_machines "${#nodes[@]}" --num_processes "$((per_node * ${#nodes[@]}))" train.py "${arguments[@]}" || true

# -- what next --------------------------------------------------------------------------------------------------------

outcome="$(field outcome)" reason="$(field reason)"
case "$outcome" in
  finished) say "finished: $run_dir" && exit 0 ;;
  configuration_wrong) say "configuration_wrong, not requeued: $reason" && exit 2 ;;
  failed) say "failed, not requeued: $reason" && exit 3 ;;
  preempted) code=75 ;;
  *) code=1 outcome="crashed" reason="${reason:-no rank could say why; see $run_dir/slurm/node-*.log}" ;;
esac
say "$outcome: $reason"

state="$(scontrol --oneliner show job "$SLURM_JOB_ID")" || state=""
if [[ -n "$ended" || "$state" != *" JobState=RUNNING "* || "$state" != *" Restarts=${SLURM_RESTART_COUNT:-0} "* ]]; then
  say "not requeued here: Slurm has ended this job, and requeues it by itself if it was preempted or lost a node"
  exit "$code"
fi
if [[ -z "$(newest_commit)" || "$(newest_commit)" == "$commit_before" ]]; then
  say "not requeued: no checkpoint has been committed since this start; see $run_dir/slurm/node-*.log"
  exit "$code"
fi
if [[ "$outcome" == crashed ]]; then
  echo "$SLURM_JOB_ID" >>"$run_dir/slurm/crashes"
  if (($(grep --count --line-regexp "$SLURM_JOB_ID" "$run_dir/slurm/crashes") > max_crashes)); then
    say "not requeued: this job has crashed $((max_crashes + 1)) times (DIST_GAN_MAX_CRASHES)"
    exit "$code"
  fi
fi
say "requeued, to go on from $(basename "$(dirname "$(newest_commit)")")"
scontrol requeue "$SLURM_JOB_ID" || say "Slurm refused to requeue; go on with the same command and run.dir=$run_dir"
exit "$code"
