# Makes the environment of this repository in .venv (once; again when requirements.txt changes) and sets $PYTHON.
# Meant to be sourced:  source scripts/setup_env.sh
#   BASE_PYTHON  the interpreter to start from, 3.10 or newer   [python3]
#   VENV         where the environment goes                     [.venv in the repository]
repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${VENV:-$repository/.venv}"
PYTHON="$VENV/bin/python"
wanted="$(cksum < "$repository/requirements.txt")"

if [ "$(cat "$VENV/requirements.cksum" 2>/dev/null)" != "$wanted" ]; then
    base="${BASE_PYTHON:-python3}"
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
        echo "error: $base is older than Python 3.10 or missing; set BASE_PYTHON to a newer one" >&2
        exit 1
    }
    echo "== environment: installing requirements.txt into $VENV (a few minutes, about 6 GB: torch brings its CUDA build)"
    rm -rf "$VENV"
    "$base" -m venv "$VENV"
    "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$repository/requirements.txt"
    "$PYTHON" -c 'import torchvision' 2>/dev/null || {
        echo "error: torch and torchvision in $VENV are not a pair: torch 2.14.1 goes with torchvision 0.29.1;" \
            "remove $VENV and install both from the same index" >&2
        exit 1
    }
    echo "$wanted" > "$VENV/requirements.cksum"
else
    echo "== environment: $VENV is up to date"
fi
