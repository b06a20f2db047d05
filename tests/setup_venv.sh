#!/bin/sh
# Make a virtual environment: setup_venv.sh PYTHON FOLDER. Says in words what is missing where it cannot.
set -eu
python=$1
folder=$2
if ! command -v "$python" >/dev/null 2>&1; then
    echo "✗ $python is not installed. On Debian or Ubuntu: apt-get install python3 python3-venv" >&2
    exit 2
fi
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "✗ Python 3.11 or newer is needed; $python is $("$python" -V 2>&1). Name another: make PYTHON=python3.12 …" >&2
    exit 2
fi
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    # Debian keeps venv in a package of its own.
    package="python$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv"
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
        echo "Installing $package, which this Python lacks …"
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$package" >/dev/null
    else
        echo "✗ This Python has no venv. Run: sudo apt-get install $package" >&2
        exit 2
    fi
fi
"$python" -m venv "$folder"
