#!/usr/bin/env bash
# The compiled operator under sanitizers: sanitize.sh FOLDER PYTHON [TESTS...]; 75: they are not here.
# ThreadSanitizer runs tests/native/race.py alone.
set -euo pipefail
folder=$1 python=$2
shift 2
source tests/native/under.sh

build address address,undefined native
said=$(under address libasan.so "$python" -m tests.native.canary 2>&1) && { echo "The canary was not noticed"; exit 1; }
grep -q "AddressSanitizer: heap-buffer-overflow" <<<"$said" || { echo "$said"; exit 1; }
under address libasan.so "$python" -m pytest -q -p no:cacheprovider "$@"
build thread thread native
under thread libtsan.so "$python" -m tests.native.race
