#!/usr/bin/env bash
# Makes the environment of a node, .venv in the folder above, in the tested versions. Where there is an NVIDIA GPU those are
# deploy/constraints-gpu.txt's, with PyTorch for CUDA and the kernel libraries, else constraints.txt's, with PyTorch's
# build for CPUs. Nothing happens while what was installed is what would be. Called by the cluster files and the Dockerfile:
#   install.sh [gpu|cpu] [MORE PACKAGES]
set -euo pipefail
cd "$(dirname "$0")/.."

device=${1:-auto}
shift || true
[ "$device" != auto ] || { command -v nvidia-smi >/dev/null && device=gpu || device=cpu; }
case $device in
  gpu) pins=deploy/constraints-gpu.txt what='.[gpu]' index=() ;;
  cpu) pins=constraints.txt what=. index=(--extra-index-url https://download.pytorch.org/whl/cpu) ;;
  *) echo "install.sh: gpu or cpu, not $device" >&2; exit 2 ;;
esac
cmp -s "$pins" .venv/installed && exit

for python in python3.13 python3.12 python3.11 python3.14 python3; do
  if "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null; then break; fi
  python=
done
[ -n "$python" ] || { echo "install.sh: Baton needs Python 3.11 to 3.14" >&2; exit 1; }
"$python" -m venv .venv
.venv/bin/pip install -q -c "$pins" "${index[@]}" -e "$what" "$@"
cp "$pins" .venv/installed
