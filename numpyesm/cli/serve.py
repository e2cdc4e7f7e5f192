"""`numpyesm serve`: the HTTP service."""

from __future__ import annotations

import argparse
import logging
import sys

from ..api.catalog import Catalog, check_slug
from ..api.keys import ENVIRONMENT, KeyRing, read_keys
from ..errors import InvalidOption, warn
from ..extras import require
from ..memory import parse_memory
from ..model import ESM2
from ..service.settings import OPTIONS, Settings, default_max_memory
from ..weights.locate import find_local


def run(arguments: argparse.Namespace) -> int:
    """Load the models, listen, and serve until a signal stops the service."""
    for library in ("prometheus_client", "starlette", "uvicorn"):
        require(library, "the service", "serve")
    from ..service.app import Service
    from ..service.server import Server, bind, is_local

    keys = KeyRing(read_keys(arguments.api_keys_file))
    local = is_local(arguments.host)
    if not keys and not local and not arguments.allow_no_auth:
        raise InvalidOption(
            f"--host {arguments.host} is reachable from elsewhere, and there are no API keys: set {ENVIRONMENT} or "
            "--api-keys-file, or pass --allow-no-auth to let anyone use this service"
        )
    settings = Settings(
        **{name: getattr(arguments, name) for name in OPTIONS},
        max_memory=parse_memory(arguments.max_memory, "--max-memory") if arguments.max_memory else default_max_memory(),
        max_body=parse_memory(arguments.max_body, "--max-body"),
        max_decompressed=parse_memory(arguments.max_decompressed, "--max-decompressed"),
        local_only=not keys and local and not arguments.allow_no_auth,
        allowed_hosts=tuple(arguments.allow_host),
    )
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="numpyesm: %(levelname)s: %(message)s")
    sockets = bind(arguments.host, arguments.port)  # before loading the models: a port in use should not cost that time
    service = Service(Catalog(_load(arguments)), keys, settings)
    port = sockets[0].getsockname()[1]
    name = arguments.host if ":" not in arguments.host else f"[{arguments.host}]"
    print(
        f"numpyesm: serving {', '.join(service.catalog.slugs)} on http://{name}:{port}/ "
        f"({f'{len(keys)} API keys' if keys else 'no API keys'}); docs at /docs",
        file=sys.stderr,
        flush=True,
    )
    Server(service, ",".join(arguments.trusted_proxy)).run(sockets=sockets)
    return 0


def _load(arguments: argparse.Namespace) -> dict[str, ESM2]:
    """Load the models that `--model` and `--weights` name, and the default one if it is found or nothing is named."""
    wanted: dict[str, str] = {}
    for slug, source in arguments.model:
        if slug in wanted:
            raise InvalidOption(f"--model {slug} is given twice")
        wanted[check_slug(slug)] = source

    def load(source: str | None) -> ESM2:
        return ESM2.from_pretrained(
            source, backend=arguments.backend, precision=arguments.precision, threads=arguments.threads
        )

    models: dict[str, ESM2] = {}
    if arguments.weights or not wanted or ("esm2-35m" not in wanted and find_local("esm2-35m")):
        model = load(arguments.weights)
        if model.name in wanted:
            named = "--weights" if arguments.weights else "NUMPYESM_WEIGHTS"
            raise InvalidOption(f"{named} holds {model.name}, which --model names as well")
        models[model.name] = model
    for slug, source in wanted.items():
        models[slug] = load(source)
        name = models[slug].name
        if slug.startswith("esm2-") and name != slug:
            warn(f"--model {slug}: these are the weights of {name}")
    return models
