"""The vTPM domain's first program: a script for busybox's shell.

Theory of operation.  It loads the modules, finds the state disk, has e2fsck look at it,
mounts it and keeps the backend running.  Whatever is wrong with the disk, it says so on the
console, with what domain 0 has to do, and waits: *it never starts a TPM on anything but the
disk it was told of*, and starts a new TPM only on a disk that carries the mark of a new one
(`state_disk.py`).  A TPM that appears empty because its disk is missing would have a guest
seal its secrets to nothing, and its owner take it for broken.

`xl shutdown` has the kernel run /sbin/poweroff, which tells this script; it ends the backend
in order, unmounts and powers off.

Who may lie: the kernel's command line comes from domain 0, which is trusted; the disk's
contents are domain 0's too.
"""

from __future__ import annotations

from typing import Final

STATE_LABEL: Final = "vtpm-state"
NEW_MARK: Final = "new-tpm"
"""A file on the state disk: no TPM was ever kept here."""

USER: Final = "vtpm"
"""Whom the backend becomes once it has opened what it needs."""

FREE_MIN_KIB: Final = 512
"""Less room than this on the state disk, and the TPM could fail in a write."""

APPLETS: Final = (
    *("sh", "mount", "umount", "mkdir", "insmod", "findfs", "df", "sleep", "poweroff", "reboot"),
    *("kill", "rm", "sync", "cut", "uname", "cat"),
)
"""What the script needs of busybox."""

POWER_SCRIPT: Final = """#!/bin/busybox sh
# The kernel runs this when domain 0 asks for it; the script with number 1 does the work.
exec /bin/busybox kill -{signal} 1
"""

_SCRIPT: Final = r"""#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc proc /proc; $b mount -t sysfs sys /sys; $b mount -t devtmpfs dev /dev
exec </dev/console >/dev/console 2>&1
$b mount -t tmpfs run /run; $b mount -t tmpfs tmp /tmp
export PATH=/usr/bin:/bin:/sbin HOME=/ LC_ALL=C.UTF-8 PYTHONHOME=/usr
say() { echo "vtpm-domain: $*"; }
say "kernel $($b uname -r), up $($b cut -d' ' -f1 /proc/uptime) s"

tpm=2.0 disk=LABEL=@LABEL@ options= end= child= napping=
read -r line </proc/cmdline
for word in $line; do case $word in
    vtpm.tpm=*) tpm=${word#*=} ;;
    vtpm.disk=*) disk=${word#vtpm.disk=} ;;
    vtpm.trust-reset=*) options="$options --trust-reset ${word#*=}" ;;
    vtpm.log=*) options="$options --log-level ${word#*=}" ;;
esac; done

# What domain 0 asks for.  A signal only takes note and ends what is waited for.
ask() { end=$1; [ -z "$child" ] || $b kill -TERM $child; [ -z "$napping" ] || $b kill $napping; }
trap 'ask poweroff' USR2; trap 'ask reboot' TERM
finish() {
    $b umount /state 2>/dev/null; $b sync
    say "${end}: done"; $b $end -f
}
nap() {
    $b sleep $1 & napping=$!
    wait $napping; napping=
    [ -z "$end" ] || finish
}
told=
problem() {     # what is wrong, what to do; said again when it is another one
    [ "$told" = "$1" ] || say "NOT SERVING: $1"
    [ "$told" = "$1" ] || say "next: $2"
    told=$1; nap 1
}

while read -r name; do
    $b insmod /lib/modules/$name.ko || say "the module $name cannot be loaded"
done </lib/modules/order
$b mount -t xenfs xenfs /proc/xen 2>/dev/null

find_disk() {
    case $disk in
        /dev/*) device=$disk; [ -b $disk ] ;;
        *) device=$($b findfs $disk 2>/dev/null) && [ -b "$device" ] ;;
    esac
}
mount_disk() {
    if [ "$($b cat /sys/block/${device#/dev/}/ro 2>/dev/null)" = 1 ]; then
        problem "the state disk $disk can only be read" "give it in xl.cfg with access=rw"
        return 1
    fi
    e2fsck -f -p $device; rc=$?
    if [ $rc -ge 4 ]; then
        problem "the state disk $disk is damaged, or is no ext4 (e2fsck: $rc)" \
            "in domain 0: xl destroy this domain, then e2fsck -f the disk"
        return 1
    fi
    [ $rc = 0 ] || say "the state disk was mended"
    if ! $b mount -t ext4 -o noatime,nodev,nosuid,noexec,errors=remount-ro $device /state; then
        problem "the state disk $disk cannot be mounted" \
            "see what the kernel says above, and e2fsck -f it in domain 0"
        return 1
    fi
}
check_disk() {
    free=; set -- $($b df -k /state)
    # Device Size Used Available Use% Mounted-on, after seven words of title.
    shift 7; free=$4
    if [ "${free:-0}" -lt @FREE@ ]; then
        problem "the state disk $disk has ${free:-no} KiB of room; the TPM could not write" \
            "in domain 0: xl destroy this domain, truncate -s and resize2fs the disk"
        return 1
    fi
    set -- /state/tpm/*.permall
    # On the disk before the TPM serves: a power cut must not bring the mark back.
    if [ -e "$1" ]; then $b rm -f /state/@NEW@; $b sync
    elif [ ! -e /state/@NEW@ ]; then
        problem "the state disk $disk holds no TPM and is no new one" \
            "give the disk that holds it, or make one: qemu-vtpm-bridge vtpm-image --make-state"
        return 1
    else say "the state disk is a new one: a new TPM is made"
    fi
}
ready() {
    if ! find_disk; then
        problem "no disk is the state disk, $disk" \
            "in domain 0: give the right disk in xl.cfg, or now with xl block-attach"
        return 1
    fi
    mount_disk || return 1
    check_disk && return
    $b umount /state
    return 1
}
until ready; do :; done
say "the state disk is $device, $free KiB free"

pause=1
while :; do
    python3 -s -S -P -m qemu_vtpm_bridge vtpm --state-dir /state/tpm \
        --run-as @USER@ --tpm $tpm $options &
    child=$!
    [ -z "$end" ] || $b kill -TERM $child
    # A signal ends the first wait; the second one gives the status.
    wait $child; status=$?
    while $b kill -0 $child 2>/dev/null; do wait $child; status=$?; done
    child=
    [ -z "$end" ] || finish
    say "the backend ended with status $status; it is started again in $pause s"
    nap $pause
    [ $pause -ge 30 ] || pause=$((pause * 2))
done
"""


def init_script() -> str:
    """Return the script."""
    return (
        _SCRIPT.replace("@LABEL@", STATE_LABEL)
        .replace("@NEW@", NEW_MARK)
        .replace("@USER@", USER)
        .replace("@FREE@", str(FREE_MIN_KIB))
    )
