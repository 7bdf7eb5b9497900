"""What `baton up` says when it serves: where, and what to try."""

from __future__ import annotations

from cluster.api import ModelInfo
from cluster.config.groups import groups_of
from cluster.config.schema import ServiceConfig

_DEFAULT_ADDRESS = "127.0.0.1:50051"


def welcome(config: ServiceConfig, model: ModelInfo, address: str, http_url: str, page: str | None = None) -> str:
    """The lines.

    Args:
        config: the service's.
        model: what is served.
        address: of the gRPC server.
        http_url: of the HTTP server; empty: there is none.
        page: of the page that shows the service at work; None: there is none.
    """
    from cluster.recall import EXAMPLE, is_shipped

    tls, token = config.server.tls_cert is not None, config.server.auth_token is not None
    client = "" if address == _DEFAULT_ADDRESS else f" --server {address}"
    client += " --tls-ca CA.pem" if tls else ""
    curl = "" if tls else "-plaintext "
    curl += _key(token)
    prompt = EXAMPLE if is_shipped(config.model.path) else "Hello"
    lines = [
        f"Baton serves {model.name} on {address} ({_sizes(config)}, context {model.max_model_len} tokens).",
        *([f"OpenAI's HTTP interface is at {http_url}/v1."] if http_url else []),
        "Try it:",
        *(["  export BATON_TOKEN=…   the server asks for its token"] if token else []),
        f'  baton generate "{prompt}"{client}',
        f"  baton status{client}",
    ]
    if config.server.reflection:
        lines.append(f'  grpcurl {curl}-d \'{{"text": "{prompt}"}}\' {address} baton.v1.Baton/Generate')
    if http_url:
        flags = ("" if config.server.http.tls_cert is None else "--cacert CA.pem ") + _key(config.server.http.api_keys)
        body = f'{{"prompt": "{prompt}"}}'
        lines.append(f"  curl {http_url}/v1/completions {flags}-H 'content-type: application/json' -d '{body}'")
    if page is not None:
        lines.append(f"  {page}   shows it at work, {page}metrics its metrics")
    return "\n".join([*lines, "Ctrl-C stops it."])


def _sizes(config: ServiceConfig) -> str:
    """How many workers there are to begin with."""
    return ", ".join(f"{group.settings.replicas} {group.key}" for group in groups_of(config))


def _key(wanted: object) -> str:
    return '-H "authorization: Bearer $BATON_TOKEN" ' if wanted else ""
