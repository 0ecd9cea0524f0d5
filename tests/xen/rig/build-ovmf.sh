#!/bin/bash
# build-ovmf.sh WORK_DIR SOURCES OUTPUT
#
# Debian's OVMF.fd is built for QEMU alone: under Xen it hands hvmloader's ACPI tables to nobody.
# This builds the platform that Xen's own tools build, OvmfPkg/OvmfXen.dsc, from Debian's source of
# edk2, Debian's patches included, in a chroot of the suite that SOURCES names: a sources.list with
# a deb and a deb-src line.  Its network stack (and with it OpenSSL) and its shell are left out.
# One line of it goes too: its interrupt handler writes CR8 back as it was, and a QEMU without KVM
# (10.0, 11.1) aborts when a guest of SVM writes CR8 with a virtual interrupt pending.
# OUTPUT: the firmware, for xl's bios_path_override.
# Needs root (chroot), apt, dpkg-deb, patch.  2 to 3 min on 2 cores, 1.5 GB.
set -euo pipefail
[ $# = 3 ] || { sed -n '2,11p' "$0"; exit 2; }
mkdir -p "$1"; W=$(cd "$1" && pwd); L=$(realpath "$2"); O=$(realpath "$3"); R=$W/root
mkdir -p "$W"/apt/state/lists/partial "$W"/apt/cache/archives/partial; : > "$W/apt/status"
get() { apt-get -q -o Dir::State="$W/apt/state" -o Dir::State::status="$W/apt/status" -o Dir::Cache="$W/apt/cache" \
    -o Dir::Etc::sourcelist="$L" -o Dir::Etc::sourceparts=- -o APT::Install-Recommends=0 -o APT::Sandbox::User=root "$@"; }
cd "$W"; get update
# One by one: the index vouches for both, and the .dsc is not on every mirror.
get source --download-only --tar-only edk2; get source --download-only --diff-only edk2
get -y --download-only install gcc g++ libc6-dev uuid-dev make nasm acpica-tools python3 \
    bash coreutils sed grep gawk findutils diffutils
rm -rf "$R"; for d in bin sbin lib lib64; do mkdir -p "$R/usr/$d"; ln -s usr/$d "$R/$d"; done
for d in apt/cache/archives/*.deb; do dpkg-deb --fsys-tarfile "$d" | tar -x --keep-directory-symlink -C "$R"; done
mkdir -p "$R"/{src,tmp,dev/shm}; mknod "$R/dev/null" c 1 3; mknod "$R/dev/urandom" c 1 9
for l in gcc:cc bash:sh gawk:awk; do [ -e "$R/usr/bin/${l#*:}" ] || ln -s "${l%:*}" "$R/usr/bin/${l#*:}"; done
tar -xf edk2_*.orig.tar.xz -C "$R/src" --strip-components=1; tar -xf edk2_*.debian.tar.xz -C "$R/src"
grep -v '^#' "$R/src/debian/patches/series" | while read -r p; do patch -s -d "$R/src" -p1 < "$R/src/debian/patches/$p"; done
H=$R/src/UefiCpuPkg/Library/CpuExceptionHandlerLib/X64/ExceptionHandlerAsm.nasm
grep -q 'mov     cr8, rax' "$H"; sed -i '/mov     cr8, rax/d' "$H"
chroot "$R" /usr/bin/env -i PATH=/usr/sbin:/usr/bin HOME=/tmp PYTHON_COMMAND=python3 J="$(nproc)" bash -ec 'cd /src
. ./edksetup.sh
make -s -j"$J" -C BaseTools/Source/C
build -n "$J" -a X64 -t GCC5 -b RELEASE -p OvmfPkg/OvmfXen.dsc -D NETWORK_ENABLE=FALSE -D BUILD_SHELL=FALSE'
cp "$R/src/Build/OvmfXen/RELEASE_GCC5/FV/OVMF.fd" "$O"; ls -l "$O"
