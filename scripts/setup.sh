#!/bin/sh
# Makes the virtual environment hold exactly what is locked: setup.sh VENV LEVEL [LOCK ...]
#
# Does nothing when that is so already: VENV/.LEVEL keeps a copy of what it was made from. Works with any
# POSIX shell and any Python >= 3.11; set PYTHON to choose one.
set -eu

venv=$1 level=$2
shift 2

fail() {
    printf 'glassbus: %s\n' "$*" >&2
    exit 1
}

enough='import sys; sys.exit(sys.version_info < (3, 11))'

find_python() {
    # Newest names last: the machine's own python3 is what its owner maintains.
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python}; do
        if "$candidate" -c "$enough" >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    done
    if [ -n "${PYTHON:-}" ]; then
        fail "PYTHON=$PYTHON is not a Python >= 3.11"
    fi
    found=$(python3 --version 2>/dev/null || echo 'no python3')
    fail "Python 3.11 or later is needed, and this machine has $found." \
        "Debian: apt install python3 python3-venv. macOS: brew install python. Or: make PYTHON=/path/to/python ..."
}

state() {
    # Everything the environment depends on, so that a change of any of it is seen.
    "$venv/bin/python" --version
    pwd
    cat pyproject.toml
    for lock in "$@"; do cat "requirements/$lock.txt"; done
}

if [ -x "$venv/bin/python" ] && "$venv/bin/python" -c "$enough" 2>/dev/null; then
    if state "$@" 2>&1 | cmp -s - "$venv/.$level"; then
        exit 0
    fi
else
    # Missing, or left behind by a Python that has gone.
    python=$(find_python)
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        fail "$("$python" --version) has no venv module. Debian: apt install python3-venv"
    echo "glassbus: making $venv with $("$python" --version)"
    rm -rf "$venv"
    "$python" -m venv "$venv"
fi

echo "glassbus: installing locked packages ($*)"
rm -f "$venv/.$level"
for lock in "$@"; do
    "$venv/bin/python" -m pip install --disable-pip-version-check --quiet --require-hashes -r "requirements/$lock.txt" ||
        fail "installing requirements/$lock.txt failed; is the package index reachable?"
done
"$venv/bin/python" -m pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation --editable .
state "$@" >"$venv/.$level"
