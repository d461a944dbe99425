{{- /* Every fault that no schema can tell, all at once. */}}
{{- define "faf.validate" -}}
{{- $faults := list }}
{{- $logs := eq (include "faf.setting" (list . "sinks.cloudwatch_logs.enabled" false)) "true" }}
{{- $hub := eq (include "faf.setting" (list . "sinks.security_hub.enabled" false)) "true" }}
{{- if not .Values.image.repository }}
{{- $faults = append $faults "image.repository: is required; the project publishes no image" }}
{{- end }}
{{- if not (or $logs $hub) }}
{{- $faults = append $faults "config.sinks: no sink is enabled; set config.sinks.cloudwatch_logs.enabled or config.sinks.security_hub.enabled" }}
{{- end }}
{{- if and $logs (not (include "faf.setting" (list . "sinks.cloudwatch_logs.log_group" ""))) }}
{{- $faults = append $faults "config.sinks.cloudwatch_logs.log_group: is required where the sink is enabled" }}
{{- end }}
{{- if and $hub (not (include "faf.setting" (list . "cluster.name" ""))) }}
{{- $faults = append $faults "config.cluster.name: is required where config.sinks.security_hub is enabled; it is part of every finding's Id" }}
{{- end }}
{{- if eq (include "faf.receiverPort" .) (include "faf.adminPort" .) }}
{{- $faults = append $faults "config.admin.port: is the receiver's port too" }}
{{- end }}
{{- if eq .Values.mode "daemonset" }}
{{- if .Values.persistence.enabled }}
{{- $faults = append $faults "persistence.enabled: needs mode statefulset; a daemon set keeps its spool in daemonset.hostPath" }}
{{- end }}
{{- $rate := include "faf.setting" (list . "sinks.security_hub.rate_per_sec" "") }}
{{- if and $hub (not $rate) (lt (int .Values.daemonset.expectedNodes) 1) }}
{{- $faults = append $faults "daemonset.expectedNodes: is required where config.sinks.security_hub is enabled: all nodes share the account's 10 calls a second (or set config.sinks.security_hub.rate_per_sec)" }}
{{- end }}
{{- else if .Values.daemonset.hostPath.enabled }}
{{- $faults = append $faults "daemonset.hostPath.enabled: needs mode daemonset" }}
{{- end }}
{{- $most := include "faf.spoolBytesMost" . | int64 }}
{{- $bytes := include "faf.setting" (list . "spool.bytes_max" $most) | int64 }}
{{- if gt $bytes $most }}
{{- $faults = append $faults (printf "config.spool.bytes_max: %d is more than three fifths of the volume of %s (%d)" $bytes (include "faf.volumeSize" .) $most) }}
{{- end }}
{{- /* An emptyDir that outgrows its limit costs the pod; elsewhere the forwarder sees how much room there is. */}}
{{- if and (not (include "faf.durable" .)) (lt (include "faf.bytes" .Values.spool.size | int64) 536870912) }}
{{- $faults = append $faults (printf "spool.size: %s is less than 512Mi: with its log and what is kept free, a small spool may outgrow the emptyDir, and the kubelet evicts the pod" .Values.spool.size) }}
{{- end }}
{{- if and .Values.serviceMonitor.enabled .Values.podMonitor.enabled }}
{{- $faults = append $faults "podMonitor.enabled: together with serviceMonitor everything is scraped twice" }}
{{- end }}
{{- if .Values.autoscaling.enabled }}
{{- if ne .Values.mode "statefulset" }}
{{- $faults = append $faults "autoscaling.enabled: needs mode statefulset; a daemon set has one pod on each node" }}
{{- end }}
{{- if not .Values.autoscaling.metrics }}
{{- $faults = append $faults "autoscaling.metrics: is required; nothing tells when to scale" }}
{{- end }}
{{- if gt (int .Values.autoscaling.minReplicas) (int .Values.autoscaling.maxReplicas) }}
{{- $faults = append $faults "autoscaling.minReplicas: is more than maxReplicas" }}
{{- end }}
{{- if and .Values.persistence.enabled (eq .Values.persistence.whenScaled "Delete") }}
{{- $faults = append $faults "persistence.whenScaled: Delete together with autoscaling loses what a replica that goes has not delivered" }}
{{- end }}
{{- end }}
{{- $faults = concat $faults (include "faf.validateTls" . | fromYamlArray) (include "faf.validateNames" . | fromYamlArray) (include "faf.validatePaths" . | fromYamlArray) }}
{{- if $faults }}
{{- fail (printf "\n\n%d fault(s) in the values:\n  %s\n" (len $faults) (join "\n  " $faults)) }}
{{- end }}
{{- end }}

{{- /* Of the certificate and the credentials: a list. */}}
{{- define "faf.validateTls" -}}
{{- $faults := list }}
{{- $tls := .Values.tls }}
{{- range $key := list "tls" "auth" }}
{{- if include "faf.setting" (list $ (printf "receiver.%s" $key) "") }}
{{- $faults = append $faults (printf "config.receiver.%s: is set by the chart; use %s" $key $key) }}
{{- end }}
{{- end }}
{{- if not $tls.enabled }}
{{- range $key, $given := dict "tls.existingSecret" $tls.existingSecret "tls.clientAuth" $tls.clientAuth "tls.certManager.enabled" $tls.certManager.enabled }}
{{- if $given }}
{{- $faults = append $faults (printf "%s: needs tls.enabled" $key) }}
{{- end }}
{{- end }}
{{- else if and $tls.existingSecret $tls.certManager.enabled }}
{{- $faults = append $faults "tls.existingSecret: together with tls.certManager.enabled; which of the two?" }}
{{- else if not (or $tls.existingSecret $tls.certManager.enabled) }}
{{- $faults = append $faults "tls.existingSecret: is required where tls is enabled, or tls.certManager.enabled" }}
{{- end }}
{{- if and $tls.certManager.enabled (not $tls.certManager.issuerRef.name) }}
{{- $faults = append $faults "tls.certManager.issuerRef.name: is required" }}
{{- end }}
{{- if and $tls.testClientSecret (not $tls.clientAuth) }}
{{- $faults = append $faults "tls.testClientSecret: needs tls.clientAuth" }}
{{- end }}
{{- if and (or $tls.enabled .Values.auth.existingSecret) (not (hasKey .Values.podSecurityContext "fsGroup")) }}
{{- $faults = append $faults "podSecurityContext.fsGroup: is required with tls or auth: it lets the forwarder read its Secrets" }}
{{- end }}
{{- if and .Values.service.nodePort (eq .Values.service.type "ClusterIP") }}
{{- $faults = append $faults "service.nodePort: needs service.type NodePort or LoadBalancer" }}
{{- end }}
{{- if and .Values.service.loadBalancerSourceRanges (ne .Values.service.type "LoadBalancer") }}
{{- $faults = append $faults "service.loadBalancerSourceRanges: needs service.type LoadBalancer" }}
{{- end }}
{{- toYaml $faults }}
{{- end }}

{{- /* What the API server would refuse later, or half of it: a list. */}}
{{- define "faf.validateNames" -}}
{{- $faults := list }}
{{- range $key := list "nameOverride" "fullnameOverride" "namespaceOverride" }}
{{- $name := get $.Values $key }}
{{- if and $name (not (regexMatch "^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$" $name)) }}
{{- $faults = append $faults (printf "%s: %q is no name of small letters, digits and dashes" $key $name) }}
{{- end }}
{{- end }}
{{- if regexMatch ":[^/]*$" .Values.image.repository }}
{{- $faults = append $faults (printf "image.repository: %s has a tag; that is image.tag" .Values.image.repository) }}
{{- end }}
{{- if and (eq .Values.mode "daemonset") (has (toString .Values.daemonset.maxUnavailable) (list "0" "0%")) }}
{{- $faults = append $faults "daemonset.maxUnavailable: 0 lets no pod be replaced" }}
{{- end }}
{{- $needed := add .Values.preStopSleepSeconds (include "faf.setting" (list . "receiver.drain_delay_secs" 2) | float64 | ceil) 5 }}
{{- if lt (int (include "faf.grace" .)) (int $needed) }}
{{- $faults = append $faults (printf "terminationGracePeriodSeconds: is less than %d, which preStopSleepSeconds and config.receiver.drain_delay_secs need to answer everybody" $needed) }}
{{- end }}
{{- toYaml $faults }}
{{- end }}

{{- /* A pod that would be ready and reached by nobody, or two mounts in one place: a list. */}}
{{- define "faf.validatePaths" -}}
{{- $faults := list }}
{{- range $key := list "receiver" "admin" }}
{{- $host := include "faf.setting" (list $ (printf "%s.host" $key) "") }}
{{- if or (hasPrefix "127." $host) (has $host (list "localhost" "::1")) }}
{{- $faults = append $faults (printf "config.%s.host: %s is reached by nobody outside the pod; leave it empty" $key $host) }}
{{- end }}
{{- end }}
{{- range .Values.extraEnv }}
{{- if has .name (list "FORWARDER__RECEIVER__PORT" "FORWARDER__RECEIVER__HOST" "FORWARDER__ADMIN__PORT" "FORWARDER__ADMIN__HOST" "FORWARDER__SPOOL__DIRECTORY") }}
{{- $faults = append $faults (printf "extraEnv: %s would not be known to the Service, the probes and the mounts; set it under config" .name) }}
{{- end }}
{{- end }}
{{- if has (clean (include "faf.spoolDirectory" .)) (list "/" "/tmp" "/etc/falco-forwarder" (include "faf.tlsDirectory" .) (include "faf.authDirectory" .)) }}
{{- $faults = append $faults (printf "config.spool.directory: %s is something else's place" (include "faf.spoolDirectory" .)) }}
{{- end }}
{{- toYaml $faults }}
{{- end }}
