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
app.kubernetes.io/name: {{ include "faf.name" . | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
app.kubernetes.io/component: forwarder
{{- end }}

{{- /* The chart's own labels of an object. The argument is the root, or a list of the root and the component. */}}
{{- define "faf.ownLabels" -}}
{{- $root := . }}{{ $component := "forwarder" }}
{{- if kindIs "slice" . }}{{ $root = index . 0 }}{{ $component = index . 1 }}{{ end }}
{{- toYaml (dict
  "helm.sh/chart" (printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_")
  "app.kubernetes.io/name" (include "faf.name" $root)
  "app.kubernetes.io/instance" $root.Release.Name
  "app.kubernetes.io/component" $component
  "app.kubernetes.io/version" ($root.Chart.AppVersion | toString)
  "app.kubernetes.io/managed-by" $root.Release.Service) }}
{{- end }}

{{- /* Labels of an object: the chart's own, then commonLabels. The argument is as above. */}}
{{- define "faf.labels" -}}
{{- $root := . }}
{{- if kindIs "slice" . }}{{ $root = index . 0 }}{{ end }}
{{- toYaml (mergeOverwrite dict $root.Values.commonLabels (include "faf.ownLabels" . | fromYaml)) }}
{{- end }}

{{- /* Labels of an object that has a value for them: the chart's own win over those, and those over commonLabels. (list root labels). */}}
{{- define "faf.labelsWith" -}}
{{- $root := index . 0 }}
{{- toYaml (mergeOverwrite dict $root.Values.commonLabels (index . 1) (include "faf.ownLabels" $root | fromYaml)) }}
{{- end }}

{{- /* Annotations of an object, with their key, or nothing: (list root own). */}}
{{- define "faf.annotations" -}}
{{- with merge (dict) (index . 1) (index . 0).Values.commonAnnotations -}}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
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

{{- /* The Service's name as Falco uses it. */}}
{{- define "faf.host" }}{{ include "faf.fullname" . }}.{{ include "faf.namespace" . }}.svc{{ end }}
{{- define "faf.scheme" }}{{ ternary "https" "http" .Values.tls.enabled }}{{ end }}

{{- /* Secrets: of the receiver's certificate, and of the one that is shown to it ("" where there is none). */}}
{{- define "faf.tlsSecret" -}}
{{- default (printf "%s-tls" (include "faf.fullname" .)) .Values.tls.existingSecret }}
{{- end }}
{{- define "faf.clientSecret" -}}
{{- if .Values.tls.testClientSecret }}{{ .Values.tls.testClientSecret }}
{{- else if include "faf.issuesClient" . }}{{ include "faf.fullname" . }}-client
{{- end }}
{{- end }}
{{- define "faf.issuesClient" -}}
{{- with .Values.tls }}{{ if and .enabled .clientAuth .certManager.enabled .certManager.clientCertificate }}true{{ end }}{{ end }}
{{- end }}

{{- define "faf.tlsDirectory" }}/etc/falco-forwarder-tls{{ end }}
{{- define "faf.authDirectory" }}/etc/falco-forwarder-auth{{ end }}

{{- /* Most replicas there may be at once. */}}
{{- define "faf.replicasMax" -}}
{{- if .Values.autoscaling.enabled }}{{ .Values.autoscaling.maxReplicas }}{{ else }}{{ .Values.replicas }}{{ end }}
{{- end }}

{{- /* How many replicas there must be at least; 0 where only the cluster knows. */}}
{{- define "faf.replicasWanted" -}}
{{- if eq .Values.mode "daemonset" }}0
{{- else if .Values.autoscaling.enabled }}{{ .Values.autoscaling.minReplicas }}
{{- else }}{{ .Values.replicas }}
{{- end }}
{{- end }}

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

{{- /* Most bytes the spool may be told: the forwarder takes five eighths of a volume, and file systems keep some for themselves. */}}
{{- define "faf.spoolBytesMost" -}}
{{- div (mul (include "faf.bytes" (include "faf.volumeSize" .) | int64) 3) 5 }}
{{- end }}

{{- /* Whether the spool outlives its pod: "true" or nothing. */}}
{{- define "faf.durable" -}}
{{- if or (and (eq .Values.mode "statefulset") .Values.persistence.enabled) (and (eq .Values.mode "daemonset") .Values.daemonset.hostPath.enabled) }}true{{ end }}
{{- end }}

{{- /* How many share the quotas of the account. */}}
{{- define "faf.sharers" -}}
{{- if eq .Values.mode "daemonset" }}{{ .Values.daemonset.expectedNodes }}{{ else }}{{ include "faf.replicasMax" . }}{{ end }}
{{- end }}

{{- /* The receiver's certificate and credentials, where the pod finds them. */}}
{{- define "faf.receiver" -}}
{{- $receiver := dict }}
{{- if .Values.tls.enabled }}
{{- $folder := include "faf.tlsDirectory" . }}
{{- $tls := dict "cert_file" (printf "%s/tls.crt" $folder) "key_file" (printf "%s/tls.key" $folder) }}
{{- if .Values.tls.clientAuth }}
{{- $_ := set $tls "client_ca_file" (printf "%s/ca.crt" $folder) }}
{{- end }}
{{- $_ := set $receiver "tls" $tls }}
{{- end }}
{{- if .Values.auth.existingSecret }}
{{- $_ := set $receiver "auth" (dict "credentials_file" (printf "%s/credentials" (include "faf.authDirectory" .))) }}
{{- end }}
{{- toYaml $receiver }}
{{- end }}

{{- /* The forwarder's configuration: what was given, and what follows from the rest of the values. */}}
{{- define "faf.config" -}}
{{- $config := deepCopy .Values.config }}
{{- $spool := dict
  "directory" (include "faf.spoolDirectory" .)
  "bytes_max" (include "faf.spoolBytesMost" . | int64)
  "sync" (ternary "full" "normal" (eq (include "faf.durable" .) "true")) }}
{{- $derived := dict "spool" $spool }}
{{- with include "faf.receiver" . | fromYaml }}
{{- $_ := set $derived "receiver" . }}
{{- end }}
{{- if and (eq .Values.mode "statefulset") (gt (int (include "faf.replicasMax" .)) 1) }}
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
