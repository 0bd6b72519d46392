#!/usr/bin/env bash
# Ask a running backend for a training of a project, as Label Studio's button does.
#
#   examples/start_training.sh http://localhost:9090 1
#
# Where the backend asks for credentials: export BASIC_AUTH_USER and BASIC_AUTH_PASS. They are handed to curl by
# standard input, so that they stand in no list of processes.
set -euo pipefail
url=${1:?expected the address of the backend} project=${2:?expected the id of a project}

credentials() {
    if [ -n "${BASIC_AUTH_USER:-}" ]; then printf 'user = "%s:%s"\n' "$BASIC_AUTH_USER" "$BASIC_AUTH_PASS"; fi
}

curl --fail-with-body --silent --show-error "$url/health"
answer=$(credentials | curl --config - --fail-with-body --silent --show-error --json \
    "{\"action\": \"START_TRAINING\", \"project\": {\"id\": $project}}" "$url/webhook")
printf '%s\n' "$answer"
# What does not prove where it comes from is answered with 200 and "ignored", so that Label Studio keeps its webhook.
case $answer in *'"stored"'*) ;; *) echo "the training was not asked for" >&2; exit 1 ;; esac
