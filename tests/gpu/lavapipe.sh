#!/usr/bin/env bash
# Mesa's lavapipe, a Vulkan driver that needs no GPU, unpacked into a folder: nothing is installed, root is not needed.
#
#   tests/gpu/lavapipe.sh FOLDER      fetches it once, and prints the environment in which it is found
#
# Debian 12's own Mesa is too old for Dawn, so it is that of bookworm-backports. Exit status 75: it cannot be had here.
set -euo pipefail

mkdir -p "$1"
folder=$(cd "$1" && pwd)
packages=(mesa-vulkan-drivers/bookworm-backports libdrm2/bookworm-backports libdrm-amdgpu1/bookworm-backports libvulkan1)

cannot() {
  echo "lavapipe could not be set up ($1): the tests on WebGPU are left out" >&2
  exit 75
}

# apt with sources, lists and a cache of its own; what is installed already need not be fetched.
apt() {
  apt-get -q -y -o Dir::Etc::SourceList="$folder/sources.list" -o Dir::Etc::SourceParts=- \
    -o Dir::State::Lists="$folder/lists" -o Dir::Cache="$folder/cache" -o Dir::Cache::Archives="$folder/debs" \
    -o Debug::NoLocking=1 -o APT::Sandbox::User=root -o APT::Install-Recommends=0 -o APT::Keep-Downloaded-Packages=1 "$@"
}

if [ ! -e "$folder/done" ]; then
  command -v apt-get >/dev/null && command -v dpkg >/dev/null || cannot "no apt-get here"
  rm -rf "$folder/root" "$folder/debs"
  mkdir -p "$folder"/{root,lists/partial,cache,debs/partial}
  key="[signed-by=/usr/share/keyrings/debian-archive-keyring.gpg]"
  for suite in bookworm bookworm-updates bookworm-backports; do
    echo "deb $key http://deb.debian.org/debian $suite main"
  done >"$folder/sources.list"
  apt update >"$folder/log" 2>&1 || cannot "apt-get update failed, see $folder/log"
  apt install --download-only "${packages[@]}" >>"$folder/log" 2>&1 || cannot "apt-get found no packages, see $folder/log"
  for file in "$folder"/debs/*.deb; do
    dpkg -x "$file" "$folder/root"
  done
  rm -rf "$folder"/{lists,cache,debs}
  touch "$folder/done"
fi

library=$(find "$folder/root" -name libvulkan_lvp.so | head -n 1)
[ -n "$library" ] || cannot "the package has no libvulkan_lvp.so"
printf '{"file_format_version": "1.0.0", "ICD": {"library_path": "%s", "api_version": "1.4.305"}}\n' "$library" \
  >"$folder/lavapipe.json"
mkdir -p "$folder/shaders"
cat <<END
VK_ICD_FILENAMES=$folder/lavapipe.json
LD_LIBRARY_PATH=$(dirname "$library")${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
MESA_SHADER_CACHE_DIR=$folder/shaders
ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER=1
END
