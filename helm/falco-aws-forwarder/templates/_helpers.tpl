{{- define "faf.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "faf.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" }}
{{- else if contains (include "faf.name" .) .Release.Name }}
{{- .Release.Name | trunc 50 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "faf.name" .) | trunc 50 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "faf.namespace" -}}
{{- default .Release.Namespace .Values.namespaceOverride }}
{{- end }}

{{- define "faf.headless" -}}
{{- printf "%s-headless" (include "faf.fullname" .) }}
{{- end }}

{{- define "faf.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "faf.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "faf.selectorLabels" -}}
app.kubernetes.io/name: {{ include "faf.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: forwarder
{{- end }}

{{- /* Labels of an object. The argument is the root, or a list of the root and the component. */}}
{{- define "faf.labels" -}}
{{- $root := . }}{{ $component := "forwarder" }}
{{- if kindIs "slice" . }}{{ $root = index . 0 }}{{ $component = index . 1 }}{{ end }}
{{- $own := dict
  "helm.sh/chart" (printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_")
  "app.kubernetes.io/name" (include "faf.name" $root)
  "app.kubernetes.io/instance" $root.Release.Name
  "app.kubernetes.io/component" $component
  "app.kubernetes.io/version" ($root.Chart.AppVersion | toString)
  "app.kubernetes.io/managed-by" $root.Release.Service }}
{{- toYaml (merge $own $root.Values.commonLabels) }}
{{- end }}

{{- define "faf.image" -}}
{{- $tag := default .Chart.AppVersion .Values.image.tag }}
{{- if .Values.image.digest }}
{{- printf "%s:%s@%s" .Values.image.repository $tag .Values.image.digest }}
{{- else }}
{{- printf "%s:%s" .Values.image.repository $tag }}
{{- end }}
{{- end }}

{{- /* A value of the configuration by its path, or the default: (list root "receiver.port" 2801). */}}
{{- define "faf.setting" -}}
{{- $value := (index . 0).Values.config }}
{{- range splitList "." (index . 1) }}
{{- if kindIs "map" $value }}{{ $value = get $value . }}{{ else }}{{ $value = "" }}{{ end }}
{{- end }}
{{- if or (kindIs "invalid" $value) (eq (toString $value) "") }}{{ $value = index . 2 }}{{ end }}
{{- if kindIs "float64" $value }}{{ if eq $value (floor $value) }}{{ int64 $value }}{{ else }}{{ $value }}{{ end }}{{ else }}{{ $value }}{{ end }}
{{- end }}

{{- define "faf.receiverPort" }}{{ include "faf.setting" (list . "receiver.port" 2801) }}{{ end }}
{{- define "faf.adminPort" }}{{ include "faf.setting" (list . "admin.port" 8080) }}{{ end }}
{{- define "faf.spoolDirectory" }}{{ include "faf.setting" (list . "spool.directory" "/var/lib/falco-forwarder") }}{{ end }}

{{- /* Whether the Kubernetes API is asked: "true" or nothing. */}}
{{- define "faf.enriches" -}}
{{- if ne (include "faf.setting" (list . "enrichment.kubernetes.enabled" "auto")) "false" }}true{{ end }}
{{- end }}


{{- /* Bytes of a quantity: whole numbers of Mi, Gi and Ti (the schema lets nothing else in). */}}
{{- define "faf.bytes" -}}
{{- $number := regexFind "^[0-9]+" . | int64 }}
{{- $unit := regexFind "[A-Za-z]+$" . }}
{{- mul $number (get (dict "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776) $unit) }}
{{- end }}

{{- define "faf.volumeSize" -}}
{{- if and (eq .Values.mode "statefulset") .Values.persistence.enabled }}{{ .Values.persistence.size }}
{{- else if and (eq .Values.mode "daemonset") .Values.daemonset.hostPath.enabled }}{{ .Values.daemonset.hostPath.size }}
{{- else }}{{ .Values.spool.size }}{{ end }}
{{- end }}

{{- /* Whether the spool outlives its pod: "true" or nothing. */}}
{{- define "faf.durable" -}}
{{- if or (and (eq .Values.mode "statefulset") .Values.persistence.enabled) (and (eq .Values.mode "daemonset") .Values.daemonset.hostPath.enabled) }}true{{ end }}
{{- end }}

{{- /* How many share the quotas of the account. */}}
{{- define "faf.sharers" -}}
{{- if eq .Values.mode "daemonset" }}{{ .Values.daemonset.expectedNodes }}{{ else }}{{ .Values.replicas }}{{ end }}
{{- end }}

{{- /* The forwarder's configuration: what was given, and what follows from the rest of the values. */}}
{{- define "faf.config" -}}
{{- $config := deepCopy .Values.config }}
{{- $spool := dict
  "directory" (include "faf.spoolDirectory" .)
  "bytes_max" (div (mul (include "faf.bytes" (include "faf.volumeSize" .) | int64) 3) 4)
  "sync" (ternary "full" "normal" (eq (include "faf.durable" .) "true")) }}
{{- $derived := dict "spool" $spool }}
{{- if and (eq .Values.mode "statefulset") (gt (int .Values.replicas) 1) }}
{{- $peer := printf "%s.%s.svc:%s" (include "faf.headless" .) (include "faf.namespace" .) (include "faf.adminPort" .) }}
{{- $_ := set $derived "sensors" (dict "peers" (list $peer)) }}
{{- end }}
{{- if eq (include "faf.setting" (list . "sinks.security_hub.enabled" false)) "true" }}
{{- $sharers := include "faf.sharers" . | int }}
{{- if gt $sharers 1 }}
{{- $hub := dict "rate_per_sec" (divf 10 $sharers) "burst" (max 1 (div 30 $sharers)) }}
{{- $_ := set $derived "sinks" (dict "security_hub" $hub) }}
{{- end }}
{{- end }}
{{- toYaml (mergeOverwrite $derived $config) }}
{{- end }}

{{- /* Seconds from withdrawal to SIGKILL. */}}
{{- define "faf.grace" -}}
{{- if .Values.terminationGracePeriodSeconds }}{{ .Values.terminationGracePeriodSeconds }}
{{- else }}
{{- $delay := include "faf.setting" (list . "receiver.drain_delay_secs" 2) | float64 }}
{{- $drain := include "faf.setting" (list . "delivery.drain_secs_max" 25) | float64 }}
{{- addf .Values.preStopSleepSeconds $delay $drain 15 | ceil | int64 }}
{{- end }}
{{- end }}
