#!/bin/sh
# Builds the servers that tests and `make stack` run against, where they are missing, into one folder outside the checkout:
#   sh scripts/servers.sh nats-server prometheus alertmanager otelcol jaeger docker-compose   (all of them without arguments)
# Versions: deploy/versions.env. Folder: $GLASSBUS_SERVERS, else ${XDG_CACHE_HOME:-~/.cache}/glassbus-ci/bin.
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
. "$here/deploy/versions.env"
cache=${XDG_CACHE_HOME:-$HOME/.cache}/glassbus-ci
bin=${GLASSBUS_SERVERS:-$cache/bin}
mkdir -p "$bin"

go=${GO:-$(command -v go || echo /usr/local/go/bin/go)}
need_go() {
    if [ ! -x "$go" ]; then
        echo "Go is missing: it is needed to build $1. Install Go 1.26 or later (https://go.dev/dl), or put binaries on PATH." >&2
        exit 1
    fi
    export CGO_ENABLED=0 GOBIN="$bin"
    echo "building $1" >&2
}

# Each binary has beside it the version that it was built from: `prometheus --version` of a `go install` does not say.
fresh() { [ -x "$bin/$1" ] && [ "$(cat "$bin/$1.version" 2>/dev/null)" = "$2" ]; }
built() { echo "$2" >"$bin/$1.version"; }

# The version without its first number: module v0.316.0 is Prometheus 3.16.0.
module_of() { echo "$1" | awk -F. '{ printf "v0.%d%02d.%d\n", $1, $2, $3 }'; }

nats_server() {
    fresh nats-server "$NATS_VERSION" && return
    need_go "nats-server $NATS_VERSION"
    "$go" install "github.com/nats-io/nats-server/v2@v$NATS_VERSION"
    built nats-server "$NATS_VERSION"
}

prometheus() {
    fresh prometheus "$PROMETHEUS_VERSION" && return
    need_go "Prometheus $PROMETHEUS_VERSION"
    module=$(module_of "$PROMETHEUS_VERSION")
    "$go" install "github.com/prometheus/prometheus/cmd/prometheus@$module" \
        "github.com/prometheus/prometheus/cmd/promtool@$module"
    built prometheus "$PROMETHEUS_VERSION"
}

alertmanager() {
    fresh alertmanager "$ALERTMANAGER_VERSION" && return
    need_go "Alertmanager $ALERTMANAGER_VERSION"
    "$go" install "github.com/prometheus/alertmanager/cmd/alertmanager@v$ALERTMANAGER_VERSION" \
        "github.com/prometheus/alertmanager/cmd/amtool@v$ALERTMANAGER_VERSION"
    built alertmanager "$ALERTMANAGER_VERSION"
}

# Only what otel-collector.yaml names: a tenth of the size of the contrib distribution.
otelcol() {
    fresh otelcol "$OTELCOL_VERSION" && return
    need_go "OpenTelemetry Collector $OTELCOL_VERSION"
    core=go.opentelemetry.io/collector contrib=github.com/open-telemetry/opentelemetry-collector-contrib
    # Its stable modules are numbered apart: 0.155.0 goes with 1.61.0.
    version=v$OTELCOL_VERSION stable=$(echo "$OTELCOL_VERSION" | awk -F. '{ printf "v1.%d.%d", $2 - 94, $3 }')
    work=$(mktemp -d)
    "$go" install "$core/cmd/builder@$version"
    cat >"$work/builder.yaml" <<YAML
dist: {name: otelcol, output_path: $work/dist, module: example.invalid/otelcol}
receivers: [{gomod: $core/receiver/otlpreceiver $version}]
processors:
  - {gomod: $core/processor/memorylimiterprocessor $version}
  - {gomod: $contrib/processor/tailsamplingprocessor $version}
connectors: [{gomod: $contrib/connector/spanmetricsconnector $version}]
exporters:
  - {gomod: $core/exporter/otlpexporter $version}
  - {gomod: $core/exporter/debugexporter $version}
  - {gomod: $contrib/exporter/prometheusexporter $version}
extensions:
  - {gomod: $contrib/extension/healthcheckextension $version}
  - {gomod: $contrib/extension/storage/filestorage $version}
YAML
    "$bin/builder" --config "$work/builder.yaml" --skip-compilation --skip-get-modules >/dev/null 2>&1
    {
        printf 'module example.invalid/otelcol\n\ngo 1.25.0\n\nrequire (\n'
        sed -n 's/.*gomod: \([^ ]*\) \(v[0-9.]*\).*/\t\1 \2/p' "$work/builder.yaml"
        printf '\t%s/otelcol %s\n\t%s/confmap %s\n' "$core" "$version" "$core" "$stable"
        for provider in env file http https yaml; do
            printf '\t%s/confmap/provider/%sprovider %s\n' "$core" "$provider" "$stable"
        done
        printf ')\n'
    } >"$work/dist/go.mod"
    (cd "$work/dist" && GOFLAGS=-mod=mod "$go" build -trimpath -ldflags="-s -w" -o "$bin/otelcol" .)
    rm -rf "$work"
    built otelcol "$OTELCOL_VERSION"
}

# `go install` refuses its replace directive, so a module of three lines repeats it. Module v1.76.0 is Jaeger 2.13.0.
jaeger() {
    fresh jaeger "$JAEGER_VERSION" && return
    need_go "Jaeger $JAEGER_VERSION"
    module=v1.$(echo "$JAEGER_VERSION" | awk -F. '{ printf "%d.%d", $2 + 63, $3 }')
    work=$(mktemp -d)
    cd "$work"
    source=$("$go" mod download -json "github.com/jaegertracing/jaeger@$module" | sed -n 's/.*"Dir": "\(.*\)".*/\1/p')
    {
        printf 'module example.invalid/jaeger\n\ngo 1.25.0\n\nrequire github.com/jaegertracing/jaeger %s\n' "$module"
        grep '^replace ' "$source/go.mod" || sed -n '/^replace (/,/^)/p' "$source/go.mod"
    } >go.mod
    cp "$source/go.sum" . && chmod u+w go.sum
    GOFLAGS=-mod=mod "$go" build -trimpath -ldflags="-s -w" -o "$bin/jaeger" github.com/jaegertracing/jaeger/cmd/jaeger
    cd "$here"
    rm -rf "$work"
    built jaeger "$JAEGER_VERSION"
}

# No server: what reads compose.yaml, for the test that it is read. `go install` refuses its exclude directives.
docker_compose() {
    fresh docker-compose "$COMPOSE_VERSION" && return
    need_go "Docker Compose $COMPOSE_VERSION"
    module=github.com/docker/compose/v2
    work=$(mktemp -d)
    cd "$work"
    source=$("$go" mod download -json "$module@v$COMPOSE_VERSION" | sed -n 's/.*"Dir": "\(.*\)".*/\1/p')
    {
        printf 'module example.invalid/compose\n\ngo 1.25.0\n\nrequire %s v%s\n' "$module" "$COMPOSE_VERSION"
        sed -n -e '/^exclude (/,/^)/p' -e '/^replace (/,/^)/p' -e '/^exclude [^(]/p' -e '/^replace [^(]/p' "$source/go.mod"
    } >go.mod
    cp "$source/go.sum" . && chmod u+w go.sum
    GOFLAGS=-mod=mod "$go" build -trimpath -ldflags="-s -w" -o "$bin/docker-compose" "$module/cmd"
    cd "$here"
    rm -rf "$work"
    built docker-compose "$COMPOSE_VERSION"
}

for server in ${*:-nats-server prometheus alertmanager otelcol jaeger docker-compose}; do
    case $server in
    nats-server) nats_server ;;
    docker-compose) docker_compose ;;
    prometheus | alertmanager | otelcol | jaeger) "$server" ;;
    *)
        echo "unknown server $server; known are nats-server, prometheus, alertmanager, otelcol, jaeger, docker-compose" >&2
        exit 2
        ;;
    esac
done
