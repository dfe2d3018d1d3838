#!/usr/bin/env bash
# Writes deploy/manifests/dynamo.yaml: what the chart gives by default, for those who use kustomize or kubectl alone.
#   deploy/render.sh [HELM]
set -euo pipefail
cd "$(dirname "$0")"
{
  echo "# Written by deploy/render.sh from deploy/chart; edit that."
  "${1:-helm}" template dynamo chart --namespace dynamo | grep -v '^# Source: ' | sed 's|app.kubernetes.io/managed-by: Helm|app.kubernetes.io/managed-by: kustomize|'
} >"${2:-manifests/dynamo.yaml}"
