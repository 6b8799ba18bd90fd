#!/usr/bin/env bash
# N processes of one run on this machine, joined by jax.distributed over loopback.
#
# Needs   the virtual environment of `make train` (or PYTHON=...), and with GPUS=1 one GPU per process.
#         A host with several GPUs needs no processes at all (launch/gpu_host.sh): this is for trying
#         a run of several hosts, and for the rare model that one process per GPU suits better.
# Start   launch/local.sh 2 --config=configs/base.py --workdir=runs/two
#         GPUS=1 launch/local.sh 8 --config=... --workdir=...
#         VERB=sdjax.sweep GPUS=1 launch/local.sh 8 --config=... --space=... --workdir=...
#         Another verb is not joined: each process works by itself, as the workers of a sweep do,
#         and the end of one does not concern the others.
# Stop    Ctrl-C or SIGTERM: passed on to every process; all save together and exit with 75.
# Resume  the same command; another number of processes will do too.
#
# When one process fails the others are told to stop, and killed GRACE seconds later (default 60).
# The exit code is the worst of all: a mistake (1, 2, 3) above a death (128 and more, 76) above 75
# above 0. PORT is the coordinator's (default: a free one). Each line of output begins with [process].
set -uo pipefail

if ! [[ "${1:-}" =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: launch/local.sh PROCESSES --config=FILE --workdir=DIR [flags of sdjax.main]" >&2
  exit 2
fi
if ! [[ "$1" =~ ^[0-9]{1,3}$ ]]; then
  echo "launch/local.sh: PROCESSES is $1; expected at most 999 on one machine" >&2
  exit 2
fi
for name in GRACE PORT; do # they go into the shell's arithmetic, which would run what is no number
  if ! [[ "${!name:-1}" =~ ^[0-9]{1,5}$ ]]; then
    echo "launch/local.sh: $name is '${!name}'; expected a whole number" >&2
    exit 2
  fi
done
count=$1
shift
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; fi
fi
VERB=${VERB:-sdjax.main}
GRACE=${GRACE:-60}
PORT=${PORT:-$("$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}

pids=()
pass_on() { for pid in "${pids[@]}"; do kill "-$1" "$pid" 2>/dev/null; done; }
kill_groups() { for pid in "${pids[@]}"; do kill -KILL -- "-$pid" 2>/dev/null; done; }
trap 'kill_groups' EXIT
trap 'pass_on TERM' TERM
trap 'pass_on INT' INT

process() { # INDEX, flags of sdjax.main
  local index=$1
  shift
  if [ "${GPUS:-0}" = 1 ]; then export CUDA_VISIBLE_DEVICES=$index; else export JAX_PLATFORMS=cpu; fi
  if [ "$VERB" != sdjax.main ]; then exec "$PYTHON" -u -m "$VERB" "$@"; fi
  exec "$PYTHON" -u -m sdjax.main --coordinator="127.0.0.1:$PORT" --num_processes="$count" \
    --process_id="$index" "$@"
}

label() { # each line of the input with [INDEX] in front, to the last one, whatever the signals
  trap '' INT TERM
  while IFS= read -r line || [ -n "$line" ]; do printf '[%s] %s\n' "$1" "$line"; done
}

for ((i = 0; i < count; i++)); do
  exec 3> >(label "$i")
  # A group of its own for every process: the terminal's Ctrl-C reaches this script alone, which
  # passes it on once. (Twice would mean "interrupt at once" to sdjax.)
  set -m
  process "$i" "$@" >&3 2>&1 3>&- &
  pids+=($!)
  set +m
  exec 3>&-
done

rank() { # a larger number is a worse exit code
  case $1 in
    0) echo 0 ;;
    75) echo 1 ;;
    76) echo 2 ;;
    *) if [ "$1" -ge 128 ]; then echo 3; else echo 4; fi ;;
  esac
}

worst=0
deadline=
waiting=("${pids[@]}")
while [ ${#waiting[@]} -gt 0 ]; do
  running=" $(jobs -rp | tr '\n' ' ')"
  left=()
  for pid in "${waiting[@]}"; do
    if [[ "$running" == *" $pid "* ]]; then
      left+=("$pid")
      continue
    fi
    wait "$pid"
    code=$?
    if [ "$(rank $code)" -gt "$(rank $worst)" ]; then worst=$code; fi
    if [ $code -ne 0 ] && [ -z "$deadline" ] && [ "$VERB" = sdjax.main ]; then
      deadline=$((SECONDS + GRACE))
      # After 75 the others are on their way out by themselves: all hosts save together.
      if [ $code -ne 75 ]; then
        echo "launch/local.sh: process $pid ended with $code; stopping the others" >&2
        pass_on TERM
      fi
    fi
  done
  waiting=(${left[@]+"${left[@]}"})
  if [ -n "$deadline" ] && [ $SECONDS -ge "$deadline" ]; then kill_groups; fi
  if [ ${#waiting[@]} -gt 0 ]; then sleep 0.2; fi
done
exit "$worst"
