#!/bin/sh
# Makes an environment of its own for the peer: peers.sh FOLDER. It is compared with, and never imported.
set -eu
folder=$1
test -x "$folder/dyn/bin/python" || "${PYTHON:-python3}" -m venv "$folder/dyn"
pip="$folder/dyn/bin/python -m pip install --quiet"
$pip --no-deps ai-dynamo==1.6.1 ai-dynamo-runtime==1.6.1
$pip aiohttp certifi 'kubernetes<33' msgspec 'prometheus-client<1' pyzmq redis tqdm transformers zstandard 'pydantic<=2.13.5' uvloop
"$folder/dyn/bin/python" -c 'import dynamo.frontend'
