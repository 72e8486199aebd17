# The collector, with what its own image lacks: something to ask its health with, and a folder that its user may write its
# queue in (a new volume takes the owner of the folder that it is mounted on).
ARG OTELCOL_VERSION
FROM otel/opentelemetry-collector-contrib:${OTELCOL_VERSION} AS collector

FROM busybox:1.37.0
COPY --from=collector /otelcol-contrib /otelcol-contrib
RUN mkdir -p /var/lib/otelcol/queue && chown -R 10001:10001 /var/lib/otelcol
USER 10001:10001
ENTRYPOINT ["/otelcol-contrib"]
CMD ["--config", "/etc/otelcol/otel-collector.yaml"]
