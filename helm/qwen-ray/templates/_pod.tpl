{{/* A pod of the head or of a worker group. Takes root, group, component (head or worker). */}}
{{- define "qwen-ray.pod" -}}
{{- $values := .root.Values }}
{{- $group := .group }}
{{- $isWorker := eq .component "worker" }}
metadata:
  labels:
    {{- include "qwen-ray.selectorLabels" .root | nindent 4 }}
    app.kubernetes.io/component: {{ .component }}
    {{- with $group.labels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  annotations:
    # Pods fetch when they start: another model wants other pods.
    qwen-ray/weights: {{ range $values.models }}{{ printf "%s %s" (.source | default "demo") (.revision | default "") | sha256sum | trunc 16 }}{{ end }}
    {{- with $group.annotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  {{- with $values.serviceAccountName }}
  serviceAccountName: {{ . }}
  {{- end }}
  {{- if $isWorker }}
  automountServiceAccountToken: false
  {{- end }}
  {{- with $values.image.pullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  securityContext:
    {{- toYaml $values.podSecurityContext | nindent 4 }}
  # Streams end or are handed over first, then Ray and its pod.
  terminationGracePeriodSeconds: {{ ternary (add (include "qwen-ray.drainSeconds" .root | int) 60) 60 $isWorker }}
  {{- range $key := list "nodeSelector" "tolerations" "affinity" "topologySpreadConstraints" }}
  {{- with index $group $key }}
  {{ $key }}:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- end }}
  {{- range $key := list "priorityClassName" "runtimeClassName" }}
  {{- with index $group $key }}
  {{ $key }}: {{ . }}
  {{- end }}
  {{- end }}
  {{- if $values.weights.prefetch }}
  initContainers:
    - name: prefetch
      image: {{ include "qwen-ray.image" .root }}
      imagePullPolicy: {{ $values.image.pullPolicy }}
      command: [qwen-ray, pull, -f, /etc/qwen-ray/settings/settings.yaml]
      securityContext:
        {{- toYaml $values.securityContext | nindent 8 }}
      env:
        {{- include "qwen-ray.environment" . | nindent 8 }}
      {{- with $values.extraEnvFrom }}
      envFrom:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      resources:
        requests: {cpu: 500m, memory: 512Mi}
        limits: {memory: 2Gi}
      volumeMounts:
        {{- include "qwen-ray.volumeMounts" . | nindent 8 }}
  {{- end }}
  containers:
    - name: ray-{{ .component }}
      image: {{ include "qwen-ray.image" .root }}
      imagePullPolicy: {{ $values.image.pullPolicy }}
      securityContext:
        {{- toYaml $values.securityContext | nindent 8 }}
      ports:
        - {containerPort: {{ include "qwen-ray.port" .root }}, name: serve}
        - {containerPort: 8080, name: metrics}
        {{- if not $isWorker }}
        - {containerPort: 6379, name: gcs-server}
        - {containerPort: 8265, name: dashboard}
        - {containerPort: 10001, name: client}
        {{- end }}
      env:
        {{- include "qwen-ray.environment" . | nindent 8 }}
      {{- with $values.extraEnvFrom }}
      envFrom:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      resources:
        {{- include "qwen-ray.resources" $group | nindent 8 }}
      {{- if $isWorker }}
      {{- include "qwen-ray.workerProbes" .root | nindent 6 }}
      lifecycle:
        preStop:
          exec:
            # Serve moves away what runs here and Ray ends by itself when nothing is left; where the head is gone too,
            # there is nobody to hand over to.
            command:
              - bash
              - -c
              - >-
                timeout 30 ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message "the pod ends"
                --deadline-remaining-seconds {{ add (include "qwen-ray.drainSeconds" .root | int) 20 }}
                && sleep {{ add (include "qwen-ray.drainSeconds" .root | int) 20 }}; true
      {{- end }}
      volumeMounts:
        {{- include "qwen-ray.volumeMounts" . | nindent 8 }}
  volumes:
    - name: tmp
      emptyDir: {}
    - name: shm
      emptyDir: {medium: Memory, sizeLimit: {{ $group.shmSize | default "1Gi" }}}
    - name: settings
      configMap: {name: {{ include "qwen-ray.fullname" .root }}}
    - name: weights
      {{- include "qwen-ray.weightsVolume" .root | nindent 6 }}
    {{- with $values.apiKeys.existingSecret }}
    - name: api-keys
      secret: {secretName: {{ . }}}
    {{- end }}
    {{- with $values.extraVolumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end }}

{{/* As given, and the GPUs. */}}
{{- define "qwen-ray.resources" -}}
{{- $resources := deepCopy (.resources | default dict) }}
{{- if gt (.gpus | default 0 | int) 0 }}
{{- $gpus := dict (.gpuResource | default "nvidia.com/gpu") (.gpus | int) }}
{{- range $kind := list "requests" "limits" }}
{{- $_ := set $resources $kind (merge (index $resources $kind | default dict) $gpus) }}
{{- end }}
{{- end }}
{{- toYaml $resources }}
{{- end }}

{{/*
KubeRay would set probes of its own (Ray's node, and for readiness Serve's proxy). Ready is who can answer now: a worker
without a proxy, which holds ranks only, never is, and is not asked. /health/startup and /health/live go through the
proxy as well; a worker must not be ended for having none, nor for what Serve repairs: start and life are Ray's own.
Readiness bears 30 s: while ranks are repaired, requests wait in the ingress.
*/}}
{{- define "qwen-ray.workerProbes" -}}
startupProbe:
  httpGet: {path: /api/healthz, port: 52365}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 120
livenessProbe:
  httpGet: {path: /api/healthz, port: 52365}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 12
readinessProbe:
  httpGet: {path: /health/ready, port: {{ include "qwen-ray.port" . }}}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 6
{{- end }}

{{- define "qwen-ray.volumeMounts" -}}
- {name: tmp, mountPath: /tmp}
- {name: shm, mountPath: /dev/shm}
- {name: settings, mountPath: /etc/qwen-ray/settings, readOnly: true}
- {name: weights, mountPath: {{ .root.Values.cache_dir }}}
{{- if .root.Values.apiKeys.existingSecret }}
- {name: api-keys, mountPath: /etc/qwen-ray/keys, readOnly: true}
{{- end }}
{{- with .root.Values.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "qwen-ray.weightsVolume" -}}
{{- $weights := .Values.weights }}
{{- if eq $weights.type "emptyDir" -}}
emptyDir: {sizeLimit: {{ $weights.size }}}
{{- else if eq $weights.type "hostPath" -}}
hostPath: {path: {{ $weights.hostPath }}, type: DirectoryOrCreate}
{{- else -}}
persistentVolumeClaim: {claimName: {{ ternary (printf "%s-weights" (include "qwen-ray.fullname" .)) $weights.existingClaim (eq $weights.type "pvc") }}}
{{- end }}
{{- end }}
