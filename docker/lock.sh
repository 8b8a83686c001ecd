#!/usr/bin/env bash
# Make the locks from which the images are installed: every package with its hashes, at the versions in constraints.txt.
# Needs uv (pip install uv). Run it when constraints.txt, pyproject.toml or docker/*.in change.
set -euo pipefail
cd "$(dirname "$0")/.."
options=(--constraints constraints.txt --generate-hashes --python-version 3.11 --python-platform x86_64-manylinux_2_28
    --no-config --quiet --custom-compile-command docker/lock.sh)
uv pip compile "${options[@]}" docker/build.in -o docker/build.lock
uv pip compile "${options[@]}" docker/cpu.in -o docker/cpu.lock
uv pip compile "${options[@]}" --extra cluster --extra s3 pyproject.toml -o docker/train.lock
