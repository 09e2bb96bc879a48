#!/usr/bin/env bash
# tasks.sh PICTURE PROMPT [PROMPT ...]: several tasks on one picture, a line of JSON each, in the order asked.
# Asked at once, they share its image features.
set -euo pipefail
ask=$(dirname "$0")/ask.sh
picture=$1
shift
answers=$(mktemp -d)
trap 'rm -rf "$answers"' EXIT
running=()
for prompt in "$@"; do
  "$ask" "$picture" "$prompt" > "$answers/${#running[@]}" &
  running+=($!)
done
for number in "${!running[@]}"; do
  wait "${running[number]}"
  cat "$answers/$number"
done
