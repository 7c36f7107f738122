#!/usr/bin/env bash
# Unpack the parts in /tmp/parts and run a command. Run in the project's root on the GPU host.
#
#   LIMIT=420 OUT=/tmp/out bash benchmarks/gpu/go.sh python3 benchmarks/bench_gpu_step.py --out /tmp/run1 --json "$OUT/step.json" …
#
# Without a command it only unpacks. LIMIT: seconds for everything; 12 s before the limit, all stacks
# are written and the command is ended. $OUT gets log, run.log (of the newest stage under /tmp/run*),
# verl.jsonl (one line per step), trace (the run's last line every 4 s), gpu.csv (memory and load
# every second) and stacks. Use another OUT for each run.
set -uo pipefail
unset PYTHONDONTWRITEBYTECODE
site=${SITE:-/tmp/site}
parts=${PARTS:-/tmp/parts}
mkdir -p "$site" "$OUT"
unpack() { # FILE…: pieces of one xz stream
  if command -v xz >/dev/null; then cat "$@" | xz -dc -T0 | tar -x -C "$site"
  else cat "$@" | python3 -c 'import sys,tarfile; tarfile.open(fileobj=sys.stdin.buffer, mode="r|xz").extractall(sys.argv[1], filter="fully_trusted")' "$site"
  fi
}
compile() { # imports take three times as long without bytecode, and ten processes import
  [ -n "${REHEARSAL:-}" ] || python3 -m compileall -q -j 16 "$@" >/dev/null 2>&1
}
once() { # NAME COMMAND…
  local name=$1 && shift
  [ -e "$site/.$name" ] || { "$@" && touch "$site/.$name"; } || { echo "$name: cannot unpack"; ls -l "$parts"; exit 1; }
}
if [ -e "$parts/part-0.tar.xz" ] && [ ! -e "$site/.base" ]; then
  once base unpack "$parts/part-0.tar.xz"
  image=$(python3 -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  compile "$site" "$image"/{torch,torchvision,triton,numpy,scipy,sympy,mpmath,pandas,pyarrow,numba,llvmlite,PIL,networkx,setuptools}
fi
if [ -e "$parts/part-1-ray.tar.xz" ] && [ ! -e "$site/.ray" ]; then
  once ray unpack "$parts/part-1-ray.tar.xz"
  compile "$site/ray"
fi
if [ -e "$parts/part-3-vllm.piece" ] && [ ! -e "$site/.vllm" ]; then
  once vllm unpack "$parts"/part-*-vllm.piece
  compile "$site/vllm"
fi
echo "unpacked after ${SECONDS} s"
[ $# -gt 0 ] || exit 0
if [ -z "${BESIDE:-}" ]; then # end what an interrupted command left behind, by its mark
  for p in /proc/[0-9]*; do
    grep -qsz '^RCOT_GO=1$' "$p/environ" && kill -9 "${p#/proc/}" 2>/dev/null
  done
  export RCOT_GO=1
fi
commit=$(cat .gpu/commit 2>/dev/null || git rev-parse HEAD)
export PYTHONPATH=$site:$PWD PYTHONUNBUFFERED=1 RCOT_COMMIT=$commit RCOT_STACKS=/tmp/stacks-$$ \
  VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1 RAY_USAGE_STATS_ENABLED=0 OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
export VLLM_LOGGING_LEVEL=INFO                              # verl sets WARN, which hides the progress of the start
export RAY_memory_monitor_refresh_ms=0                      # it would kill on hosts whose RAM grows on demand
export TORCH_COMPILE_DISABLE=${TORCH_COMPILE_DISABLE-1}     # avoid Inductor at start and in the first step
export TORCH_CUDNN_SDPA_DEPRIORITIZED=1                     # cuDNN would plan attention for each new length
export VLLM_USE_FLASHINFER_SAMPLER=0                       # its kernels are not packed
rm -rf "$RCOT_STACKS"
env | grep -E '^(VLLM|RAY|TORCH|OMP)_' >"$OUT/trace"
keep() {
  local run
  run=$(ls -dt /tmp/run*/grpo-aks-*/attempt-1 2>/dev/null | head -n 1)
  [ -n "$run" ] || return 0
  cp -f "$run/verl.jsonl" "$OUT/" 2>/dev/null
  tail -c 8000000 "$run/log.txt" >"$OUT/run.log" 2>/dev/null
}
(while sleep 4; do
  keep
  echo "$SECONDS $(tail -n 1 "$OUT/run.log" 2>/dev/null | cut -c 1-150)"
done) >>"$OUT/trace" 2>/dev/null &
helpers=$!
nvidia-smi --query-gpu=timestamp,memory.used,utilization.gpu --format=csv,noheader -l 1 >"$OUT/gpu.csv" 2>/dev/null &
helpers+=" $!"
left=$((${LIMIT:-570} - SECONDS))
(sleep $((left - 12))
  python3 -c 'import sys, pathlib; from rcot_rl.system.stacks import ask; ask(pathlib.Path(sys.argv[1]))' "$RCOT_STACKS"
  sleep 3
  { ps -eo pid,etimes,args | cut -c 1-110; tail -n +1 "$RCOT_STACKS"/*.stack; } | head -c 4000000 >"$OUT/stacks") >/dev/null 2>&1 &
helpers+=" $!"
timeout -k 8 $left "$@" 2>&1 | tee "$OUT/log"
status=${PIPESTATUS[0]}
# shellcheck disable=SC2086
kill $helpers 2>/dev/null
keep
rm -rf "$RCOT_STACKS"
echo "status $status after ${SECONDS} s"
exit "$status"
