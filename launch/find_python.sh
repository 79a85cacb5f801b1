#!/bin/sh
# Print the path of a Python that is new enough, or say what to install and fail.
# Megatron-core's wheels need 3.12. A name on PATH proves nothing (a pyenv shim exists also for
# versions that are switched off), so every candidate is run.
set -u

new_enough() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1
}

for candidate in python3.12 python3.13 python3.14 python3 python; do
    path=$(command -v "$candidate" 2>/dev/null) || continue
    if new_enough "$path"; then
        # The interpreter itself, not a shim, which may point elsewhere tomorrow.
        "$path" -c 'import sys; print(sys.executable)'
        exit 0
    fi
done

for path in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.*/bin/python; do
    if [ -x "$path" ] && new_enough "$path"; then
        echo "$path"
        exit 0
    fi
done

echo "No Python >= 3.12 with venv found (looked on PATH and in pyenv): install one, for example" \
    "'apt install python3.12-venv' or 'pyenv install 3.12', and run make again." >&2
exit 1
