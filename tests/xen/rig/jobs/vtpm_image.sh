#!/bin/bash
# In domain 0 of the rig: boots the vTPM domain that `qemu-vtpm-bridge vtpm-image` built, works
# its TPM through a bridge, destroys the domain under that load and looks at what is kept.
#
#   vtpm_image.sh IMAGE [KILLS] [TYPE]
#
# IMAGE: the directory that vtpm-image filled, with vtpm.cfg and state.img. KILLS: default 3.
# TYPE: pv or pvh. TESTS: the project's directory tests (default: three above this file).
# Exit status: 0 when everything was whole each time.
set -u
image=$(cd "$1" && pwd); kills=${2:-3}; type=${3:-pv}
here=$(cd "$(dirname "$0")" && pwd); tests=${TESTS:-$(cd "$here/../../.." && pwd)}
work=/tmp/vtpm-image; mkdir -p $work

# The state disk is written, the image may be on a read-only share.
cp "$image/state.img" $work/state.img
modprobe loop 2>/dev/null; loop=$(losetup -f); losetup "$loop" $work/state.img || exit 1
# xl's own way to a file needs a qemu in domain 0; a block device needs nothing.
sed -e "s|^kernel = .*|kernel = \"$image/vmlinuz\"|; s|^ramdisk = .*|ramdisk = \"$image/initramfs.gz\"|" \
    -e "s|^type = .*|type = \"$type\"|; s|target=[^\"]*|target=$loop|" \
    "$image/vtpm.cfg" >$work/vtpm.cfg
[ "$type" = pv ] || echo 'tsc_mode = "native"' >>$work/vtpm.cfg

# The bridge comes out of the image too: domain 0 here has no trio.
mkdir -p $work/root
zcat "$image/initramfs.gz" | ( cd $work/root && busybox cpio -i 2>/dev/null )
for d in dev proc sys run tmp; do mount --rbind /$d $work/root/$d; done

python3 "$here/vtpm_image.py" --tests "$tests" --work $work --kills "$kills"
status=$?
if [ $status != 0 ]; then
    pidof xenstored || echo "xenstored is gone"
    dmesg | tail -n 15
    timeout 10 xl list
fi
exit $status
