#!/bin/sh
# Generates baton_pb2.py, baton_pb2.pyi and baton_pb2_grpc.py from baton.proto.
#
#   protos/generate.sh           write them
#   protos/generate.sh --check   exit 1 if the files here are not what baton.proto gives
#
# The generator is older than every runtime that pyproject.toml allows, because generated code only loads on a runtime
# at least as new as its generator. It lives in an environment of its own, .venv-protoc, made on first use.
set -eu

GRPCIO_TOOLS=1.63.0
FILES="baton_pb2.py baton_pb2.pyi baton_pb2_grpc.py"

cd "$(dirname "$0")/.."
venv=.venv-protoc
stamp=$venv/generated.sha256

case "${1:-}" in
    "") check=false ;;
    --check) check=true ;;
    *) echo "usage: $0 [--check]" >&2; exit 2 ;;
esac

fingerprint() {
    (cd protos && cat generate.sh baton.proto $FILES 2>/dev/null | sha256sum)
}

if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(fingerprint)" ]; then
    echo "protos: generated code is up to date"
    exit 0
fi

if ! "$venv/bin/python" -c "import grpc_tools" 2>/dev/null; then
    echo "protos: installing grpcio-tools $GRPCIO_TOOLS into $venv"
    "${PYTHON:-python3}" -m venv --clear "$venv"
    # grpc_tools imports pkg_resources, which setuptools 81 no longer has.
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "grpcio-tools==$GRPCIO_TOOLS" "setuptools<81"
fi

out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
"$venv/bin/python" -W ignore -m grpc_tools.protoc -I. \
    --python_out="$out" --pyi_out="$out" --grpc_python_out="$out" protos/baton.proto

stale=""
for file in $FILES; do
    if ! cmp -s "$out/protos/$file" "protos/$file"; then
        stale="$stale protos/$file"
        $check || cp "$out/protos/$file" "protos/$file"
    fi
done

if $check && [ -n "$stale" ]; then
    echo "protos: not what protos/baton.proto gives:$stale; run protos/generate.sh and commit the result" >&2
    exit 1
fi
fingerprint > "$stamp"
if [ -n "$stale" ]; then echo "protos: wrote$stale"; else echo "protos: generated code is up to date"; fi
