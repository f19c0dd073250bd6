"""Tables of what breaks, what is private and what was published of Triton, for tables.py."""

from __future__ import annotations

from results import Figure, read


def vulnerabilities() -> str:
    """What was published of Triton."""
    from trirank_build.doctor.vulnerabilities import published

    lines = ["| bulletin | | | through | mended in |", "|---|---|---|---|---|"]
    for each in published():
        cves = ", ".join(cve.removeprefix("CVE-") for cve in each.cves)
        mended = f"{each.release} ({each.fixed})"
        lines.append(
            f"| {each.bulletin}, {each.date} | CVE {cves} | {each.what} | {each.closed_by or '–'} | {mended} |"
        )
    return "\n".join(lines)


def personal_data() -> str:
    """What lies where."""
    from trirank_build.privacy.inventory import table

    return table()


def sealed() -> str:
    """What reading a user of a sealed store costs."""
    found = read("privacy")
    lines = ["| | events of the past | plain, ms | sealed, ms |", "|---|---|---|---|"]
    for kind in ("sqlite", "redis"):
        for size in (50, 1_000):
            plain, closed = (found[f"{name}_read_{size}_ms_{kind}"] for name in ("plain", "sealed"))
            cells = (f"{each.value:.3f} ({each.low:.3f} to {each.high:.3f})" for each in (plain, closed))
            lines.append(f"| {kind} | {size:,} | {' | '.join(cells)} |")
    return "\n".join(
        [*lines, "", "Reading one user; medians and spread of rounds, in turns. Redis' events are sealed one by one."]
    )


def differential() -> str:
    """What differential privacy costs, and keeps an attacker from."""
    found = read("privacy")
    head = "NDCG@10 of the usual | AUC of the attack | members found at 1 % false alarms, %"
    lines = [f"| training | {head} |", "|---|---|---|---|"]
    for name, words in (
        ("eps_1", "ε = 1"), ("eps_8", "ε = 8"), ("plain", "as usual"), ("retrieval", "none: retrieval's order"),
    ):  # fmt: skip
        share, area, few = (
            found.get(which) for which in (f"ndcg_at_{name}_share", f"attack_auc_{name}", f"attack_found_{name}")
        )
        told = "1" if name == "plain" else _spread(share, 2)
        lines.append(f"| {words} | {told} | {_spread(area, 3)} | {_spread(few, 1, 100)} |")
    return "\n".join(
        [*lines, "", f"{_sentence(found['ndcg_at_eps_8_share'])} {_sentence(found['attack_auc_plain_loss'])}"]
    )


def anonymised() -> str:
    """What anonymised datasets cost."""
    share = read("privacy")["anonymised_ndcg_share"]
    return f"NDCG@10 of a ranker that was trained on one, over that without: {_spread(share, 2)} ({share.note})."


def _spread(figure: Figure | None, digits: int, times: float = 1.0) -> str:
    if figure is None:
        return "–"
    value, low, high = (f"{times * each:.{digits}f}" for each in (figure.value, figure.low, figure.high))
    return f"{value} ({low} to {high})"


def _sentence(figure: Figure) -> str:
    return f"{figure.note[0].upper()}{figure.note[1:]}."


CHAOS = {
    "stub_kill": "a stage's process killed",
    "stub_kill_ensemble": "… of `ensemble`",
    "stub_kill_single": "… of `single`",
    "stub_hang": "a stage's process stopped",
    "server_kill": "Triton killed",
    "store_kill": "Redis killed",
    "store_slow": "Redis stopped",
    "store_readonly": "Redis takes no writes",
    "thousand_connections": "1,000 connections, half-open and slow ones",
    "full_shm": "/dev/shm full",
    "memory_limit": "the memory limit reached",
    "clock": "the clock set",
    "full_disk": "the user store's disk full",
    "damaged_release": "files of the served release deleted",
}


def chaos() -> str:
    """What callers see of faults."""
    found = read("chaos")
    lines = ["| | failed requests | answered again after, s | |", "|---|---|---|---|"]
    for name, words in CHAOS.items():
        failed, recovered = found.get(f"{name}_failed_requests"), found.get(f"{name}_recovered_s")
        if failed is not None and recovered is not None:
            cells = (f"{each.value:.{digits}f} ({each.low:.{digits}f} to {each.high:.{digits}f})"
                     for each, digits in ((failed, 0), (recovered, 1)))  # fmt: skip
            lines.append(f"| {words} | {' | '.join(cells)} | {failed.note} |")
    more = []
    if (lost := found.get("sigterm_failed_requests")) is not None:
        more.append(f"SIGTERM under load: {lost.value:.0f} of the requests that were sent before it were not answered")
    if (hostile := found.get("hostile_internal")) is not None:
        harmed = sum(found[f"hostile_harmed_{pipeline}"].value for pipeline in ("ensemble", "single"))
        more.append(f"10,000 hostile requests: {hostile.value:.0f} answered otherwise than with OK or "
                    f"INVALID_ARGUMENT, {harmed:.0f} good ones beside them harmed")  # fmt: skip
    if (left := found.get("erase_left_bytes")) is not None:
        more.append(f"an erased user: {left.value:.0f} bytes left on the disk")
    if (overload := found.get("overload_goodput_3x")) is not None:
        more.append(f"three times what can be answered: {overload.value:.2f} of it answered in time "
                    f"({overload.low:.2f} to {overload.high:.2f})")  # fmt: skip
    return "\n".join([*lines, "", *(f"- {line}" for line in more)])


TRUST = {"vulnerabilities": vulnerabilities, "personal_data": personal_data, "sealed": sealed, "chaos": chaos,
         "differential": differential, "anonymised": anonymised}  # fmt: skip
