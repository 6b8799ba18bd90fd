#!/usr/bin/env bash
# Runs make targets as someone on Debian 13 would, with its Python 3.13 and the newest releases of
# everything: in a root that debootstrap makes, entered by chroot, on a copy of this clone.
#
#     tests/newest.sh ROOT [TARGET ...]      # the root is kept and used again; by default: test
#
# PIP_INDEX_URL and PIP_EXTRA_INDEX_URL are passed on: on most indexes torch is gigabytes of CUDA, and
# one that has its CPU build saves them.
#
# Where that cannot be (no root rights, no debootstrap, no Linux) it says so and ends with 0.
set -euo pipefail
root=${1:?"expected the folder of the root"}
shift
cd "$(dirname "$0")/.."
skip() { echo "skipped: $1"; exit 0; }
[ "$(uname -s)" = Linux ] || skip "chroot and debootstrap are Linux's"
[ "$(id -u)" = 0 ] || skip "chroot needs root rights"
command -v debootstrap >/dev/null || skip "debootstrap is not installed (apt-get install debootstrap)"

mkdir -p "$root"
root=$(cd "$root" && pwd)
if [ ! -e "$root/.made" ]; then
  debootstrap --variant=minbase --include=python3,python3-venv,make,git,ca-certificates \
    trixie "$root"
  touch "$root/.made"
fi
# What is not in the repository: how this machine finds its packages.
for file in /etc/resolv.conf /etc/hosts /etc/pip.conf; do
  if [ -e "$file" ]; then cp -L "$file" "$root$file"; fi
done
cp -r /etc/ssl/certs "$root/etc/ssl/"
# TensorFlow looks at /proc, the compiler for TPU counts the processors in /sys and ends the process
# where it cannot, tests open terminals and shared memory.
mounted=()
trap 'for folder in "${mounted[@]}"; do umount "$folder"; done' EXIT
mount -t proc proc "$root/proc" 2>/dev/null || skip "nothing can be mounted here"
mounted=("$root/proc")
mount -t sysfs -o ro sysfs "$root/sys" || skip "/sys cannot be mounted in $root"
mounted=("$root/sys" "${mounted[@]}")
for folder in /dev /dev/pts /dev/shm; do
  mount --bind "$folder" "$root$folder" || skip "$folder cannot be mounted in $root"
  mounted=("$root$folder" "${mounted[@]}")
done

# The files that git knows or does not ignore, as they are now; environments stay from last time.
mkdir -p "$root/sdjax"
git ls-files -z --cached --others --exclude-standard | while IFS= read -r -d '' file; do
  if [ -e "$file" ]; then printf '%s\0' "$file"; fi
done | tar --create --null --files-from=- | tar --extract --directory="$root/sdjax"
indexes=()
for name in PIP_INDEX_URL PIP_EXTRA_INDEX_URL; do
  if [ -n "${!name:-}" ]; then indexes+=("$name=${!name}"); fi
done
chroot "$root" /usr/bin/env -i "${indexes[@]}" HOME=/root PATH=/usr/local/bin:/usr/bin:/bin LANG=C.UTF-8 \
  PYTHONUNBUFFERED=1 make -C /sdjax "${@:-test}"
