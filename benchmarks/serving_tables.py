"""Tables of servers: peers, limits, overload, a soak, several servers, a GPU. See tables.py."""

from __future__ import annotations

from collections.abc import Callable

from peer_servers import PEERS
from results import Figure, read

_OURS = "trirank, `--pipeline single`"


def _cell(figure: Figure, digits: int = 2) -> str:
    return f"{figure.value:.{digits}f} ({figure.low:.{digits}f} to {figure.high:.{digits}f})"


def peers() -> str:
    """Every server, at its best settings."""
    found = read("peers")
    lines = [
        "| 200 candidates | requests/s at p99 ≤ 50 ms | trirank answers | p50 ms, 1 caller | CPU ms a request |",
        "|---|---|---|---|---|",
    ]
    names = {"trirank": _OURS} | {name: peer.title for name, peer in PEERS.items()}
    names["bentoml"] = "BentoML"
    there = [name for name in names if f"{name}_capacity_rps" in found]
    for name in sorted(there, key=lambda name: -found[f"{name}_capacity_rps"].value):
        ratio = "" if name == "trirank" else _cell(found[f"throughput_vs_{name}"]) + " ×"
        cells = [
            _cell(found[f"{name}_capacity_rps"], 0), ratio, _cell(found[f"{name}_p50_ms_c1"]),
            _cell(found[f"{name}_capacity_server_cpu_ms"]),
        ]  # fmt: skip
        lines.append(f"| {names[name]} | " + " | ".join(cells) + " |")
    nothing, inside = "*limit: a model of Triton's that does nothing*", "*limit: the stages in process, batches of 32*"
    cells = [
        _cell(found["nothing_capacity_rps"], 0), "", _cell(found["nothing_p50_ms_c1"]),
        _cell(found["nothing_capacity_server_cpu_ms"]),
    ]  # fmt: skip
    lines.append(f"| {nothing} | " + " | ".join(cells) + " |")
    cells = [_cell(found["in_process_capacity_rps"], 0), "", "", _cell(found["in_process_batch_32_cpu_ms"])]
    lines.append(f"| {inside} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"{found['trirank_capacity_rps'].note}."])


def limits() -> str:
    """What else was asked of speed."""
    found = read("peers")
    rows = {
        "throughput_vs_best_peer": "requests/s over the best framework's",
        "throughput_vs_grpc_aio": "requests/s over bare grpc.aio's",
        "p50_vs_grpc_aio_c1": "p50 of one caller over bare grpc.aio's",
        "saturation_of_in_process": "processor time of the stages in process over that of a served request, batches",
        "cost_1000_over_200": "p50 of 1,000 candidates over that of 200, one caller",
        "shared_context_vs_bst_500": "time of BST over that of the recipe `sequences`, 500 candidates",
        "cross_attention_vs_bst_500": "the same over that of a ranker with cross-attention",
        "goodput_at_3x_overload": "answers in time at three times the capacity, over the capacity",
        "soak_slope": "largest growth of memory, handles, shared memory or latency over the soak",
    }  # fmt: skip
    lines = ["| | | measured on |", "|---|---|---|"]
    for name, words in rows.items():
        if name in found:
            lines.append(f"| {words} | {_cell(found[name])} | {found[name].note} |")
    return "\n".join(lines)


def soak() -> str:
    """What twenty minutes did."""
    found = read("peers")
    lines = ["| | median | slope a minute, 95 % interval |", "|---|---|---|"]
    words = {
        "memory": "memory, MB",
        "handles": "open handles",
        "shm": "shared memory, MB",
        "p50": "p50, ms",
        "p99": "p99, ms",
    }
    for name, what in words.items():
        lines.append(f"| {what} | {_cell(found[f'soak_{name}'])} | {_cell(found[f'soak_{name}_per_minute'], 4)} |")
    told = found["soak_failed"]
    return "\n".join([*lines, "", f"{told.note}: {told.value:.0f} failed."])


def scaling() -> str:
    """One server and two; the model on paper beside what was measured."""
    found = read("scaling")
    lines = ["| share of one server's capacity | p99 ms, measured | on paper |", "|---|---|---|"]
    for share in (30, 50, 70, 85):
        cells = [_cell(found[f"p99_at_{share}_{kind}_ms"], 1) for kind in ("measured", "on_paper")]
        lines.append(f"| {share} % | " + " | ".join(cells) + " |")
    one, two = (_cell(found[f"capacity_{count}_servers_rps"], 0) for count in (1, 2))
    rates = {name: figure for name, figure in found.items() if name.startswith("servers_for_")}
    needed = "; ".join(f"{int(name.split('_')[2]):,} requests/s: {figure.value:.0f}" for name, figure in rates.items())
    return "\n".join([
        *lines,
        "",
        f"One server holds {one} requests/s, two {two}: {_cell(found['two_servers_over_one'])} times as many, while "
        f"the load generator shares the cores. {found['capacity_1_servers_rps'].note}. Servers for p99 within 50 ms, "
        f"on paper: {needed}.",
    ])  # fmt: skip


def gpu() -> str:
    """The ranker on a GPU."""
    found = read("gpu")
    lines = ["| ms a batch, host to host | FP32, 200 candidates | FP16 | FP32, 1,000 | FP16 |", "|---|---|---|---|---|"]
    for batch in (1, 2, 4, 8, 16, 32):
        names = [f"ranker_large_{p}_{size}_b{batch}_ms" for size in (200, 1000) for p in ("fp32", "fp16")]
        lines.append(f"| batch of {batch} | " + " | ".join(_cell(found[name]) for name in names) + " |")
    lines += [
        "",
        "| the ensemble | p50 ms, 200 | requests/s at p99 ≤ 50 ms | p50 ms, 1,000 | requests/s |",
        "|---|---|---|---|---|",
    ]
    words = {"large_fp32": "FP32 on the GPU", "large_fp16": "FP16 on the GPU"}
    for name, what in words.items():
        cells = []
        for size in (200, 1000):
            cells.append(f"{found[f'served_{name}_{size}_p50_ms'].value:.2f}")
            cells.append(f"{found[f'served_{name}_{size}_capacity_rps'].value:.0f}")
        lines.append(f"| {what} | " + " | ".join(cells) + " |")
    overlap, difference = found["fp16_overlap_at_10"], found["fp16_largest_difference_of_std"]
    told = (
        f"d 128, three encoder blocks, weights of chance; {overlap.note}. A batch of 32 costs a request "
        f"{found['batch_32_gain_200'].value:.1f} times less than one of 1 (200 candidates, FP16). The demo's trained "
        f"ranker gives in FP16 {overlap.value:.0%} of FP32's best ten; its scores differ by at most "
        f"{difference.high:.4f} of their spread. The served rows are of one round."
    )
    return "\n".join([*lines, "", told])


SERVING: dict[str, Callable[[], str]] = {
    "peers": peers, "limits": limits, "soak": soak, "scaling": scaling, "gpu": gpu,
}  # fmt: skip
"""By the name that documents use."""
