"""Which provider runs which graph of a bundle: `--provider NAME[:DEVICE]`."""

from __future__ import annotations

from collections.abc import Callable

from ...bundle.opened import Bundle
from ...errors import SessionError
from ...machine.driver import Cuda
from ...recipe import AUTO, GRAPHS, PRECISIONS, PROVIDERS, by_target, named
from ..options import Loading
from .base import Session
from .device import Device
from .inference import import_onnxruntime, why_not
from .kernels import why_no_kernels
from .preflight import check_single_onnxruntime
from .trial import decode_rate

Say = Callable[[str], None]


def always(bundle: Bundle, name: str) -> bool:
    """Whatever the machine has."""
    return True


def has_engine(bundle: Bundle, name: str) -> bool:
    """Whether the bundle has an engine of this backend, and the machine a GPU."""
    return name in bundle.manifest.engines and _has_gpu()


def has_provider(bundle: Bundle, name: str) -> bool:
    """Whether onnxruntime has this execution provider, for one of the graphs, and the machine a GPU."""
    if not any(name in record.providers for record in bundle.manifest.graphs.values()) or not _has_gpu():
        return False
    check_single_onnxruntime()
    device: Device = named(str(PROVIDERS[name].detail))
    return device.name in import_onnxruntime().get_available_providers()


def _has_gpu() -> bool:
    try:
        Cuda()
    except SessionError:
        return False
    return True


def open_session(bundle: Bundle, options: Loading, say: Say = lambda text: None) -> Session:
    """The session that was asked for; SessionError if it is not to be had: never another one.

    say: told why `auto` takes what it takes, where that was not clear before.
    """
    if options.provider == AUTO:
        return _first(bundle, _able(bundle, options.graph), options, say)
    return _open(bundle, *parse(bundle, options.provider), options)


def _open(bundle: Bundle, name: str, device: int, options: Loading) -> Session:
    row, chosen = PROVIDERS[name], choose_graph(bundle, name, options.graph)
    return named(row.open)(bundle, chosen, row.detail or name, device, options)


def _first(bundle: Bundle, names: list[str], options: Loading, say: Say) -> Session:
    """The session of the first of several providers; if it is on trial, the faster one of it and the next."""
    name, *others = names
    if not PROVIDERS[name].trial:
        return _open(bundle, name, 0, options)
    try:
        session = _open(bundle, name, 0, options)
        rate = decode_rate(session, bundle)
    except SessionError as error:
        say(f"{AUTO}: {others[0]}, for {name} is not to be had: {error}")
        return _first(bundle, others, options, say)
    rival = _first(bundle, others, options, say)
    found = decode_rate(rival, bundle)
    best, chosen = (session, name) if rate > found else (rival, others[0])
    say(f"{AUTO}: {chosen}, for in a trial {name} decodes {rate:,.0f} tokens/s, {others[0]} {found:,.0f}")
    return best


def _able(bundle: Bundle, graph: str | None = None) -> list[str]:
    """Providers that `auto` may take here, the best first; a graph that was asked for is run by them."""
    rows = [(name, row.auto, row.graphs) for name, row in reversed(PROVIDERS.items()) if row.auto is not None]
    return [name for name, takes, runs in rows if graph in (None, *runs) and named(takes)(bundle, name)]


def parse(bundle: Bundle, provider: str) -> tuple[str, int]:
    """Name and device index of NAME[:DEVICE]; `auto` looks at what is there."""
    return (_able(bundle)[0], 0) if provider == AUTO else numbered(provider)


def numbered(provider: str) -> tuple[str, int]:
    """Name and device index of NAME[:DEVICE]; SessionError if there is no such provider."""
    name, colon, index = provider.partition(":")
    if name not in PROVIDERS or (colon and not index.isdecimal()):
        raise SessionError(
            f"execution provider {provider!r} is not available, expected auto or one of "
            f"{', '.join(PROVIDERS)}, with :N for the N-th GPU"
        )
    if colon and not PROVIDERS[name].numbered:
        raise SessionError(f"execution provider {provider!r}: it has no number; use {name}")
    return name, int(index or 0)


def emulates(provider: str) -> bool:
    """Whether a verification on this provider rounds 16-bit types as a GPU would."""
    row = PROVIDERS.get(provider)
    return row is not None and row.emulated


def choose_graph(bundle: Bundle, provider: str, graph: str | None = None) -> str:
    """The graph that a provider runs here: the one asked for, else the first that it can."""
    records = bundle.manifest.graphs
    if graph is not None:
        bundle.require_graph(graph, SessionError)
    wanted = [graph] if graph is not None else list(records)
    able = [name for name in PROVIDERS[provider].graphs if name in wanted and provider in records[name].providers]
    if not able:
        raise SessionError(_refusal(bundle, wanted, provider))
    reasons = dict.fromkeys(able, "")
    if PROVIDERS[provider].onnxruntime:
        for name in able:
            reasons[name] = why_not(name, records[name].oldest) or _why_no_kernels(provider, name)
    found = next((name for name, reason in reasons.items() if not reason), None)
    if found is None:
        told = "; ".join(f"the {name} graph: {reason}" for name, reason in reasons.items())
        raise SessionError(f"{bundle.path}: none of its graphs runs here: {told}")
    return found


def _why_no_kernels(provider: str, graph: str) -> str:
    """What is missing to compile a graph's kernels for the provider's GPU; empty: nothing, or it needs none."""
    return why_no_kernels() if GRAPHS[graph].own_kernels and PROVIDERS[provider].detail else ""


def _refusal(bundle: Bundle, graphs: list[str], provider: str) -> str:
    recipe = bundle.manifest.recipe
    runs = dict.fromkeys(p for name in graphs for p in recipe.providers(name))
    reason = PROVIDERS[provider].refused.get(recipe.type, "")
    return (
        f"{bundle.path}: its {' and '.join(graphs)} graph in {recipe.precision} runs on {', '.join(runs)}, not on "
        f"{provider}{reason and f' ({reason})'}; use --provider {next(iter(runs), 'cpu')}, or "
        f"{_export_for(recipe.precision, provider)}"
    )


def _export_for(precision: str, provider: str) -> str:
    """How to export so that a provider runs the result."""
    for name in (precision, *PRECISIONS):
        for target, recipe in by_target(name).items():
            if any(provider in recipe.providers(graph) for graph in recipe.graphs):
                options = f" --precision {name}" if name != precision else ""
                return f"export again with --target {target}{options}"
    return "choose another provider"
