#!/usr/bin/env bash
# The compiled operator under sanitizers: sanitize.sh FOLDER PYTHON [TESTS...]
# 75: the compiler or its sanitizers are not here.
# ONNX Runtime and Python are not instrumented: leaks are not looked for, and ONNX Runtime's own threads, whose locks
# ThreadSanitizer cannot see, are left out. There it runs tests/native/race.py alone.
set -euo pipefail
folder=$1 python=$2
shift 2
library() { c++ -print-file-name="$1"; }
[ -e "$(library libasan.so)" ] && [ -e "$(library libtsan.so)" ] && command -v cmake >/dev/null || exit 75

build() { # KIND SANITIZERS
  cmake -S native -B "$folder/$1" -DCMAKE_BUILD_TYPE=RelWithDebInfo -DDIJIANG_SANITIZE="$2" >/dev/null
  cmake --build "$folder/$1" --parallel 2 >/dev/null
}
under() { # KIND PRELOADED COMMAND...
  local kind=$1 preloaded=$2
  shift 2
  env LD_PRELOAD="$(library "$preloaded"):$(library libstdc++.so)" PYTHONPATH=tests/native/site \
    DIJIANG_SANITIZED="$PWD/$folder/$kind/_native.so" ASAN_OPTIONS=detect_leaks=0 \
    UBSAN_OPTIONS=print_stacktrace=1 TSAN_OPTIONS=halt_on_error=1:ignore_noninstrumented_modules=1 "$@"
}

build address address,undefined
said=$(under address libasan.so "$python" -m tests.native.canary 2>&1) && { echo "The canary was not noticed"; exit 1; }
grep -q "AddressSanitizer: heap-buffer-overflow" <<<"$said" || { echo "$said"; exit 1; }
under address libasan.so "$python" -m pytest -q -p no:cacheprovider "$@"
build thread thread
under thread libtsan.so setarch -R "$python" -m tests.native.race
