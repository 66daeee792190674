#!/usr/bin/env bash
# pytest under QEMU, in one process, in what `prepare.sh` made. How long something takes there says nothing.
# It has a core of its own: threads that wait for each other take most of the time of two emulated processors.
#
#   tests/aarch64/emulate.sh FOLDER CPU [PYTEST ARGUMENT...]
#
# CPU: one that QEMU knows.
set -euo pipefail

folder=$(cd "$1" && pwd) cpu=$2
shift 2
export EMULATED="$folder/python-$cpu" PYTHONPATH="$folder/site:$folder/source"
new=$(mktemp "$folder/python-XXXXXX") # several of these may run at once
cat >"$new" <<END
#!/bin/sh
exec "$folder/host/usr/bin/qemu-aarch64" -cpu $cpu -L "$folder/root" "$folder/root/usr/bin/python3.11" "\$@"
END
chmod +x "$new"
mv "$new" "$EMULATED"
for one in $(seq 0 $(($(nproc --all) - 1))); do
  taskset -c "$one" true 2>/dev/null || continue # not ours
  core=$one
  exec 9>"$folder/core-$core"
  flock -n 9 && break
done
flock 9 # held until this process ends
cd "$folder/source"
exec taskset -c "$core" "$EMULATED" -m pytest -p no:cacheprovider "$@"
