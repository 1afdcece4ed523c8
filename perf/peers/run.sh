#!/usr/bin/env bash
# Measures everybody who can ship memory, over the same memory, by turns: run.sh [--quick] [--kinds full,cold] [...]
#
# `run.sh --help` lists what can be chosen. Brings the rivals first, and builds our side.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$here/../.."
"$here/rivals.sh"
program=$(cargo bench --locked --bench peers --no-run --message-format=json |
    sed -n 's/.*"name":"peers".*"executable":"\([^"]*\)".*/\1/p' | tail -1)
[ -n "$program" ] || { echo "run.sh: cargo built no program" >&2; exit 1; }
exec python3 "$here/measure.py" --program "$program" "$@"
