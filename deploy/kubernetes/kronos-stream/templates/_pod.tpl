{{/* A role's variables beside its settings; takes root and role. */}}
{{- define "kronos-stream.env" -}}
{{- $values := .root.Values -}}
{{- $own := index $values .role -}}
{{- $settings := include "kronos-stream.settings" . | fromYaml -}}
{{- if ne .role "ingest" }}
- name: HF_HOME
  value: /var/cache/huggingface
{{- if $values.modelCache.offline }}
- name: HF_HUB_OFFLINE
  value: "1"
{{- end }}
{{- if and (eq (int ($own.gpus | default 0)) 0) (not $settings.THREADS) (dig "requests" "cpu" "" $own.resources) }}
# Without a limit the daemon would see all cores of the node.
- name: KRONOS_STREAM_THREADS
  valueFrom:
    resourceFieldRef:
      containerName: kronos-stream
      resource: requests.cpu
      divisor: "1"
{{- end }}
{{- end }}
{{- with $own.extraEnv }}
{{- toYaml . | nindent 0 }}
{{- end }}
{{- end }}

{{/* The pod of a role: what stands under `template`. Takes root and role. */}}
{{- define "kronos-stream.pod" -}}
{{- $values := .root.Values -}}
{{- $own := index $values .role -}}
{{- $settings := include "kronos-stream.settings" . | fromYaml -}}
{{- $gpus := int ($own.gpus | default 0) -}}
{{- $fullname := include "kronos-stream.fullname" .root -}}
metadata:
  labels:
    {{- include "kronos-stream.selector" . | nindent 4 }}
    {{- with $own.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  annotations:
    # A changed setting or symbol replaces the pod, because the daemon reads its environment once.
    checksum/settings: {{ include "kronos-stream.settings" . | sha256sum }}
    {{- if ne .role "forecast" }}
    checksum/symbols: {{ $values.symbols | toJson | sha256sum }}
    {{- end }}
    {{- with $own.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  serviceAccountName: {{ include "kronos-stream.serviceAccount" .root }}
  {{- include "kronos-stream.podSecurity" .root | nindent 2 }}
  terminationGracePeriodSeconds: {{ include "kronos-stream.grace" . }}
  {{- with $own.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  {{- with $own.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  containers:
    - name: kronos-stream
      {{- include "kronos-stream.container" . | nindent 6 }}
      args: [run]
      envFrom:
        - configMapRef:
            name: {{ $fullname }}-{{ .role }}
        {{- with include "kronos-stream.secretEnv" .root }}
        {{- . | nindent 8 }}
        {{- end }}
      {{- with include "kronos-stream.env" . | trim }}
      env:
        {{- . | nindent 8 }}
      {{- end }}
      ports:
        - name: http
          containerPort: {{ $values.http.port }}
      startupProbe:
        httpGet: {path: /healthz, port: http}
        {{- toYaml $values.probes.startup | nindent 8 }}
      livenessProbe:
        httpGet: {path: /healthz, port: http}
        {{- toYaml $values.probes.liveness | nindent 8 }}
      readinessProbe:
        httpGet: {path: /readyz, port: http}
        {{- toYaml $values.probes.readiness | nindent 8 }}
      resources:
        {{- $resources := deepCopy ($own.resources | default dict) }}
        {{- if gt $gpus 0 }}
        {{- $limits := merge (dict "nvidia.com/gpu" $gpus) ($resources.limits | default dict) }}
        {{- $_ := set $resources "limits" $limits }}
        {{- end }}
        {{- toYaml $resources | nindent 8 }}
      volumeMounts:
        {{- include "kronos-stream.secretMounts" .root | nindent 8 }}
        {{- if ne .role "ingest" }}
        - name: models
          mountPath: /var/cache/huggingface
          {{- if and $values.modelCache.existingClaim $values.modelCache.offline }}
          readOnly: true
          {{- end }}
        {{- end }}
        {{- if ne .role "forecast" }}
        - name: state
          mountPath: /var/lib/kronos-stream
        - name: symbols
          mountPath: /etc/kronos-stream/symbols
          readOnly: true
        {{- end }}
  volumes:
    {{- include "kronos-stream.secretVolumes" .root | nindent 4 }}
    {{- if ne .role "ingest" }}
    - name: models
      {{- if $values.modelCache.existingClaim }}
      persistentVolumeClaim:
        claimName: {{ $values.modelCache.existingClaim }}
      {{- else }}
      emptyDir: {sizeLimit: {{ $values.modelCache.sizeLimit | quote }}}
      {{- end }}
    {{- end }}
    {{- if ne .role "forecast" }}
    - name: symbols
      configMap:
        name: {{ $fullname }}-symbols
    {{- end }}
  {{- with $own.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $own.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $own.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $own.topologySpreadConstraints }}
  {{- $labels := include "kronos-stream.selector" $ | fromYaml }}
  topologySpreadConstraints:
    {{- range . }}
    - {{- toYaml (merge (deepCopy .) (dict "labelSelector" (dict "matchLabels" $labels))) | nindent 6 }}
    {{- end }}
  {{- end }}
{{- end }}
