#!/bin/sh
# Installs the program on this machine, from the tree that this file is in:
#
#     sh packaging/install.sh PREFIX
#     sh packaging/install.sh --remove PREFIX
#
# A virtual environment of its own in PREFIX/lib/qemu-vtpm-bridge, since Debian's pip puts
# nothing beside Debian's own packages (PEP 668), and what shells, xl, libvirt, man and systemd
# look for in PREFIX.  Doing it again upgrades.
set -eu

remove=
if [ "$1" = --remove ]; then
    remove=yes
    shift
fi
mkdir -p "${1:?the prefix is missing}"
prefix=$(cd "$1" && pwd)
home=$prefix/lib/qemu-vtpm-bridge
tree=$(cd "$(dirname "$0")/.." && pwd)

# Names below PREFIX and the environment alike.  Units are copied: to systemd, one that is
# a link is another place's.
linked() { (cd "$home" && find bin/qemu-vtpm-bridge* share/man share/qemu-vtpm-bridge ! -type d); }
copied() { (cd "$home" && find lib/systemd lib/sysusers.d ! -type d); }

if [ "$remove" ]; then
    [ -d "$home" ] || exit 0
    for name in $(linked) $(copied); do
        rm -f "$prefix/$name"
    done
    rm -rf "$home" "$prefix/share/qemu-vtpm-bridge"
    echo "removed from $prefix; guests' files are left in /etc/qemu-vtpm-bridge"
    exit 0
fi

# Of an installation that was cut short there may be less, or nothing.
before=$(linked 2>/dev/null || :; copied 2>/dev/null || :)
"${PYTHON:-python3}" -m venv "$home"
echo "building, which takes a minute"
"$home/bin/pip" install --quiet --disable-pip-version-check --upgrade "$tree"
for name in $before; do
    [ -e "$home/$name" ] || rm -f "$prefix/$name" # what this version has no more
done
for name in $(linked) $(copied); do
    mkdir -p "$prefix/$(dirname "$name")"
done
for name in $(linked); do
    ln -sf "$home/$name" "$prefix/$name"
done
for name in $(copied); do
    cp -f "$home/$name" "$prefix/$name"
done
"$prefix/bin/qemu-vtpm-bridge" --version
echo "installed in $prefix; next: systemd-sysusers && systemctl daemon-reload"
