#!/usr/bin/env bash
# Cloud TPU slices by queued resources: ask for one, install, run, and go on after preemption.
#
# Needs   the Google Cloud CLI, logged in (gcloud auth login), a project with TPU quota, and a bucket
#         in the TPU's region that its service account may write. --workdir is a gs:// path, and data
#         that are prepared already may be (docs/data.md); or both are of a disk that all workers
#         mount (with SHARED_WORKDIR=1): a preempted slice loses its own.
# Start   export NAME=sd21 ZONE=us-east5-a ACCELERATOR=v5p-256 SPOT=1
#         launch/tpu_vm.sh watch --config=configs/sd21_base.py --workdir=gs://BUCKET/sd21 [flags]
#         watch creates, installs, runs, and stays (tmux or a small VM): it recreates a preempted
#         slice and runs the same command again after 75, 76 and kills, at most MAX_RESTARTS times
#         (default 100). It ends with the run's exit code, and leaves the slice: it costs until deleted.
#         By hand: create, wait, install, `run FLAGS`, status, logs, stop, delete.
# Stop    end watch first (Ctrl-C), then: launch/tpu_vm.sh stop (SIGTERM to all workers; they save
#         and exit with 75), launch/tpu_vm.sh delete (ends the costs).
# Resume  the same watch command, from anywhere: the state of the run is on the workers.
#
# DRY_RUN=1 prints the gcloud commands and runs none. Settings, by environment:
#   NAME, ZONE            of the queued resource; both needed
#   PROJECT               default: gcloud's
#   ACCELERATOR           v4-32, v5litepod-16, v5p-256, v6e-64 ... (v4 and v5p count 2 per chip)
#   RUNTIME               default: the one that belongs to ACCELERATOR
#   SPOT=1, RESERVED=1    cheaper and preemptible; or from a reservation. Default: on demand
#   SLICES                more than 1: that many slices, joined over the data-centre network
#   NETWORK, SUBNETWORK, SERVICE_ACCOUNT   default: the project's
#   SETUP                 a shell command for every worker after the installation, say to mount the data
#   POLL                  seconds between looks (default 30)
#   WORKER                whose log `logs` follows (default 0)
set -uo pipefail
SLICES=${SLICES:-1}
POLL=${POLL:-30}
MAX_RESTARTS=${MAX_RESTARTS:-100}

# What the workers run. They keep at home: sdjax/ (the repository), sdjax.log, sdjax.job (the process that
# waits for the run), sdjax.pid (the run), sdjax.exit (its exit code, written before sdjax.job ends).
# A Python of its own, since the image's may be older than sdjax needs.
INSTALL=$(
  cat <<'END'
set -e
rm -rf sdjax/sdjax sdjax/configs
mkdir -p sdjax
tar xzf sdjax.tar.gz -C sdjax
[ -x .local/bin/uv ] || curl -LsSf https://astral.sh/uv/install.sh | sh
cd sdjax
[ -x .venv/bin/python ] || ../.local/bin/uv venv --quiet --python 3.12 .venv
../.local/bin/uv pip install --quiet --python .venv/bin/python -e '.[tpu]'
cd
END
)
CLEAR=$(
  cat <<'END'
if [ ! -e sdjax.exit ] && [ -e sdjax.job ] && kill -0 "$(cat sdjax.job)" 2>/dev/null; then
  echo 'already running; launch/tpu_vm.sh stop ends it' >&2
  exit 1
fi
rm -f sdjax.exit sdjax.job sdjax.pid
END
)
# One word per worker: new, installed, running, exit:CODE, or lost (the machine went down meanwhile).
PROBE=$(
  cat <<'END'
if [ -e sdjax.exit ]; then echo "sdjax:exit:$(cat sdjax.exit)"
elif [ -e sdjax.job ] && kill -0 "$(cat sdjax.job)" 2>/dev/null; then echo sdjax:running
elif [ -e sdjax.exit ]; then echo "sdjax:exit:$(cat sdjax.exit)" # it ended just now
elif [ -e sdjax.job ]; then echo sdjax:lost
elif [ -e sdjax.installed ]; then echo sdjax:installed
else echo sdjax:new
fi
END
)
STOP=$(
  cat <<'END'
kill -TERM "$(cat sdjax.pid)"
END
)

fail() {
  echo "launch/tpu_vm.sh: $*" >&2
  exit 2
}

show() { # a command, quoted so that it can be pasted
  local word line=+ quote="'\\''"
  for word in "$@"; do
    [[ "$word" =~ ^[A-Za-z0-9_./:=@,+-]+$ ]] || word="'${word//\'/$quote}'"
    line+=" $word"
  done
  echo "$line" >&2
}

tpus() { # gcloud compute tpus ..., in the zone and project
  local command=(gcloud compute tpus "$@" --zone="$ZONE" ${PROJECT:+--project="$PROJECT"} --quiet)
  show "${command[@]}"
  [ -n "${DRY_RUN:-}" ] || "${command[@]}"
}

nodes() { # the TPU VMs of the queued resource, one per slice
  if [ "$SLICES" -eq 1 ]; then
    echo "$NAME"
  else
    for ((i = 0; i < SLICES; i++)); do echo "$NAME-$i"; done
  fi
}

on_all_workers() { # a shell command, on every worker of every slice at once
  local node pid pids=() failed=0
  for node in $(nodes); do
    if [ -n "${DRY_RUN:-}" ]; then
      tpus tpu-vm ssh "$node" --worker=all --command="$1" # in order
    else
      tpus tpu-vm ssh "$node" --worker=all --command="$1" &
      pids+=($!)
    fi
  done
  [ -z "${DRY_RUN:-}" ] || return 0
  for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
  return $failed
}

runtime() {
  case $ACCELERATOR in
    v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) fail "ACCELERATOR is '$ACCELERATOR': no known runtime for it; set RUNTIME" ;;
  esac
}

create() {
  local options=()
  [ -n "${ACCELERATOR:-}" ] || fail "ACCELERATOR is not set; for instance ACCELERATOR=v5p-256"
  RUNTIME=${RUNTIME:-$(runtime)} || exit 2
  if [ "$SLICES" -eq 1 ]; then
    options+=(--node-id="$NAME")
  else
    options+=(--node-count="$SLICES" --node-prefix="$NAME")
  fi
  [ "${SPOT:-0}" != 1 ] || options+=(--spot)
  [ "${RESERVED:-0}" != 1 ] || options+=(--reserved)
  [ -z "${NETWORK:-}" ] || options+=(--network="$NETWORK")
  [ -z "${SUBNETWORK:-}" ] || options+=(--subnetwork="$SUBNETWORK")
  [ -z "${SERVICE_ACCOUNT:-}" ] || options+=(--service-account="$SERVICE_ACCOUNT")
  tpus queued-resources create "$NAME" --accelerator-type="$ACCELERATOR" \
    --runtime-version="$RUNTIME" "${options[@]}" ||
    fail "gcloud refused the request (see above); quotas: https://cloud.google.com/tpu/docs/quota"
}

delete() { tpus queued-resources delete "$NAME" --force; }

state() { # ACTIVE, WAITING_FOR_RESOURCES, SUSPENDED ...; ABSENT; UNKNOWN when gcloud cannot say
  local answer errors
  errors=$(mktemp)
  if answer=$(tpus queued-resources describe "$NAME" --format='value(state.state)' 2>"$errors"); then
    echo "${answer:-UNKNOWN}"
  elif grep -qi 'not.found' "$errors"; then
    echo ABSENT
  else
    cat "$errors" >&2
    echo UNKNOWN
  fi
  rm -f "$errors"
}

wait_active() {
  local now
  if [ -n "${DRY_RUN:-}" ]; then
    tpus queued-resources describe "$NAME" --format='value(state.state)'
    return
  fi
  while now=$(state) && [ "$now" != ACTIVE ]; do
    case $now in
      FAILED | SUSPENDED | ABSENT) fail "the queued resource $NAME is $now; delete and create it" ;;
    esac
    echo "launch/tpu_vm.sh: $NAME is $now" >&2
    sleep "$POLL"
  done
}

install() { # what is committed, on every worker
  local folder node
  cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
  git diff --quiet HEAD || echo "launch/tpu_vm.sh: warning: uncommitted changes stay here" >&2
  folder=$(mktemp -d)
  git archive --format=tar.gz --output="$folder/sdjax.tar.gz" HEAD || fail "git archive failed"
  for node in $(nodes); do
    tpus tpu-vm scp "$folder/sdjax.tar.gz" "$node:" --worker=all || return 1
  done
  rm -rf "$folder"
  on_all_workers "$INSTALL"$'\n'"${SETUP:-:}"$'\n'"touch sdjax.installed"
}

check_workdir() {
  [ "${SHARED_WORKDIR:-0}" = 1 ] || [[ " $*" == *" --workdir=gs://"* ]] ||
    fail "--workdir has to be a gs:// path, which all workers share and which outlives the slice" \
      "(or set SHARED_WORKDIR=1 if yours is a mount that they share)"
}

run() { # start sdjax.main on all workers, in the background there
  local job
  check_workdir "$@"
  # shellcheck disable=SC2016  # the workers expand what stands in single quotes
  job='echo $$ >sdjax.job; (cd sdjax; echo $BASHPID >../sdjax.pid; exec '
  job+=".venv/bin/python -u -m sdjax.main --cluster=tpu$(printf ' %q' "$@")) >sdjax.log 2>&1; "
  job+='echo $? >sdjax.exit.new; mv sdjax.exit.new sdjax.exit'
  job="setsid nohup bash -c $(printf %q "$job") >/dev/null 2>&1 </dev/null &"
  on_all_workers "$CLEAR"$'\n'"$job"$'\n''until [ -s sdjax.pid ]; do sleep 0.1; done'
}

probe() { # nothing and false if a worker does not answer
  local answer
  answer=$(on_all_workers "$PROBE" 2>/dev/null) || return 1
  grep -o 'sdjax:[a-z]*:\{0,1\}[0-9]*' <<<"$answer" | sed 's/^sdjax://'
}

status() {
  tpus queued-resources describe "$NAME" --format='value(state.state)'
  on_all_workers "$PROBE"
}

preempted() { # whether a node of the active queued resource is gone
  local node
  for node in $(nodes); do
    case $(tpus tpu-vm describe "$node" --format='value(state)' 2>&1) in
      *PREEMPTED* | *TERMINATED* | *NOT_FOUND*) return 0 ;;
    esac
  done
  return 1
}

worst() { # of the words of PROBE: the code of a mistake, or 76 for anything worth another run, or 0
  local word code result=0
  for word in "$@"; do
    code=${word#exit:}
    if [ "$word" = lost ] || [ "$code" = 75 ] || [ "$code" = 76 ] || [ "$code" -ge 128 ]; then
      result=76
    elif [ "$code" -ne 0 ]; then
      echo "$code"
      return
    fi
  done
  echo $result
}

# Once more if ssh failed for a worker: the others would wait for it in vain. Those that run refuse.
start() { run "$@" || run "$@"; }

attend() { # one look at an ACTIVE slice; exits when the run is over
  local words code
  if ! words=$(probe) || [ -z "$words" ]; then
    if preempted; then
      echo "launch/tpu_vm.sh: $NAME was preempted" >&2
      delete
    else
      echo "launch/tpu_vm.sh: not every worker of $NAME answers" >&2
    fi
    return
  fi
  if grep -q '^new' <<<"$words"; then
    install && start "$@"
  elif grep -q '^installed' <<<"$words"; then
    start "$@"
  elif grep -q '^running' <<<"$words"; then
    return
  else
    # shellcheck disable=SC2086  # one word per worker
    code=$(worst $words)
    if [ "$code" -ne 76 ]; then
      echo "launch/tpu_vm.sh: the run ended with $code; the slice costs until:" \
        "launch/tpu_vm.sh delete" >&2
      exit "$code"
    fi
    if [ $((restarts += 1)) -gt "$MAX_RESTARTS" ]; then
      echo "launch/tpu_vm.sh: $MAX_RESTARTS restarts; giving up, see: launch/tpu_vm.sh logs" >&2
      exit "$code"
    fi
    echo "launch/tpu_vm.sh: interrupted; restart $restarts" >&2
    start "$@"
  fi
}

watch() {
  local now restarts=0
  check_workdir "$@"
  if [ -n "${DRY_RUN:-}" ]; then
    create && wait_active && install && run "$@" && on_all_workers "$PROBE"
    echo "# after preemption (SUSPENDED), and then from the top:" >&2
    delete
    return
  fi
  while :; do
    now=$(state)
    case $now in
      ABSENT) create ;;
      SUSPENDED)
        echo "launch/tpu_vm.sh: $NAME was preempted" >&2
        delete && create
        ;;
      FAILED)
        fail "the request failed; gcloud compute tpus queued-resources describe $NAME" \
          "--zone=$ZONE says why. Then: launch/tpu_vm.sh delete"
        ;;
      ACTIVE) attend "$@" ;;
      *) echo "launch/tpu_vm.sh: $NAME is $now" >&2 ;;
    esac
    sleep "$POLL"
  done
}

verb=${1:-}
[ $# -eq 0 ] || shift
case $verb in
  create | wait | install | run | status | logs | stop | delete | watch) ;;
  *) fail "usage: launch/tpu_vm.sh create|wait|install|run|status|logs|stop|delete|watch [flags]" ;;
esac
[ -n "${NAME:-}" ] || fail "NAME is not set; for instance NAME=sd21"
[ -n "${ZONE:-}" ] || fail "ZONE is not set; for instance ZONE=us-east5-a"
[[ "$NAME" =~ ^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$ ]] ||
  fail "NAME is '$NAME'; expected lower-case letters, digits and hyphens, a letter first (Cloud TPU's rule)"
[[ "$ZONE" =~ ^[a-z0-9-]+$ ]] || fail "ZONE is '$ZONE'; expected a zone, such as us-east5-a"
[[ "$POLL" =~ ^[0-9]{1,5}(\.[0-9]+)?$ ]] || fail "POLL is '$POLL'; expected seconds"
for setting in SLICES MAX_RESTARTS WORKER; do # the shell's arithmetic would run what is no number
  [[ "${!setting:-0}" =~ ^[0-9]{1,5}$ || "$setting ${!setting:-}" = "WORKER all" ]] ||
    fail "$setting is '${!setting}'; expected a whole number"
done
[ "$SLICES" -ge 1 ] || fail "SLICES is '$SLICES'; expected at least 1"
if [ -z "${DRY_RUN:-}" ] && ! command -v gcloud >/dev/null; then
  fail "gcloud is not there: https://cloud.google.com/sdk/docs/install (DRY_RUN=1 works without)"
fi
case $verb in
  wait) wait_active ;;
  stop) on_all_workers "$STOP" ;;
  logs) tpus tpu-vm ssh "$(nodes | head -n 1)" --worker="${WORKER:-0}" --command='tail -n 100 -F sdjax.log' ;;
  *) "$verb" "$@" ;;
esac
