#!/bin/sh
# Creates a paused domain that never runs, and prints its id.
name=paused.$(cut -d- -f1 /proc/sys/kernel/random/uuid)
printf 'name="%s"\ntype="pv"\nkernel="/boot/vmlinux"\nmemory=128\n' "$name" >"/tmp/$name.cfg"
xl create -p -q "/tmp/$name.cfg" && xl domid "$name"
