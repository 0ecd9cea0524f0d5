#!/bin/sh
# xl's script for a network between dom0 (10.77.DOMID.1) and one guest (10.77.DOMID.2).
[ "$1" = online ] || exit 0
domid=${vif#vif}
busybox ifconfig "$vif" "10.77.${domid%.*}.1" netmask 255.255.255.0 up &&
    xenstore-write "$XENBUS_PATH/hotplug-status" connected
