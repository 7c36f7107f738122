# Quoted words stay literal, and functions are called by traps:
# shellcheck disable=SC2016,SC2317
set -euo pipefail

@SETTINGS@
here=$folder/$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
ray_pid='' driver_pid='' stopping='' requeue=''

say() { printf 'rcot: %s\n' "$*" >&2; }
alive() { [[ -n $1 ]] && kill -0 "$1" 2>/dev/null; }

# step NAME SRUN-OPTIONS -- WORDS: run a step next to the other steps; its id goes to NAME.step.
step() {
  local name=$1 options=()
  shift
  while [[ $1 != -- ]]; do options+=("$1"); shift; done
  shift
  exec srun --overlap --export=ALL --mem=0 --kill-on-bad-exit=1 --ntasks-per-node=1 \
    --cpus-per-task="$cpus" --job-name="$name" "${options[@]}" "${srun_options[@]}" \
    bash -c 'echo "$SLURM_STEP_ID" >"$1"; shift; exec "$@"' rcot "$here/$name.step" "$@" </dev/null
}

# signal NAME PID: send TERM to the step's processes. srun itself would kill them on TERM.
signal() {
  if [[ -s $here/$1.step ]]; then
    timeout 20 scancel --signal=TERM "$SLURM_JOB_ID.$(<"$here/$1.step")" 2>/dev/null || true
  else
    kill -TERM "$2" 2>/dev/null || true
  fi
}

# end NAME PID SECONDS: ask a step to stop, and kill it after SECONDS.
end() {
  alive "$2" || return 0
  signal "$1" "$2"
  local tick
  for ((tick = 0; tick < $3 * 5; tick++)); do
    alive "$2" || return 0
    sleep 0.2
  done
  say "the step $1 did not stop in $3 s"
  kill -TERM "$2" 2>/dev/null || true
  sleep 1
}

# However this script ends, the run is stopped first, then Ray on every node.
finish() {
  local status=$?
  trap '' TERM INT USR1
  trap - EXIT
  end run "$driver_pid" "$patience"
  end ray "$ray_pid" 45
  rm -f -- "$here/head.json"
  if [[ -n $requeue ]] && ((${SLURM_RESTART_COUNT:-0} < max_requeues)); then
    say 'back into the queue; the run resumes there'
    scontrol requeue "$SLURM_JOB_ID" || say 'the scheduler did not requeue this job'
  fi
  exit "$status"
}

stop() {
  stopping=yes
  say 'stopping'
  alive "$driver_pid" || exit 143
  signal run "$driver_pid"
}

trap finish EXIT
trap stop TERM INT
trap 'requeue=$may_requeue; stop' USR1

for name in "${needed[@]}"; do
  if [[ -z ${!name:-} ]]; then
    say "$name is not set in this job's environment"
    exit 2
  fi
done
if [[ -n $setup ]]; then
  set +eu
  # shellcheck source=/dev/null
  source "$setup" || { say "$setup failed"; exit 2; }
  set -eu
fi

cd -- "$workdir"
mkdir -p -- "$here"
chmod 700 -- "$here"
unset RAY_ADDRESS RAY_TMPDIR RAY_AUTH_TOKEN_PATH
# without a token, Ray runs code of anyone who reaches its port
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
RAY_AUTH_MODE=token RCOT_RL_PLUGIN=required RAY_USAGE_STATS_ENABLED=0
export RAY_AUTH_TOKEN RAY_AUTH_MODE RCOT_RL_PLUGIN RAY_USAGE_STATS_ENABLED
PYTHONPATH=$code${PYTHONPATH:+:$PYTHONPATH}
export PYTHONPATH

head=$SLURMD_NODENAME
say "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, head $head, files in $here"

step ray --nodes="$nodes" --ntasks="$nodes" --output="$here/ray-%n.log" -- \
  "$python" -m cluster.launch.node --rendezvous "$here" --nodes "$nodes" --head "$head" \
  --job "$SLURM_JOB_ID" "${node_options[@]}" &
ray_pid=$!

step run --nodes=1 --ntasks=1 --nodelist="$head" -- \
  "$python" -m cluster.launch.head --rendezvous "$here" "${health_options[@]}" -- \
  "${command[@]}" &
driver_pid=$!

while alive "$driver_pid"; do
  if ! alive "$ray_pid" && [[ -z $stopping ]]; then
    say "Ray ended on a node; see $here"
    exit 1
  fi
  sleep 0.5
done
status=0
wait "$driver_pid" || status=$?
driver_pid=''
say "the run ended with status $status"
exit "$status"
