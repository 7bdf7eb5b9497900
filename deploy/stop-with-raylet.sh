#!/usr/bin/env bash
# Ends what Ray has left on this machine once its raylet is gone.
#
# `ray down` with provider `local` stops the head only. The raylets of the workers end by themselves when they have lost
# it, but leave agents and workers of theirs behind. Started after `ray start`:  stop-with-raylet.sh NODE_IP
set -u
raylet="raylet .*--node_ip_address=$1 "
pid=$(pgrep -n -f "$raylet") || exit 0
tail --pid="$pid" -f /dev/null
sleep 3
# Ray may have been started again, by a second `ray up`.
pgrep -f "ray start .*--node-ip-address=$1 |$raylet" >/dev/null || ray stop
