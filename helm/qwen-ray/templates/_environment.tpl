{{/*
Environment of every Ray process. The first part is ENVIRONMENT of qwen_ray/serving/environment.py, which says why;
tests/deploy holds the two together.
*/}}
{{- define "qwen-ray.environment" -}}
- {name: RAY_USAGE_STATS_ENABLED, value: "0"}
- {name: RES_OPTIONS, value: "timeout:1 attempts:3"}
- {name: RAY_ROTATION_MAX_BYTES, value: "104857600"}
- {name: RAY_ROTATION_BACKUP_COUNT, value: "3"}
- {name: RAY_SERVE_ENABLE_HA_PROXY, value: "1"}
- {name: RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD, value: "0"}
- {name: RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S, value: "3600"}
- {name: RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS, value: "1"}
- {name: RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S, value: "1"}
- {name: RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S, value: "30"}
- {name: RAY_SERVE_HAPROXY_RETRY_ON, value: conn-failure empty-response}
- {name: RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S, value: "30"}
- {name: RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S, value: "30"}
{{- /* The root file system is read-only: what writes beside its home writes here. */}}
- {name: HOME, value: /tmp}
- {name: HF_HOME, value: {{ .root.Values.cache_dir }}/huggingface}
{{- with .root.Values.huggingFace }}
{{- if .existingSecret }}
- name: HF_TOKEN
  valueFrom: {secretKeyRef: {name: {{ .existingSecret }}, key: {{ .key }}}}
{{- end }}
{{- end }}
{{- with .root.Values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- with .group.env }}
{{ toYaml . }}
{{- end }}
{{- end }}
