#!/usr/bin/env bash
# ask.sh PICTURE PROMPT [NAME=VALUE ...]: the answer and all that comes with it, as JSON.
#   ./ask.sh photo.jpg '<OD>' num_beams=1 max_new_tokens=100
# FLORENCE2_URL: default http://localhost:8000
set -euo pipefail
picture=$1 prompt=$2
shift 2
settings=
for setting in "$@"; do
  settings+=", \"${setting%%=*}\": ${setting#*=}"
done
prompt=${prompt//\\/\\\\}
prompt=${prompt//\"/\\\"}
response=$(mktemp)
trap 'rm -f "$response"' EXIT
# Through a pipe, as an argument may have 128 KiB at most; --data drops base64's newlines.
body() {
  printf '{"prompt": "%s"%s, "image": "' "$prompt" "$settings"
  base64 < "$picture"
  printf '"}'
}
# This endpoint answers every refusal with 400; which to try again, the text says.
for pause in 1 2 4 0; do
  if body | curl --silent --show-error --fail-with-body --max-time 300 --retry 3 --retry-connrefused --output "$response" \
    --data @- "${FLORENCE2_URL:-http://localhost:8000}/v2/models/florence2/generate"; then
    cat "$response"
    echo
    exit
  fi
  grep --quiet 'try again later' "$response" || break
  sleep "$pause"
done
cat "$response" >&2
exit 1
