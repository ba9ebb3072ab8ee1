"""Schema of the chart's values that are about Kubernetes. Settings' own words are `render.py`'s.

Closed everywhere but where Kubernetes' own types stand, which the API server knows best.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]
TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0}
PORT: Schema = {"type": "integer", "minimum": 1, "maximum": 65535}
OPEN: Schema = {"type": "object"}
NAMES: Schema = {"type": "object", "additionalProperties": TEXT}  # labels, annotations, selectors
OBJECTS: Schema = {"type": "array", "items": OPEN}
TEXTS: Schema = {"type": "array", "items": {"type": "string", "minLength": 1}}
AMOUNT: Schema = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|[kMGTPE]i?)?$"}
DURATION: Schema = {"type": "string", "pattern": "^([0-9]+(h|m|s|ms))+$"}
DNS_LABEL = "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"


def one_of(*values: str) -> Schema:
    return {"enum": list(values)}


def closed(required: tuple[str, ...] = (), **properties: Schema) -> Schema:
    made: Schema = {"type": "object", "additionalProperties": False, "properties": properties}
    return {**made, "required": list(required)} if required else made


ENVIRONMENT: Schema = {"type": "array", "items": closed(("name",), name=TEXT, value=TEXT, valueFrom=OPEN)}
QUANTITIES: Schema = {"type": "object", "additionalProperties": {"anyOf": [AMOUNT, {"type": "number", "minimum": 0}]}}
RESOURCES = closed(requests=QUANTITIES, limits=QUANTITIES)
POD: dict[str, Schema] = {
    "resources": RESOURCES,
    "shmSize": AMOUNT,
    "nodeSelector": NAMES,
    "tolerations": OBJECTS,
    "affinity": OPEN,
    "topologySpreadConstraints": OBJECTS,
    "priorityClassName": TEXT,
    "runtimeClassName": TEXT,
    "annotations": NAMES,
    "labels": NAMES,
    "env": ENVIRONMENT,
}
GROUP = closed(
    ("name", "minReplicas", "maxReplicas"),
    name={"type": "string", "pattern": DNS_LABEL, "maxLength": 30},
    minReplicas=COUNT,
    maxReplicas={"type": "integer", "minimum": 1},
    gpus=COUNT,
    gpuResource=TEXT,
    **POD,
)
KEY = closed(name=TEXT, key=TEXT)
ACCESS = one_of("ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod")

KUBERNETES: dict[str, Schema] = {
    "global": OPEN,  # of charts that this one is a part of
    "nameOverride": TEXT,
    "fullnameOverride": TEXT,
    "image": closed(
        repository={"type": "string", "minLength": 1},
        tag={"type": "string", "not": {"const": "latest"}, "pattern": "^$|^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$"},
        digest={"type": "string", "pattern": "^$|^sha256:[0-9a-f]{64}$"},
        pullPolicy=one_of("Always", "IfNotPresent", "Never"),
        pullSecrets={"type": "array", "items": closed(("name",), name=TEXT)},
    ),
    "head": closed((), **POD),
    "workerGroups": {"type": "array", "minItems": 1, "items": GROUP},
    "weights": closed(
        type=one_of("emptyDir", "pvc", "existingClaim", "hostPath"),
        size=AMOUNT,
        storageClassName=TEXT,
        accessModes={"type": "array", "minItems": 1, "items": ACCESS},
        existingClaim=TEXT,
        hostPath={"type": "string", "pattern": "^$|^/"},
        prefetch=FLAG,
    ),
    "huggingFace": closed(existingSecret=TEXT, key=TEXT),
    "apiKeys": closed(existingSecret=TEXT, key=TEXT),
    "gcsFaultTolerance": closed(enabled=FLAG, redisAddress=TEXT, passwordSecret=KEY, externalStorageNamespace=TEXT),
    "autoscaler": closed(idleTimeoutSeconds=COUNT, resources=RESOURCES),
    "upgradeStrategy": closed(type=one_of("NewCluster", "None")),
    "service": closed(type=one_of("ClusterIP", "NodePort", "LoadBalancer"), annotations=NAMES),
    "serviceAccountName": TEXT,
    "podSecurityContext": OPEN,
    "securityContext": OPEN,
    "extraEnv": ENVIRONMENT,
    "extraEnvFrom": OBJECTS,
    "extraVolumes": OBJECTS,
    "extraVolumeMounts": OBJECTS,
    "extraObjects": OBJECTS,
    "podDisruptionBudget": closed(
        enabled=FLAG, maxUnavailable={"anyOf": [COUNT, {"type": "string", "pattern": "^[0-9]+%$"}]}
    ),
    "networkPolicy": closed(
        enabled=FLAG,
        allowFrom=OBJECTS,
        allowMetricsFrom=OBJECTS,
        operator=closed(namespaceSelector=OPEN, podSelector=OPEN),
    ),
    "monitoring": closed(
        serviceMonitor=closed(enabled=FLAG, interval=DURATION, labels=NAMES, keySecret=KEY),
        podMonitor=closed(enabled=FLAG, interval=DURATION, labels=NAMES),
        prometheusRule=closed(enabled=FLAG, labels=NAMES),
        dashboards=closed(enabled=FLAG, labels=NAMES, annotations=NAMES),
    ),
    "ingress": closed(
        enabled=FLAG,
        className=TEXT,
        annotations=NAMES,
        hosts=TEXTS,
        tls={"type": "array", "items": closed(hosts=TEXTS, secretName=TEXT)},
    ),
    "httpRoute": closed(enabled=FLAG, annotations=NAMES, parentRefs=OBJECTS, hostnames=TEXTS, timeout=DURATION),
    "inferencePool": closed(
        enabled=FLAG,
        endpointPicker=closed(name=TEXT, port=PORT, failureMode=one_of("FailOpen", "FailClose")),
    ),
    "tests": closed(enabled=FLAG),
}
