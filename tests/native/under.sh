# For sourcing, with FOLDER and PYTHON set: the compiled operator, built and run with sanitizers.
# Ends with 75 where the compiler or its sanitizers are not here.
# ONNX Runtime and Python are not instrumented: leaks are not looked for, and what ThreadSanitizer finds in their own
# threads, whose locks it cannot see, is left out.
library() { c++ -print-file-name="$1"; }
[ -e "$(library libasan.so)" ] && [ -e "$(library libtsan.so)" ] && command -v cmake >/dev/null || exit 75

build() { # KIND SANITIZERS SOURCE [OPTIONS OF CMAKE...]
  cmake -S "$3" -B "$folder/$1" -DCMAKE_BUILD_TYPE=RelWithDebInfo -DDIJIANG_SANITIZE="$2" "${@:4}" >/dev/null
  cmake --build "$folder/$1" --parallel 2 >/dev/null
}
under() { # KIND PRELOADED COMMAND...
  local kind=$1 preloaded=$2
  shift 2
  env LD_PRELOAD="$(library "$preloaded"):$(library libstdc++.so)" PYTHONPATH=tests/native/site \
    DIJIANG_SANITIZED="$(realpath "$folder")/$kind/_native.so" ASAN_OPTIONS=detect_leaks=0 \
    UBSAN_OPTIONS=print_stacktrace=1 TSAN_OPTIONS=halt_on_error=1:ignore_noninstrumented_modules=1 setarch -R "$@"
}
