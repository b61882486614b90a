#!/usr/bin/env bash
# The main job, from nothing: sets up .venv if need be, then trains, kills, resumes and compares. About a minute.
#
#   bash launch/demo.sh [OPTIONS]        the options: bash launch/demo.sh --help
set -euo pipefail
root=$(dirname "${BASH_SOURCE[0]}")/..
bash "$root/launch/setup.sh"
exec "$root/.venv/bin/python" -m shardckpt.demo "$@"
