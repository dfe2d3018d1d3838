{{- define "dynamo.labels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{/* The labels by which the pods of one part are selected: (dict "root" $ "part" "frontend") */}}
{{- define "dynamo.selector" -}}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .part }}
{{- end }}

{{- define "dynamo.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{/* The stack that all roles read. */}}
{{- define "dynamo.stack" -}}
{{- $tables := list }}
{{- range .Values.workers }}
{{- $tables = append $tables (merge (dict "name" .name "role" .role "engine" .engine "drain_timeout" (.drainSeconds | default 120)) (.settings | default dict)) }}
{{- end }}
{{- $ours := dict
  "discovery" (dict "use" "kubernetes" "store" .Release.Name "pod_selector" (printf "app.kubernetes.io/instance=%s" .Release.Name))
  "frontend" (dict "host" "0.0.0.0" "port" 8000 "drain_timeout" .Values.frontend.drainSeconds)
  "status" (dict "host" "0.0.0.0" "port" 9090)
  "observability" (dict "log_format" "json")
  "workers" $tables }}
{{- toYaml (mergeOverwrite $ours (deepCopy .Values.stack)) }}
{{- end }}

{{/* Nothing that a process of ours needs is forbidden by the restricted pod security standard. */}}
{{- define "dynamo.podSecurity" -}}
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  seccompProfile: { type: RuntimeDefault }
{{- end }}

{{- define "dynamo.containerSecurity" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: { drop: [ALL] }
{{- end }}

{{/* POD_NAME and DYNAMO_CONTAINER tie what a process registers to its container; others reach it at the pod's address. */}}
{{- define "dynamo.env" -}}
- name: POD_NAME
  valueFrom: { fieldRef: { fieldPath: metadata.name } }
- name: DYNAMO_CONTAINER
  value: main
- name: DYNAMO__HOST
  valueFrom: { fieldRef: { fieldPath: status.podIP } }
- name: HOME
  value: /tmp
{{- with .Values.env }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* On which nodes pods run: of the values of a part. */}}
{{- define "dynamo.placement" -}}
{{- range $key := list "nodeSelector" "tolerations" "affinity" }}
{{- with index $ $key }}
{{ $key }}: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
{{- end }}

{{- define "dynamo.checksum" -}}
checksum/config: {{ include "dynamo.stack" . | sha256sum }}
{{- with .Values.podAnnotations }}
{{ toYaml . }}
{{- end }}
{{- end }}
