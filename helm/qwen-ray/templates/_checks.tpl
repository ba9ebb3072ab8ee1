{{/*
What no schema can say: values that do not go together. Each sentence names the key, the value and what would be right.
*/}}

{{/* Ranks of a stage, which must lie in one pod. */}}
{{- define "qwen-ray.stageSize" -}}
{{- $plan := (index .Values.models 0).plan }}
{{- if kindIs "map" $plan }}
{{- $tp := $plan.tp | default 1 | int }}
{{- $ep := $plan.ep | default 1 | int }}
{{- $copies := $plan.dp_attention | default (max 1 (div $ep $tp)) | int }}
{{- mul $tp $copies }}
{{- else }}1{{ end }}
{{- end }}

{{/* Whole CPUs of a group's pod: its request, or its limit. */}}
{{- define "qwen-ray.cpus" -}}
{{- $resources := .resources | default dict }}
{{- $cpu := ($resources.requests | default dict).cpu | default ($resources.limits | default dict).cpu | default 0 | toString }}
{{- if hasSuffix "m" $cpu }}{{ div (trimSuffix "m" $cpu | int) 1000 }}{{ else }}{{ $cpu | int }}{{ end }}
{{- end }}

{{- define "qwen-ray.check" -}}
{{- $model := index .Values.models 0 }}
{{- if gt (len .Values.models) 1 }}
{{- fail (printf "models: one model is served by a release, got %d; install the chart once for each." (len .Values.models)) }}
{{- end }}
{{- range $key := list "ssl_certfile" "ssl_keyfile" }}
{{- if hasKey $.Values.http $key }}
{{- fail (printf "http.%s: TLS is spoken by what stands in front; use ingress.tls or the gateway of httpRoute." $key) }}
{{- end }}
{{- end }}
{{- if and .Values.apiKeys.existingSecret (hasKey .Values.http "api_keys_file") }}
{{- fail "http.api_keys_file: apiKeys.existingSecret sets it; give one of the two." }}
{{- end }}
{{- include "qwen-ray.checkWeights" . }}
{{- include "qwen-ray.checkGroups" (dict "Values" .Values "model" $model) }}
{{- if and .Values.gcsFaultTolerance.enabled (not .Values.gcsFaultTolerance.redisAddress) }}
{{- fail "gcsFaultTolerance.redisAddress: fault tolerance keeps its state in Redis; give its address, such as redis://redis:6379." }}
{{- end }}
{{- $hasKeys := or .Values.apiKeys.existingSecret .Values.http.api_keys .Values.http.api_keys_file }}
{{- if and .Values.monitoring.serviceMonitor.enabled $hasKeys (not .Values.monitoring.serviceMonitor.keySecret.name) }}
{{- fail "monitoring.serviceMonitor.keySecret.name: /metrics wants an API key as every other route does; name a secret that holds one." }}
{{- end }}
{{- if and .Values.ingress.enabled (not .Values.ingress.hosts) }}
{{- fail "ingress.hosts: an ingress needs a host, such as qwen.example.com." }}
{{- end }}
{{- if and .Values.httpRoute.enabled (not .Values.httpRoute.parentRefs) }}
{{- fail "httpRoute.parentRefs: a route needs a gateway, such as {name: gateway, namespace: gateways}." }}
{{- end }}
{{- if and .Values.inferencePool.enabled (not .Values.inferencePool.endpointPicker.name) }}
{{- fail "inferencePool.endpointPicker.name: a pool needs the service of its endpoint picker." }}
{{- end }}
{{- end }}

{{- define "qwen-ray.checkWeights" -}}
{{- $weights := .Values.weights }}
{{- range $type := list "existingClaim" "hostPath" }}
{{- if and (eq $weights.type $type) (not (index $weights $type)) }}
{{- fail (printf "weights.%s: weights.type is %s, so it must be given." $type $type) }}
{{- end }}
{{- if and (ne $weights.type $type) (index $weights $type) }}
{{- fail (printf "weights.%s: is %q, but weights.type is %s; set weights.type to %s, or leave it out." $type (index $weights $type) $weights.type $type) }}
{{- end }}
{{- end }}
{{- end }}

{{/* Whether the plan's stages fit the pods, and all replicas' stages fit the groups. */}}
{{- define "qwen-ray.checkGroups" -}}
{{- $model := .model }}
{{- $stage := include "qwen-ray.stageSize" . | int }}
{{- $plan := ternary $model.plan dict (kindIs "map" $model.plan) }}
{{- $stages := $plan.pp | default 1 | int }}
{{- $least := dig "replicas" "min" 1 $model | int }}
{{- $most := dig "replicas" "max" (max 1 $least) $model | int }}
{{- if gt $least $most }}
{{- fail (printf "models[0].replicas: max (%d) must be at least min (%d)." $most $least) }}
{{- end }}
{{- $hasGpus := false }}
{{- $names := dict }}
{{- range .Values.workerGroups }}
{{- if gt (.gpus | default 0 | int) 0 }}{{ $hasGpus = true }}{{ end }}
{{- if hasKey $names .name }}{{ fail (printf "workerGroups: two are called %q." .name) }}{{ end }}
{{- $_ := set $names .name true }}
{{- if gt (.minReplicas | int) (.maxReplicas | int) }}
{{- fail (printf "workerGroups: %s: maxReplicas (%d) must be at least minReplicas (%d)." .name (.maxReplicas | int) (.minReplicas | int)) }}
{{- end }}
{{- end }}
{{- $what := ternary "GPUs" "CPUs" $hasGpus }}
{{- $largest := 0 }}{{ $roomMin := 0 }}{{ $roomMax := 0 }}
{{- range .Values.workerGroups }}
{{- $size := .gpus | default 0 | int }}
{{- if not $hasGpus }}{{ $size = include "qwen-ray.cpus" . | int }}{{ end }}
{{- $largest = max $largest $size | int }}
{{- $roomMin = add $roomMin (mul (.minReplicas | int) (div $size $stage)) | int }}
{{- $roomMax = add $roomMax (mul (.maxReplicas | int) (div $size $stage)) | int }}
{{- end }}
{{- if gt $stage $largest }}
{{- fail (printf "models[0].plan: a stage has %d ranks (tp x dp_attention), which must lie in one pod, but the largest worker group's pods have %d %s; lower tp, or raise workerGroups[].%s." $stage $largest $what (ternary "gpus" "resources.requests.cpu" $hasGpus)) }}
{{- end }}
{{- if gt (mul $most $stages | int) $roomMax }}
{{- fail (printf "models[0].replicas.max: %d replicas of %d x %d ranks need %d stages, but the worker groups hold %d at their maxReplicas; raise workerGroups[].maxReplicas, or lower replicas.max." $most $stages $stage (mul $most $stages | int) $roomMax) }}
{{- end }}
{{- if gt (mul $least $stages | int) $roomMin }}
{{- fail (printf "models[0].replicas.min: %d replicas of %d x %d ranks need %d stages, but the worker groups hold %d at their minReplicas; raise workerGroups[].minReplicas, or lower replicas.min." $least $stages $stage (mul $least $stages | int) $roomMin) }}
{{- end }}
{{- end }}
