{{- /* Of the forwarder's pods and of the test's. */}}
{{- define "faf.podSecurityContext" -}}
{{- toYaml (merge (dict) .Values.podSecurityContext (ternary (dict "appArmorProfile" .Values.appArmorProfile) dict (not (empty .Values.appArmorProfile)))) }}
{{- end }}

{{- /* The pod of both topologies. */}}
{{- define "faf.pod" -}}
{{- $daemonset := eq .Values.mode "daemonset" -}}
metadata:
  annotations:
    # Not of the rules: those are reloaded without a restart.
    checksum/config: {{ omit (include "faf.config" . | fromYaml) "rules" | toYaml | sha256sum }}
    {{- with .Values.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  labels:
    {{- mergeOverwrite dict .Values.commonLabels .Values.podLabels (include "faf.selectorLabels" . | fromYaml) | toYaml | nindent 4 }}
spec:
  serviceAccountName: {{ include "faf.serviceAccountName" . | quote }}
  automountServiceAccountToken: {{ eq (include "faf.enriches" .) "true" }}
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ include "faf.grace" . }}
  {{- range $key := list "priorityClassName" "runtimeClassName" "schedulerName" "dnsPolicy" "dnsConfig" "hostAliases" }}
  {{- with get $.Values $key }}
  {{ $key }}: {{ if kindIs "string" . }}{{ . | quote }}{{ else }}{{ toYaml . | nindent 4 }}{{ end }}
  {{- end }}
  {{- end }}
  {{- with .Values.imagePullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  securityContext:
    {{- include "faf.podSecurityContext" . | nindent 4 }}
  {{- $prepares := and $daemonset .Values.daemonset.hostPath.enabled .Values.daemonset.hostPath.prepare }}
  {{- if or $prepares .Values.extraInitContainers }}
  initContainers:
    {{- if $prepares }}
    - name: prepare-spool
      image: {{ include "faf.image" . }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      command: [python, -c, {{ printf "import os; os.chown('/spool', %d, %d)" (int64 .Values.podSecurityContext.runAsUser) (int64 .Values.podSecurityContext.runAsGroup) | quote }}]
      securityContext:
        runAsNonRoot: false
        runAsUser: 0
        runAsGroup: 0
        allowPrivilegeEscalation: false
        readOnlyRootFilesystem: true
        capabilities: {drop: [ALL], add: [CHOWN]}
      resources:
        {{- toYaml .Values.resources | nindent 8 }}
      volumeMounts:
        - name: spool
          mountPath: /spool
    {{- end }}
    {{- with .Values.extraInitContainers }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- end }}
  containers:
    - name: forwarder
      image: {{ include "faf.image" . }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      args: [run, --config, /etc/falco-forwarder/forwarder.yaml]
      env:
        - name: FORWARDER__REPLICA__NAME
          valueFrom: {fieldRef: {fieldPath: {{ ternary "spec.nodeName" "metadata.name" $daemonset }}}}
        {{- if and $daemonset (include "faf.enriches" .) }}
        - name: FORWARDER__ENRICHMENT__KUBERNETES__NODE_NAME
          valueFrom: {fieldRef: {fieldPath: spec.nodeName}}
        {{- end }}
        {{- with .Values.aws.region }}
        - name: AWS_REGION
          value: {{ . | quote }}
        {{- end }}
        {{- if or .Values.aws.podIdentity (get .Values.serviceAccount.annotations "eks.amazonaws.com/role-arn") }}
        - name: AWS_EC2_METADATA_DISABLED
          value: "true"
        {{- end }}
        {{- with .Values.extraEnv }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      {{- with .Values.extraEnvFrom }}
      envFrom:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      ports:
        - name: http
          containerPort: {{ include "faf.receiverPort" . }}
        - name: admin
          containerPort: {{ include "faf.adminPort" . }}
      startupProbe:
        httpGet: {path: /livez, port: admin}
        {{- toYaml .Values.probes.startup | nindent 8 }}
      livenessProbe:
        httpGet: {path: /livez, port: admin}
        {{- toYaml .Values.probes.liveness | nindent 8 }}
      readinessProbe:
        httpGet: {path: /readyz, port: admin}
        {{- toYaml .Values.probes.readiness | nindent 8 }}
      {{- if .Values.preStopSleepSeconds }}
      lifecycle:
        preStop: {sleep: {seconds: {{ .Values.preStopSleepSeconds }}}}
      {{- end }}
      securityContext:
        {{- toYaml .Values.securityContext | nindent 8 }}
      resources:
        {{- toYaml .Values.resources | nindent 8 }}
      # The last line of a pod that cannot start is its reason: all faults of the configuration.
      terminationMessagePolicy: FallbackToLogsOnError
      volumeMounts:
        - name: config
          mountPath: /etc/falco-forwarder
          readOnly: true
        - name: spool
          mountPath: {{ include "faf.spoolDirectory" . }}
        - name: tmp
          mountPath: /tmp
        {{- /* Whole directories: what is mounted with subPath is not renewed. */}}
        {{- if .Values.tls.enabled }}
        - name: tls
          mountPath: {{ include "faf.tlsDirectory" . }}
          readOnly: true
        {{- end }}
        {{- if .Values.auth.existingSecret }}
        - name: auth
          mountPath: {{ include "faf.authDirectory" . }}
          readOnly: true
        {{- end }}
        {{- with .Values.extraVolumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
    {{- with .Values.extraContainers }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  volumes:
    - name: config
      configMap:
        name: {{ include "faf.fullname" . | quote }}
    - name: tmp
      emptyDir: {sizeLimit: 16Mi}
    {{- if and $daemonset .Values.daemonset.hostPath.enabled }}
    - name: spool
      hostPath: {path: {{ .Values.daemonset.hostPath.path }}, type: DirectoryOrCreate}
    {{- else if or $daemonset (not .Values.persistence.enabled) }}
    - name: spool
      emptyDir: {sizeLimit: {{ .Values.spool.size }}}
    {{- end }}
    {{- /* Readable for the pod's group (fsGroup), and for nobody else. */}}
    {{- if .Values.tls.enabled }}
    - name: tls
      secret:
        secretName: {{ include "faf.tlsSecret" . | quote }}
        defaultMode: 0440
        items:
          {{- range concat (list "tls.crt" "tls.key") (ternary (list "ca.crt") list .Values.tls.clientAuth) }}
          - {key: {{ . }}, path: {{ . }}}
          {{- end }}
    {{- end }}
    {{- if .Values.auth.existingSecret }}
    - name: auth
      secret:
        secretName: {{ .Values.auth.existingSecret | quote }}
        defaultMode: 0440
        items:
          - {key: {{ .Values.auth.secretKey | quote }}, path: credentials}
    {{- end }}
    {{- with .Values.extraVolumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- with .Values.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if .Values.topologySpreadConstraints }}
  topologySpreadConstraints:
    {{- toYaml .Values.topologySpreadConstraints | nindent 4 }}
  {{- else if not $daemonset }}
  topologySpreadConstraints:
    {{- range list "topology.kubernetes.io/zone" "kubernetes.io/hostname" }}
    - maxSkew: 1
      topologyKey: {{ . }}
      whenUnsatisfiable: ScheduleAnyway
      labelSelector:
        matchLabels:
          {{- include "faf.selectorLabels" $ | nindent 10 }}
    {{- end }}
  {{- end }}
{{- end }}
