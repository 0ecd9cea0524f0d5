#!/bin/bash
# build-qemu.sh WORK_DIR SOURCES OUTPUT_DIR
#
# The QEMU that the rig is: qemu-system-x86 with its libraries, unpacked from the packages of
# SOURCES, a sources.list.  OUTPUT_DIR/qemu runs it; nothing is installed on this machine.
# Needs apt and dpkg-deb; ~10 s with a fast mirror, 40 MB.
#
# Not this machine's own: under Debian 12's QEMU 7.2 a process takes twice the time to start.
set -euo pipefail
[ $# = 3 ] || { sed -n '2,11p' "$0"; exit 2; }
mkdir -p "$1" "$3"; W=$(cd "$1" && pwd); L=$(realpath "$2"); O=$(cd "$3" && pwd)
mkdir -p "$W"/apt/state/lists/partial "$W"/apt/cache/archives/partial; : > "$W/apt/status"
get() { apt-get -q -o Dir::State="$W/apt/state" -o Dir::State::status="$W/apt/status" -o Dir::Cache="$W/apt/cache" \
    -o Dir::Etc::sourcelist="$L" -o Dir::Etc::sourceparts=- -o APT::Install-Recommends=0 \
    -o APT::Sandbox::User=root -o APT::Architecture=amd64 "$@"; }
get update
get -y --download-only install qemu-system-x86
for d in bin sbin lib lib64; do mkdir -p "$O/usr/$d"; ln -s usr/$d "$O/$d"; done
for d in "$W"/apt/cache/archives/*.deb; do
    dpkg-deb --fsys-tarfile "$d" | tar -x --keep-directory-symlink -C "$O"
done
cat > "$O/qemu" <<'P'
#!/bin/sh
R=$(cd "$(dirname "$0")" && pwd)
exec "$R/lib64/ld-linux-x86-64.so.2" \
    --library-path "$R/lib/x86_64-linux-gnu:$R/usr/lib/x86_64-linux-gnu" \
    "$R/usr/bin/qemu-system-x86_64" -L "$R/usr/share/qemu" -L "$R/usr/share/seabios" \
    -L "$R/usr/lib/ipxe/qemu" "$@"
P
chmod +x "$O/qemu"
"$O/qemu" --version
