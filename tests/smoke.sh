#!/usr/bin/env bash
# Tries an installed sdjax from the outside: the recipes by name, the command `sdjax`, two steps of
# training, a picture, an export and a report, in an empty folder, with no clone in sight.
#
#     tests/smoke.sh PYTHON      # of the environment that it is installed in
set -euo pipefail
python=$(realpath --no-symlinks "$1")
sdjax=$(dirname "$python")/sdjax
unset PYTHONPATH
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

"$python" -c 'import sdjax, sys; assert sdjax.__file__.startswith(sys.prefix), sdjax.__file__'
"$sdjax" --version
"$sdjax" --help >help.txt
grep --quiet evaluate help.txt
few=(--config.data.data_dir="$work/data" --config.data.shapes_train=64 --config.data.shapes_test=16)
"$python" -m sdjax.main --config=base --dry_run "${few[@]}" >dry_run.txt
grep --quiet resolution dry_run.txt
"$sdjax" main --config=base --workdir=run "${few[@]}" --config.compilation_cache="$work/cache" \
  --config.train.steps=2 --config.train.log_every=1 --config.validation.examples=0 \
  --config.sample.fidelity=0 --config.sample.sampler.steps=2
"$sdjax" sample --model=run --prompts="a red circle" --steps=2 --output=out
"$sdjax" convert --input=run --output=model.safetensors
"$sdjax" report --workdir=run
for file in run/metrics.jsonl run/diffusers/model_index.json run/report.html out/00000.png \
  model.safetensors; do
  test -s "$file" || { echo "error: $file is not there or empty" >&2; exit 1; }
done
status=0
"$sdjax" main --config=bas --workdir=run 2>error.txt || status=$?
test "$status" = 2 && grep --quiet 'did you mean base' error.txt
echo "smoke test passed: $("$python" --version), $("$sdjax" --version)"
