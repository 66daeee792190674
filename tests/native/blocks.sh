#!/usr/bin/env bash
# The kernels for GPUs with a thread of the CPU for each of a block's, under sanitizers: blocks.sh FOLDER PYTHON [every]
# A barrier that is missing is a race of threads, and too much shared memory is past the end of memory.
# every: without any one of their barriers there has to be a race, too. 75: the sanitizers are not here.
set -euo pipefail
folder=$1 python=$2 every=${3-}
source tests/native/under.sh
few="meets_float64 and (head-64 or 41-tokens or sharing or norm)"

tested() { # KIND PRELOADED
  timeout 300 bash -c "$(declare -f library under); folder=$folder; under $1 $2 $python -m pytest -q -x -n0 \
    -p no:cacheprovider tests/native/test_cuda.py -k '$few'"
}
build blocks-address address,undefined native -DDIJIANG_CUDA_THREADS=ON
tested blocks-address libasan.so
build blocks-thread thread native -DDIJIANG_CUDA_THREADS=ON
tested blocks-thread libtsan.so
[ "$every" = every ] || exit 0

rm -rf "$folder/native"
cp -r native "$folder/native"
kernels=$folder/native/cuda/kernels.cu
for line in $(grep -n '^ *SYNC();$' native/cuda/kernels.cu | cut -d: -f1); do
  sed "${line}s/SYNC();//" native/cuda/kernels.cu >"$kernels"
  build blocks-broken thread "$folder/native" -DDIJIANG_CUDA_THREADS=ON
  if tested blocks-broken libtsan.so >/dev/null 2>&1; then
    echo "native/cuda/kernels.cu:$line: without this barrier no test fails" >&2
    exit 1
  fi
  echo "native/cuda/kernels.cu:$line: missed where it is left out"
done
