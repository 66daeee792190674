#!/usr/bin/env bash
# What runs the aarch64 build under QEMU on a machine of another kind: nothing is installed, root is not needed.
#
#   tests/aarch64/prepare.sh FOLDER PYTHON
#
# Fetches QEMU, a Python and our dependencies for aarch64 into FOLDER once; builds a wheel with
# aarch64-linux-gnu-g++, and lays the tests beside it. PYTHON: one with pip and what `dev` names.
# Exit status 75: it cannot be had here.
set -euo pipefail

mkdir -p "$1"
folder=$(cd "$1" && pwd) python=$2
repository=$(cd "$(dirname "$0")/../.." && pwd)
# Debian 12's own QEMU shows the host's /proc/cpuinfo, on which onnxruntime ends.
emulator=qemu-user/bookworm-backports
packages=(libc6 libstdc++6 libgcc-s1 python3.11-minimal libpython3.11-minimal libpython3.11-stdlib zlib1g libexpat1 libssl3
  libffi8 libsqlite3-0 liblzma5 libbz2-1.0 libuuid1 libcrypt1 libncursesw6 libtinfo6 libreadline8 libdb5.3 libgomp1)
wheels=(numpy scipy onnx onnx-ir onnxruntime safetensors tokenizers click rich psutil ml_dtypes jinja2 pytest hypothesis)

cannot() {
  echo "aarch64 could not be set up ($1): its tests are left out" >&2
  exit 75
}

# apt for an architecture, with sources, lists and a cache of its own, and no package installed.
apt() {
  local architecture=$1 place="$folder/$1"
  shift
  apt-get -q -y -o APT::Architecture="$architecture" -o APT::Architectures="$architecture" -o Debug::NoLocking=1 \
    -o Dir::Etc::SourceList="$folder/sources.list" -o Dir::Etc::SourceParts=- -o APT::Sandbox::User=root \
    -o Dir::State="$place" -o Dir::State::status="$place/status" -o Dir::Cache="$place/cache" "$@" >>"$folder/log" 2>&1
}

unpack() { # ARCHITECTURE INTO PACKAGE...
  local architecture=$1 into=$2
  shift 2
  mkdir -p "$folder/$architecture"/{lists/partial,cache/archives/partial} "$into"
  touch "$folder/$architecture/status"
  apt "$architecture" update || cannot "apt-get update failed, see $folder/log"
  (cd "$folder/$architecture" && apt "$architecture" download "$@") || cannot "no packages, see $folder/log"
  for file in "$folder/$architecture"/*.deb; do
    dpkg -x "$file" "$into"
  done
  rm -rf "${folder:?}/$architecture"
}

command -v apt-get >/dev/null && command -v dpkg >/dev/null || cannot "no apt-get here"
command -v aarch64-linux-gnu-g++ >/dev/null || cannot "no aarch64-linux-gnu-g++; on Debian: g++-aarch64-linux-gnu"
if [ ! -e "$folder/done" ]; then
  key="[signed-by=/usr/share/keyrings/debian-archive-keyring.gpg]"
  for suite in bookworm bookworm-updates bookworm-backports; do
    echo "deb $key http://deb.debian.org/debian $suite main"
  done >"$folder/sources.list"
  unpack "$(dpkg --print-architecture)" "$folder/host" "$emulator"
  unpack arm64 "$folder/root" "${packages[@]}"
  platforms=(--platform any)
  for glibc in _2_28 _2_27 _2_17 2014; do
    platforms+=(--platform "manylinux${glibc}_aarch64")
  done
  "$python" -m pip install -q --target "$folder/site" --only-binary=:all: --python-version 3.11 --implementation cp \
    "${platforms[@]}" -c "$repository/constraints.txt" "${wheels[@]}" >>"$folder/log" 2>&1 || cannot "no wheels, see $folder/log"
  touch "$folder/done"
fi
# What a test starts by `sys.executable` is emulated, too.
echo "import os, sys; sys.executable = os.environ['EMULATED']" >"$folder/site/sitecustomize.py"

# The wheel of aarch64 is built here. Tests lie beside the package that is in it.
rm -rf "$folder/source" "$folder/wheel"
mkdir "$folder/source"
cp -r "$repository"/{tests,docs,examples,benchmarks,native,pyproject.toml} "$folder/source"
cross="-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++"
_PYTHON_HOST_PLATFORM=linux-aarch64 CMAKE_ARGS="$cross" "$python" -m pip wheel -q --no-deps --no-build-isolation \
  -w "$folder/wheel" "$repository"
"$python" -m zipfile -e "$folder"/wheel/dijiang-*-py3-none-linux_aarch64.whl "$folder/source"
