{{/* Names and labels */}}
{{- define "qwen-ray.name" -}}
{{- .Values.nameOverride | default .Chart.Name | trunc 40 | trimSuffix "-" }}
{{- end }}

{{/* Of every object. KubeRay adds up to 20 characters to it, and a service's name has 63. */}}
{{- define "qwen-ray.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- else if contains (include "qwen-ray.name" .) .Release.Name }}
{{- .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "qwen-ray.name" .) | trunc 40 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{/* The service that KubeRay makes and points at the pods that answer. */}}
{{- define "qwen-ray.serveService" -}}
{{- include "qwen-ray.fullname" . }}-serve-svc
{{- end }}

{{/* What pods are found by. KubeRay sets app.kubernetes.io/name and created-by itself. */}}
{{- define "qwen-ray.selectorLabels" -}}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/part-of: {{ include "qwen-ray.name" . }}
{{- end }}

{{- define "qwen-ray.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
app.kubernetes.io/name: {{ include "qwen-ray.name" . }}
{{ include "qwen-ray.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "qwen-ray.metadata" -}}
name: {{ include "qwen-ray.fullname" . }}
namespace: {{ .Release.Namespace }}
labels:
  {{- include "qwen-ray.labels" . | nindent 2 }}
{{- end }}

{{- define "qwen-ray.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}
{{- end }}

{{- define "qwen-ray.port" -}}
{{- .Values.http.port | default 8000 | int }}
{{- end }}

{{/* Seconds that streams may take to end. */}}
{{- define "qwen-ray.drainSeconds" -}}
{{- if hasKey .Values.http "drain_timeout" }}{{ .Values.http.drain_timeout | int }}{{ else }}600{{ end }}
{{- end }}

{{/* The settings file: values with a settings key's name, and what follows from the others. */}}
{{- define "qwen-ray.settings" -}}
{{- $http := merge (dict "host" "0.0.0.0") .Values.http }}
{{- if .Values.apiKeys.existingSecret }}
{{- $_ := set $http "api_keys_file" (printf "/etc/qwen-ray/keys/%s" .Values.apiKeys.key) }}
{{- end }}
{{- $settings := dict "models" .Values.models "http" $http "cache_dir" .Values.cache_dir "node_timeout" .Values.node_timeout }}
{{- range $section := list "engine" "observability" }}
{{- with index $.Values $section }}{{ $_ := set $settings $section . }}{{ end }}
{{- end }}
{{- toYaml $settings }}
{{- end }}

{{/* `app` must be the APP of qwen_ray/serving/app.py, keep_alive_timeout_s its environment's KEEP_ALIVE_SECONDS. */}}
{{- define "qwen-ray.serveConfig" -}}
proxy_location: EveryNode
http_options:
  host: 0.0.0.0
  port: {{ include "qwen-ray.port" . }}
  keep_alive_timeout_s: 20
applications:
  - name: qwen-ray
    route_prefix: /
    import_path: qwen_ray.serving.app:build
    args:
      {{- include "qwen-ray.settings" . | nindent 6 }}
{{- end }}
