{{/* Roles of the mode. */}}
{{- define "kronos-stream.roles" -}}
{{ ternary "all" "ingest,forecast" (eq .Values.mode "all") }}
{{- end }}

{{/* Prefix of names: leaves room for a role, a number and a hash. */}}
{{- define "kronos-stream.fullname" -}}
{{- $name := .Values.fullnameOverride | default (contains .Chart.Name .Release.Name | ternary .Release.Name (printf "%s-%s" .Release.Name .Chart.Name)) -}}
{{- $name | trunc 40 | trimSuffix "-" -}}
{{- end }}

{{- define "kronos-stream.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- .Values.serviceAccount.name | default (include "kronos-stream.fullname" .) -}}
{{- else -}}
{{- .Values.serviceAccount.name | default "default" -}}
{{- end -}}
{{- end }}

{{/* Labels that never change; takes a dict of root and role. */}}
{{- define "kronos-stream.selector" -}}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .role }}
{{- end }}

{{- define "kronos-stream.labels" -}}
{{ include "kronos-stream.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end }}

{{/* The image of a role; takes root and role. */}}
{{- define "kronos-stream.image" -}}
{{- $image := mergeOverwrite (deepCopy .root.Values.image) ((index .root.Values .role).image | default dict) -}}
{{- $name := required "image.repository: where is your build of the Dockerfile? The project publishes no images." $image.repository -}}
{{- if $image.digest -}}
{{ $name }}@{{ $image.digest }}
{{- else -}}
{{ $name }}:{{ $image.tag | default .root.Chart.AppVersion }}
{{- end -}}
{{- end }}

{{/* Whole numbers as text: Helm converts YAML numbers to floating point. */}}
{{- define "kronos-stream.text" -}}
{{- if and (kindIs "float64" .) (eq (float64 (int64 .)) .) -}}
{{ int64 . }}
{{- else -}}
{{ . }}
{{- end -}}
{{- end }}

{{/* All timeframes, including those of symbols; comma-separated. */}}
{{- define "kronos-stream.timeframes" -}}
{{- $all := .Values.timeframes -}}
{{- range .Values.symbols -}}
{{- $own := regexReplaceAll "^\\S+\\s*|#.*" . "" | trim -}}
{{- if $own -}}
{{- range splitList "," $own -}}
{{- $all = append $all (trim .) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- $all | uniq | join "," -}}
{{- end }}

{{/* A role's settings as YAML, names without prefix; takes root and role. */}}
{{- define "kronos-stream.settings" -}}
{{- $values := .root.Values -}}
{{- $own := index $values .role -}}
{{- $given := dict -}}
{{- range $settings := list $values.settings ($own.settings | default dict) -}}
{{- range $name, $value := $settings -}}
{{- if not (kindIs "invalid" $value) -}}
{{- $_ := set $given $name (include "kronos-stream.text" $value) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- range $name := list "ROLE" "SYMBOLS" "SYMBOLS_FILE" "TIMEFRAMES" "STATE_FILE" "SECRETS_DIR" "HTTP__HOST" "HTTP__PORT" "KAFKA__SSL_CAFILE" "KAFKA__SSL_CERTFILE" "KAFKA__SSL_KEYFILE" -}}
{{- if hasKey $given $name -}}
{{- fail (printf "settings.%s is for the chart to set: use mode, symbols, timeframes, secrets, http or kafkaTls" $name) -}}
{{- end -}}
{{- end -}}
{{- if ne .role "all" -}}
{{- range $name := list "KAFKA__BOOTSTRAP_SERVERS" "KAFKA__TOPIC_PREFIX" "KAFKA__PARTITIONS" -}}
{{- if not (kindIs "invalid" (index ($own.settings | default dict) $name)) -}}
{{- fail (printf "%s.settings.%s: ingest and forecast meet in the same topics; set it in settings, for all roles" $.role $name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if eq .role "ingest" -}}
{{- if ($own.settings | default dict).SINKS -}}
{{- fail "ingest.settings.SINKS: ingest writes candles to Kafka and has no sinks; set forecast.settings.SINKS" -}}
{{- end -}}
{{- $_ := unset $given "SINKS" -}}
{{- end -}}
{{- if and (hasKey $given "KAFKA__PARTITIONS") (not (regexMatch "^[1-9][0-9]*$" $given.KAFKA__PARTITIONS)) -}}
{{- fail (printf "settings.KAFKA__PARTITIONS=%s: must be a whole number, 1 or more" $given.KAFKA__PARTITIONS) -}}
{{- end -}}
{{- range $name, $_ := $given -}}
{{- if regexMatch "PASSWORD$|TOKEN$|^CCXT__CONFIG$" $name -}}
{{- fail (printf "settings.%s is a secret, and settings are none: put it into the Secret secrets.name, as KRONOS_STREAM_%s" $name $name) -}}
{{- end -}}
{{- end -}}
{{- $chart := dict "ROLE" .role "HTTP__HOST" $values.http.host "HTTP__PORT" $values.http.port -}}
{{- if eq .role "forecast" -}}
{{- $_ := set $chart "TIMEFRAMES" (include "kronos-stream.timeframes" .root) -}}
{{- else -}}
{{- $_ := set $chart "TIMEFRAMES" (join "," $values.timeframes) -}}
{{- $_ := set $chart "SYMBOLS_FILE" "/etc/kronos-stream/symbols/symbols" -}}
{{- $_ := set $chart "STATE_FILE" "/var/lib/kronos-stream/state.sqlite" -}}
{{- end -}}
{{- if and $values.secrets.name (eq $values.secrets.as "files") -}}
{{- $_ := set $chart "SECRETS_DIR" "/etc/kronos-stream/secrets" -}}
{{- end -}}
{{- with $values.kafkaTls -}}
{{- if .caSecret -}}
{{- $_ := set $chart "KAFKA__SSL_CAFILE" (printf "/etc/kronos-stream/kafka-ca/%s" .caKey) -}}
{{- end -}}
{{- if .clientSecret -}}
{{- $_ := set $chart "KAFKA__SSL_CERTFILE" (printf "/etc/kronos-stream/kafka-client/%s" .clientCertKey) -}}
{{- $_ := set $chart "KAFKA__SSL_KEYFILE" (printf "/etc/kronos-stream/kafka-client/%s" .clientKeyKey) -}}
{{- end -}}
{{- end -}}
{{- $gpus := int ($own.gpus | default 0) -}}
{{- if and (gt $gpus 0) (not (hasKey $given "DEVICE")) -}}
{{- $devices := list -}}
{{- range until $gpus -}}
{{- $devices = append $devices (printf "cuda:%d" .) -}}
{{- end -}}
{{- $_ := set $chart "DEVICE" (join "," $devices) -}}
{{- end -}}
{{- range $name, $value := $given -}}
{{- $_ := set $chart $name $value -}}
{{- end -}}
{{- toYaml $chart -}}
{{- end }}

{{/* "yes" if a role uses Kafka, else empty; takes root and role. */}}
{{- define "kronos-stream.usesKafka" -}}
{{- $settings := include "kronos-stream.settings" . | fromYaml -}}
{{- if or (ne .role "all") $settings.KAFKA__BOOTSTRAP_SERVERS -}}yes{{- end -}}
{{- end }}

{{/* "yes" if a role uses the model hub, else empty; takes root and role. */}}
{{- define "kronos-stream.usesHub" -}}
{{- $settings := include "kronos-stream.settings" . | fromYaml -}}
{{- $model := $settings.MODEL | default "hub" -}}
{{- if and (ne .role "ingest") (not .root.Values.modelCache.offline) (ne $model "nano") (not (hasPrefix "/" $model)) -}}yes{{- end -}}
{{- end }}

{{/* Seconds from SIGTERM to SIGKILL; takes root and role. */}}
{{- define "kronos-stream.grace" -}}
{{- $settings := include "kronos-stream.settings" . | fromYaml -}}
{{- $batch := eq .role "ingest" | ternary 0 ($settings.BATCH_DEADLINE | default 60) -}}
{{- $least := add (ceil (float64 $batch)) (ceil (float64 ($settings.STOP_GRACE | default 20))) -}}
{{- $given := .root.Values.terminationGracePeriodSeconds -}}
{{- if kindIs "invalid" $given -}}
{{- add $least 15 -}}
{{- else if le (int64 $given) $least -}}
{{- fail (printf "terminationGracePeriodSeconds=%v: must exceed %d, which is a batch's deadline (BATCH_DEADLINE, at most 60 s unless set) and STOP_GRACE together" $given $least) -}}
{{- else -}}
{{- $given -}}
{{- end -}}
{{- end }}

{{/* Parts of a container shared by all roles and the topics job; takes root and role. */}}
{{- define "kronos-stream.container" -}}
image: {{ include "kronos-stream.image" . }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
{{- end }}

{{- define "kronos-stream.secretEnv" -}}
{{- if and .Values.secrets.name (eq .Values.secrets.as "env") -}}
- secretRef:
    name: {{ .Values.secrets.name }}
{{- end }}
{{- end }}

{{- define "kronos-stream.secretMounts" -}}
- name: tmp
  mountPath: /tmp
{{- if and .Values.secrets.name (eq .Values.secrets.as "files") }}
- name: secrets
  mountPath: /etc/kronos-stream/secrets
  readOnly: true
{{- end }}
{{- if .Values.kafkaTls.caSecret }}
- name: kafka-ca
  mountPath: /etc/kronos-stream/kafka-ca
  readOnly: true
{{- end }}
{{- if .Values.kafkaTls.clientSecret }}
- name: kafka-client
  mountPath: /etc/kronos-stream/kafka-client
  readOnly: true
{{- end }}
{{- end }}

{{- define "kronos-stream.secretVolumes" -}}
- name: tmp
  emptyDir: {sizeLimit: 256Mi}
{{- if and .Values.secrets.name (eq .Values.secrets.as "files") }}
- name: secrets
  secret:
    secretName: {{ .Values.secrets.name }}
    defaultMode: 0440
{{- end }}
{{- if .Values.kafkaTls.caSecret }}
- name: kafka-ca
  secret:
    secretName: {{ .Values.kafkaTls.caSecret }}
    defaultMode: 0444
    items: [{key: {{ .Values.kafkaTls.caKey | quote }}, path: {{ .Values.kafkaTls.caKey | quote }}}]
{{- end }}
{{- if .Values.kafkaTls.clientSecret }}
- name: kafka-client
  secret:
    secretName: {{ .Values.kafkaTls.clientSecret }}
    defaultMode: 0440
{{- end }}
{{- end }}

{{- define "kronos-stream.podSecurity" -}}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  seccompProfile:
    type: RuntimeDefault
  fsGroupChangePolicy: OnRootMismatch
  {{- toYaml .Values.podSecurityContext | nindent 2 }}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
