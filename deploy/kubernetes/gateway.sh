#!/usr/bin/env bash
# The gateway's container in baton.yaml: a Ray node that takes no workers, and the service on it. The container ends when
# one of them does, and Kubernetes makes another pod.
#
#   TERM            goes to the service alone, which drains (server.drain_timeout_s); Ray lives until that is done.
#   another config  is checked. If it is right the service drains, and the next pod starts with it; if not that is
#                   said, and all goes on as it was.
set -u
config=${BATON_CONFIG_FILE:-/etc/baton/config/service.yaml}
look_s=${BATON_CONFIG_LOOK_S:-5}
raylet=http://127.0.0.1:52365/api/local_raylet_healthz
service='' stopping=''
stop() {
  stopping=1
  [ -z "$service" ] || kill -TERM "$service" 2>/dev/null
}
trap stop TERM INT

ulimit -n 65536 2>/dev/null || ulimit -n "$(ulimit -Hn)"
eval "$KUBERAY_GEN_RAY_START_CMD" & ray=$!
until wget -q -T 2 -O - "$raylet" 2>/dev/null | grep -q success; do
  kill -0 "$ray" 2>/dev/null || exit 1
  [ -z "$stopping" ] || exit 143
  sleep 1
done

seen=$(mktemp)
cp "$config" "$seen"
baton up --config "$config" & service=$!
[ -z "$stopping" ] || stop
while kill -0 "$service" 2>/dev/null; do
  sleep "$look_s" & timer=$!
  wait -n "$service" "$ray" "$timer" 2>/dev/null
  kill "$timer" 2>/dev/null
  if [ -n "$stopping" ]; then
    continue
  elif ! kill -0 "$ray" 2>/dev/null; then
    echo "gateway: Ray has ended here, and so does the service" >&2
    stop
  elif ! cmp -s "$config" "$seen"; then
    cp "$config" "$seen"
    if baton up --check --config "$config"; then
      echo "gateway: the configuration has changed: draining, the next pod starts with it" >&2
      stop
    else
      echo "gateway: the configuration has changed and is not right: serving with the one before" >&2
    fi
  fi
done
wait "$service"
