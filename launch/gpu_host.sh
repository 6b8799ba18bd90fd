#!/usr/bin/env bash
# One host with one or more NVIDIA GPUs: one process drives them all, and is run again when it was
# interrupted.
#
# Needs   an NVIDIA driver (nvidia-smi works) and, in the virtual environment of `make train` (or
#         PYTHON=...), `pip install -e '.[cuda12]'` or '.[cuda13]' (nvidia-smi says which CUDA).
# Start   launch/gpu_host.sh --config=configs/sd15_finetune.py --workdir=runs/x [flags]
#         In the background: nohup launch/gpu_host.sh ... > x.log 2>&1 &
# Stop    Ctrl-C, or kill the PID of this script: the run saves and exits with 75.
# Resume  the same command.
#
# Runs the same command again after 75 (stopped and saved), 76 (another host was lost) and a kill
# (128 and more), at most MAX_RESTARTS times (default 10); never after 0, 2 (wrong configuration) and
# 3 (diverged). CUDA_VISIBLE_DEVICES chooses GPUs. PAUSE is the seconds between runs (default 10).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; fi
fi
MAX_RESTARTS=${MAX_RESTARTS:-10}
PAUSE=${PAUSE:-10}
for name in MAX_RESTARTS PAUSE; do
  if ! [[ "${!name}" =~ ^[0-9]{1,5}(\.[0-9]+)?$ ]]; then
    echo "launch/gpu_host.sh: $name is '${!name}'; expected a number" >&2
    exit 2
  fi
done

if ! command -v nvidia-smi >/dev/null; then
  echo "launch/gpu_host.sh: nvidia-smi is not there: install the NVIDIA driver, or run" \
    "python -m sdjax.main without this script on a machine without GPUs" >&2
  exit 2
fi
if ! gpus=$(nvidia-smi --list-gpus) || [ -z "$gpus" ]; then
  echo "launch/gpu_host.sh: nvidia-smi finds no GPU (its answer: $gpus): reload the driver or reboot" >&2
  exit 2
fi
busy=$(nvidia-smi --query-compute-apps=pid,used_memory --format=csv,noheader)
if [ -n "$busy" ]; then
  echo "launch/gpu_host.sh: warning: other processes hold GPU memory (pid, memory): $busy" >&2
fi
echo "launch/gpu_host.sh: $(grep -c . <<<"$gpus") GPUs"

# CUDA only: without it a broken CUDA installation trains on the CPU, a thousand times slower.
export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda,cpu}
# JAX takes 75 % of the memory unless told; the rest is for cuDNN, NCCL and the CUDA context.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}

child=
stopping=0
stop() {
  stopping=1
  if [ -n "$child" ]; then kill -TERM "$child" 2>/dev/null; fi
}
set -m # a group of its own for the run: the terminal's Ctrl-C reaches this script alone
trap stop TERM INT

for ((restart = 0; ; restart++)); do
  "$PYTHON" -m sdjax.main "$@" &
  child=$!
  # A signal ends `wait` at once with a code of its own, while the run still saves.
  wait "$child"
  while kill -0 "$child" 2>/dev/null; do wait "$child"; done
  wait "$child" # of a process that has ended: its exit code
  code=$?
  child=
  if [ $stopping -eq 1 ]; then exit $code; fi
  if [ $code -ne 75 ] && [ $code -ne 76 ] && [ $code -lt 128 ]; then exit $code; fi
  if [ $restart -ge "$MAX_RESTARTS" ]; then
    echo "launch/gpu_host.sh: exit code $code after $restart restarts; giving up (MAX_RESTARTS)" >&2
    exit $code
  fi
  echo "launch/gpu_host.sh: exit code $code; run $((restart + 2)) starts in $PAUSE s" >&2
  sleep "$PAUSE"
  if [ $stopping -eq 1 ]; then exit $code; fi
done
