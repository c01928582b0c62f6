#!/bin/sh
# Runs the body, and ends a second after one that was killed: all processes of a container end with its main one,
# and the body's watchdog must still let go of the avatar.
ami-inference "$@" &
body=$!
trap 'kill -TERM "$body"' TERM INT
while :; do
  wait "$body"
  code=$?
  kill -0 "$body" 2>/dev/null || break
done
[ "$code" -eq 0 ] || sleep 1
exit "$code"
