#!/usr/bin/env bash
# status.sh: whether the server and the model are ready, what the model takes, and its figures.
# FLORENCE2_URL and FLORENCE2_METRICS: default http://localhost:8000 and http://localhost:8002
set -euo pipefail
url=${FLORENCE2_URL:-http://localhost:8000}
for path in health/live health/ready models/florence2/ready; do
  printf '%s %s\n' "$path" "$(curl --silent --show-error --output /dev/null --write-out '%{http_code}' "$url/v2/$path")"
done
curl --silent --show-error --fail "$url/v2/models/florence2"
echo
curl --silent --show-error --fail "${FLORENCE2_METRICS:-http://localhost:8002}/metrics" | grep ^florence2_
