#!/bin/sh
# Print the path of a Python that fits, or say what to install and fail.
# Megatron-core has wheels for 3.12 and 3.13. A name on PATH proves nothing (a pyenv shim exists also for
# versions that are switched off), so every candidate is run.
set -u

fits() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 12) <= sys.version_info < (3, 14))' >/dev/null 2>&1
}

for candidate in python3.12 python3.13 python3 python; do
    path=$(command -v "$candidate" 2>/dev/null) || continue
    if fits "$path"; then
        # The interpreter itself, not a shim, which may point elsewhere tomorrow.
        "$path" -c 'import sys; print(sys.executable)'
        exit 0
    fi
done

for path in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[23].*/bin/python; do
    if [ -x "$path" ] && fits "$path"; then
        echo "$path"
        exit 0
    fi
done

echo "No Python 3.12 or 3.13 with venv found (looked on PATH and in pyenv): install one, for example" \
    "'apt install python3.12-venv' or 'pyenv install 3.12', and run make again." >&2
exit 1
