#!/bin/sh
# Make .venv at the repository's root: both hosts, this package (editable), the hosts patched.
set -eu
cd "$(dirname "$0")/.."

if ! .venv/bin/python -c 'import sys; sys.exit(not (3, 12) <= sys.version_info < (3, 14))' >/dev/null 2>&1; then
    base=$(sh launch/find_python.sh)
    echo "Making .venv with $base"
    rm -rf .venv
    "$base" -m venv .venv
fi

echo "Installing torch, Megatron-core, DeepSpeed and this package into .venv:" \
    "about 4 minutes and 6 GB the first time"
.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'

# An older release, as published: the tests patch a copy of it.
old="megatron-core==0.18.2"
if ! ls .venv/wheels/megatron_core-0.18.2-*.whl >/dev/null 2>&1; then
    echo "Downloading $old for the patch tests"
    .venv/bin/python -m pip download --quiet --disable-pip-version-check --no-deps \
        --only-binary :all: --dest .venv/wheels "$old"
fi

echo "Patching the installed hosts"
if ! .venv/bin/mcore-monitors patch apply; then
    # This environment is ours: files that carry an older patch are simply installed anew.
    echo "Installing the hosts anew, then patching again"
    hosts=$(.venv/bin/python -m pip freeze | grep -E '^(megatron-core|deepspeed)==')
    # shellcheck disable=SC2086  # one word a host
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
        --force-reinstall $hosts
    .venv/bin/mcore-monitors patch apply
fi
echo "Done. Next: make test, or make demo"
