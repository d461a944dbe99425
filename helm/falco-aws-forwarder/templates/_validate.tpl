{{- /* Every fault that no schema can tell, all at once. */}}
{{- define "faf.validate" -}}
{{- $faults := list }}
{{- $logs := eq (include "faf.setting" (list . "sinks.cloudwatch_logs.enabled" false)) "true" }}
{{- $hub := eq (include "faf.setting" (list . "sinks.security_hub.enabled" false)) "true" }}
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
{{- $most := div (mul (include "faf.bytes" (include "faf.volumeSize" .) | int64) 3) 4 }}
{{- $bytes := include "faf.setting" (list . "spool.bytes_max" $most) | int64 }}
{{- if gt $bytes (int64 $most) }}
{{- $faults = append $faults (printf "config.spool.bytes_max: %d is more than three quarters of the volume of %s (%d)" $bytes (include "faf.volumeSize" .) (int64 $most)) }}
{{- end }}
{{- if le (int (include "faf.grace" .)) (int .Values.preStopSleepSeconds) }}
{{- $faults = append $faults "terminationGracePeriodSeconds: leaves no time after preStopSleepSeconds" }}
{{- end }}
{{- if and .Values.serviceMonitor.enabled .Values.podMonitor.enabled }}
{{- $faults = append $faults "podMonitor.enabled: together with serviceMonitor everything is scraped twice" }}
{{- end }}
{{- if and .Values.dashboards.enabled (not (.Files.Glob "files/dashboards/*.json")) }}
{{- $faults = append $faults "dashboards.enabled: this chart has no dashboards yet" }}
{{- end }}
{{- if $faults }}
{{- fail (printf "\n\n%d fault(s) in the values:\n  %s\n" (len $faults) (join "\n  " $faults)) }}
{{- end }}
{{- end }}
