"""`trirank serve` and `trirank rank`."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from trirank import RankClient, RankRequest, contract
from trirank_backend.surroundings import CATALOGUE_VARIABLE, REQUESTS_VARIABLE, TOKENS_VARIABLE, USERS_VARIABLE

from trirank_build.commands.options import Engine, Json, TlsCa, TlsCert, TlsKey, Token, tls_of
from trirank_build.errors import BadUsage
from trirank_build.progress import out, warn


def serve(
    release: Annotated[Path, typer.Argument(help="A release, or the link `current`, which is followed.")],
    grpc_port: Annotated[int | None, typer.Option(help="8001 by default, or any free one.")] = None,
    http_port: Annotated[int | None, typer.Option(help="8000 by default, or any free one.")] = None,
    metrics_port: Annotated[int | None, typer.Option(help="8002 by default, or any free one.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    tritonserver: Annotated[Path | None, typer.Option(help="The server to run.")] = None,
    addresses: Annotated[
        Path | None,
        typer.Option(
            envvar="TRIRANK_ADDRESSES",
            help="File for addresses and state, as JSON, when ready; `trirank health` reads it.",
        ),
    ] = None,
    log: Annotated[
        Path | None, typer.Option(help="File for Triton's log; else it is gone at the stop. Errors are shown anyway.")
    ] = None,
    follow: Annotated[
        bool | None, typer.Option(help="Serve what the link points at, whenever it moves; for links by default.")
    ] = None,
    fallback: Annotated[
        Engine | None,
        typer.Option(help="What scores in the Python backend where the release's runtime cannot."),
    ] = None,
    users: Annotated[
        str | None,
        typer.Option(
            envvar=USERS_VARIABLE,
            help="User store: sqlite:PATH, redis://HOST:PORT or none; users.sqlite beside the releases by default.",
        ),
    ] = None,
    catalogue: Annotated[
        Path | None,
        typer.Option(
            envvar=CATALOGUE_VARIABLE,
            help="File of `trirank catalogue update`; catalogue.npy beside the releases by default.",
        ),
    ] = None,
    log_requests: Annotated[
        str | None,
        typer.Option(
            envvar=REQUESTS_VARIABLE, help="Folder to log requests to: FOLDER or FOLDER?share=0.01&tensors=1."
        ),
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(help="PEM of the server's certificate: gRPC is encrypted, HTTP is off.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM of its key.")] = None,
    client_ca: Annotated[
        Path | None, typer.Option(help="PEM of who signs callers' certificates, which they need.")
    ] = None,
    tokens: Annotated[
        Path | None,
        typer.Option(envvar=TOKENS_VARIABLE, help="File of callers' tokens (`trirank token`), which they need."),
    ] = None,
    trust: Annotated[
        list[Path] | None,
        typer.Option(help="Public key of `trirank release key`: only releases that it has signed are served; repeat."),
    ] = None,
    opened: Annotated[
        list[str] | None,
        typer.Option(
            "--open",
            help="An interface of Triton's that is closed otherwise: statistics, trace, logging, shared-memory.",
        ),
    ] = None,
) -> None:
    """Serve a release with Triton until Ctrl-C; a promotion takes effect without a request lost."""
    from trirank_build.serving.access import Access, Certificates
    from trirank_build.serving.following import serve as run_server
    from trirank_build.serving.ports import Ports, usual_ports
    from trirank_build.serving.stores import usual_stores

    # Said outright, since a shell starts its background jobs with SIGINT ignored.
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, signal.default_int_handler)
    follow = release.is_symlink() if follow is None else follow
    if follow and not release.is_symlink():
        raise BadUsage(f"--follow follows a link, and {release} is none; give the link `current` beside the releases")
    ports = usual_ports(host, Ports(grpc_port, http_port, metrics_port))
    stores = usual_stores(release, users, catalogue, log_requests)
    if (tls_cert is None) != (tls_key is None):
        raise BadUsage("--tls-cert and --tls-key go together")
    if client_ca is not None and tls_cert is None:
        raise BadUsage("--client-ca is whose certificates callers need, and without --tls-cert they show none")
    certificates = Certificates(tls_cert, tls_key, client_ca) if tls_cert is not None and tls_key is not None else None
    access = Access(certificates, tokens, frozenset(opened or ()))
    run_server(
        release, ports, follow=follow, addresses=addresses, host=host, tritonserver=tritonserver, fallback=fallback,
        log=log, stores=stores, access=access, trusted=trust or (),
    )  # fmt: skip


def health(
    addresses: Annotated[
        Path, typer.Argument(envvar="TRIRANK_ADDRESSES", help="The file of `trirank serve --addresses`.")
    ],
    live: Annotated[
        bool, typer.Option("--live", help="Ask only whether it is looked after, not whether it ranks.")
    ] = False,
) -> None:
    """Whether a server on this machine is ready; exit status 1 where it is not. For probes: it asks nothing of a server
    that is busy."""
    from trirank_build.serving.health import check

    print(check(addresses, live=live))


def rank(
    item: Annotated[list[str] | None, typer.Option("--item", help="A candidate's id, once for each.")] = None,
    server: Annotated[str, typer.Option(help="host:port of the gRPC endpoint.")] = "127.0.0.1:8001",
    release: Annotated[
        Path | None, typer.Option(help="Takes titles, and without --item a recorded request, from it.")
    ] = None,
    recorded: Annotated[int, typer.Option(min=0, help="Which recorded request.")] = 0,
    user: Annotated[str | None, typer.Option(help="The user's id; anonymous, or the recorded one, by default.")] = None,
    query: Annotated[str | None, typer.Option(help="What was searched for.")] = None,
    scenario: Annotated[str | None, typer.Option(help="The policy.")] = None,
    top_k: Annotated[int | None, typer.Option(help="How many; 10 by default.")] = None,
    filters: Annotated[
        list[str] | None, typer.Option("--filter", help="region=NAME, min_price=…, max_price=… or min_stock=….")
    ] = None,
    trace: Annotated[bool, typer.Option("--trace", help="Tell which rule moved which item.")] = False,
    deadline_s: Annotated[float, typer.Option(help="Seconds.")] = 1.0,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Rank candidates on a running server."""
    tls = tls_of(tls_ca, tls_cert, tls_key)
    said: dict[str, Any] = {"query": query, "scenario": scenario, "top_k": top_k}
    said = {name: value for name, value in said.items() if value is not None}
    said |= {"trace": trace, "filters": _filters(filters or [])}
    if not item and release is None:
        raise BadUsage("give candidates with --item, or --release to send one of its recorded requests")
    with RankClient(server, deadline_s=deadline_s, tls=tls, token=token) as client:
        kinds = client.server_info() if item or user is not None else {}
        if user is not None:
            said["user_id"] = _own_id("--user", user, kinds.get("user_ids"))
        if item:
            ids = [_own_id("--item", each, kinds.get("item_ids")) for each in item]
            request = RankRequest(item_ids=ids, **said)
        else:
            from trirank_build.repository.release import recorded_requests

            assert release is not None
            requests = recorded_requests(release)
            if recorded >= len(requests):
                raise BadUsage(f"--recorded {recorded}; {release} has requests 0 to {len(requests) - 1}")
            request = replace(requests[recorded], **said)
        response = client.rank(request)
    from trirank_build.presentation import ranking_table, trace_table, unknown_line

    if words := unknown_line(response):
        warn(words)
    if as_json:
        answer: dict[str, Any] = {
            "items": response.to_dicts(), "status": response.status.value, "unknown": response.unknown,
            "duplicates": response.duplicates, "filtered": response.filtered,
        }  # fmt: skip
        if response.trace is not None:
            answer["trace"] = response.trace
        print(json.dumps(answer, allow_nan=False))
        return
    out.print(ranking_table(request, response, release))
    if response.trace is not None:
        out.print(trace_table(response.trace, release))


def _own_id(option: str, text: str, kind: str | None) -> Any:
    """An id as the catalogue has it; where the server does not say which, as it looks."""
    if kind == "strings" or (kind is None and not text.lstrip("-").isdigit()):
        return text
    try:
        return int(text)
    except ValueError:
        raise BadUsage(f"{option} {text} is no number, and the ids of this catalogue are numbers") from None


def _filters(said: list[str]) -> dict[str, Any]:
    """``key=value`` as RankRequest.filters has them."""
    found: dict[str, Any] = {}
    for each in said:
        key, equals, value = each.partition("=")
        if key not in contract.FILTERS or not equals:
            raise BadUsage(f"--filter {each} is none; filters are {', '.join(f'{key}=…' for key in contract.FILTERS)}")
        try:
            found[key] = value if key == "region" else int(value) if key == "min_stock" else float(value)
        except ValueError:
            raise BadUsage(f"--filter {each}: {value!r} is no number") from None
    return found


def token(
    name: Annotated[str, typer.Argument(help="The caller's name.")],
    tokens: Annotated[Path, typer.Option(help="The file of digests, which is made where there is none.")],
    remove: Annotated[bool, typer.Option("--remove", help="Take the caller's token away.")] = False,
) -> None:
    """Make a token for a caller, print it once, and keep its digest. A server that runs takes it at once."""
    from trirank_build.serving.access import add_token, remove_token

    if remove:
        remove_token(tokens, name)
        return
    print(add_token(tokens, name))
