#!/usr/bin/env bash
# status.sh: whether requests are answered, what the model takes, and its figures.
# FLORENCE2_URL, FLORENCE2_METRICS, FLORENCE2_HEALTH: default http://localhost:8000, http://localhost:8002, http://localhost:8003
set -euo pipefail
url=${FLORENCE2_URL:-http://localhost:8000}
curl --silent --show-error "${FLORENCE2_HEALTH:-http://localhost:8003}/ready"
curl --silent --show-error --fail "$url/v2/models/florence2"
echo
curl --silent --show-error --fail "${FLORENCE2_METRICS:-http://localhost:8002}/metrics" | grep ^florence2_
