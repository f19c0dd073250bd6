"""The first days with one's own data, as README says it: text as ids, umlauts and Chinese, decimal commas, products
that nobody has met; then the next day's files without training; then a promotion that fails, health asked all the
while."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path

import numpy as np
import pytest
from trirank import InvalidRequest, RankClient, RankRequest, stable_id
from trirank_build.artefacts import tree_digests
from trirank_build.repository.release import MANIFEST, release_name
from trirank_build.repository.store import promote

README = (Path(__file__).parents[2] / "README.md").read_text()
START, DAY = 1_767_268_800, 86_400
WORDS = ("Lampe", "Tür", "Schlüssel", "Größe", "灯", "钥匙")


def sku(number):
    return f"SKU-{number:03}/ä"


def write_day(folder, seed, price_of_first, products):
    """A day's log of 3,000 rows and the item file beside it."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    liked = rng.integers(0, 6, 60)
    lines = ["user_id;item_id;behavior;timestamp"]
    for at in range(3_000):
        user = int(rng.integers(60))
        kind = liked[user] if rng.random() < 0.7 else rng.integers(6)
        item = int(kind + 6 * rng.integers(20))
        lines.append(f"Kundin {user};{sku(item)};{rng.choice(['click', 'cart', 'buy'])};{(START + at * 600) * 1000}")
    (folder / "user_behavior.csv").write_text("\n".join(lines) + "\n")
    rows = ["item_id;title;brand;price;available;farbe"]
    for item in range(products):
        price = price_of_first if item == 0 else f"{1_000 + item},{item % 100:02}"
        rows.append(f'{sku(item)};"{WORDS[item % 6]}, Nr. {item}";Marke {item % 6};{price} €;ja;rot')
    (folder / "items.csv").write_text("\n".join(rows) + "\n")


def run(command, folder):
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-ec", command], cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """README's block of "Your own data" up to the server, word for word but for a recipe that trains in seconds."""
    folder = tmp_path_factory.mktemp("newcomer")
    write_day(folder / "today", 1, "12,50", products=125)
    for name in ("user_behavior.csv", "items.csv"):
        shutil.copyfile(folder / "today" / name, folder / name)
    block = re.search(r"## Your own data.*?```sh\n(.*?)```", README, re.DOTALL)[1]
    block = re.sub(r"\\\n\s*", "", block).replace("source .venv/bin/activate\n", "")
    (folder / "quick.toml").write_text(
        'name = "quick"\n[features]\nhistory_length = 8\nvocabulary = 200\n[model]\ndim = 16\nheads = 2\n'
        "encoder_blocks = 1\nffn = 16\n[training]\nepochs = 1\ncandidates = 10\n"
    )
    commands = block.replace("train shop ", "train quick.toml ").strip().splitlines()
    assert commands[-1] == "trirank serve work/mine/releases/current --grpc-port 8001"
    said = run("\n".join(commands[:-1]), folder)
    return folder, said


@pytest.fixture(scope="module")
def served(shop):
    folder, _ = shop
    addresses, told = folder / "addresses.json", folder / "told"
    command = [
        sys.executable,
        "-m",
        "trirank_build.cli",
        "serve",
        "work/mine/releases/current",
        "--addresses",
        addresses,
    ]
    with told.open("w") as out, subprocess.Popen(command, cwd=folder, stdout=out, stderr=out) as process:
        try:
            wait_for(addresses.is_file, told, process)
            found = json.loads(addresses.read_text())
            assert found["pid"] == process.pid
            yield found, told, process
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)
    assert not addresses.exists()


def wait_for(condition, told, process, timeout_s=60):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, told.read_text()
        assert time.monotonic() < deadline, told.read_text()
        time.sleep(0.1)


def broken(good):
    """A release whose every digest is right, and which no server can load."""
    bad = shutil.copytree(good, good.parent / "bad")
    (bad / "features" / "catalogue" / "fields.npy").write_bytes(b"rubbish")
    files = {name: digest for name, digest in tree_digests(bad).items() if name != MANIFEST}
    manifest = json.loads((bad / MANIFEST).read_text()) | {"files": files, "release": release_name(files)}
    (bad / MANIFEST).write_text(json.dumps(manifest))
    return bad.rename(good.parent / manifest["release"])


def test_what_is_read_is_said(shop):
    said = shop[1]
    assert "item ids: strings, such as 'SKU-" in said
    assert "user ids: strings, such as 'Kundin " in said
    assert "timestamp: milliseconds since 1970" in said
    assert "price: a comma stands before the decimals" in said
    assert "items without an event, known by their content alone: 5" in said
    assert "columns that are not used: farbe" in said


def test_a_new_product_is_ranked_in_the_caller_s_ids(shop, served):
    asked = [sku(3), sku(9), sku(124)]
    with RankClient(served[0]["grpc"], deadline_s=10) as client:
        answer = client.rank(RankRequest(item_ids=asked, user_id="Kundin 7", query="灯"))
        assert sorted(answer.item_ids) == sorted(asked)
        assert answer.unknown == 0
        for wrong in (RankRequest(item_ids=[1, 2]), RankRequest(item_ids=asked, user_id=7)):
            with pytest.raises(InvalidRequest, match="is a number, and the catalogue's"):
                client.rank(wrong)
    command = f"trirank rank --server {served[0]['grpc']} --item {sku(3)} --item {sku(124)} --user 'Kundin 7' --json"
    found = json.loads(run(command, shop[0]))
    assert {item["item_id"] for item in found["items"]} == {sku(3), sku(124)}
    table = run(f"trirank rank --server {served[0]['grpc']} --release work/mine/releases/current", shop[0])
    assert re.search("Lampe|Tür|灯|钥匙", table)


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not here")
def test_another_language_sees_whole_ids(served):
    """63 bits of them, of which a Number of JavaScript keeps 53."""
    example = Path(__file__).parents[2] / "client" / "examples" / "rank.mjs"
    ids = [str(stable_id(sku(item))) for item in (3, 9, 124)]
    command = ["node", str(example), served[0]["http"], "灯", *ids]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert sorted(line.split()[1] for line in done.stdout.splitlines()) == sorted(ids)


def test_the_next_day_needs_no_training_and_a_bad_promotion_harms_nobody(shop, served):
    folder, addresses, told, process = shop[0], *served
    polls, not_ready, failed, stop = [], [], [], threading.Event()

    def health():
        with closing(HTTPConnection(addresses["http"], timeout=10)) as connection:
            while not stop.wait(0.01):
                connection.request("GET", "/v2/health/ready")
                answer = connection.getresponse()
                answer.read()
                polls.append(answer.status)
                not_ready.extend([answer.status] * (answer.status != 200))

    def load():
        with RankClient(addresses["grpc"], deadline_s=10) as client:
            while not stop.is_set():
                try:
                    client.rank(RankRequest(item_ids=[sku(1), sku(2)], user_id="Kundin 1"))
                except Exception as error:  # noqa: PERF203  # whatever it is, it shall not happen
                    failed.append(error)

    threads = [threading.Thread(target=each) for each in (health, load)]
    for thread in threads:
        thread.start()
    try:
        write_day(folder / "tomorrow", 1, "99.999,00", products=126)
        run(
            "trirank data prepare tomorrow/user_behavior.csv --items tomorrow/items.csv --out work/mine/newer\n"
            "trirank assemble --run work/mine/run --data work/mine/newer --onnx work/mine/ranker.onnx "
            "--out work/mine/releases --promote",
            folder,
        )
        wait_for(lambda: re.search(r"serving \w+ now", told.read_text()), told, process)
        with RankClient(addresses["grpc"], deadline_s=10) as client:
            answer = client.rank(RankRequest(item_ids=[sku(125), sku(0)], user_id="Kundin 7"))
        assert sorted(answer.item_ids) == [sku(0), sku(125)]
        table = run(
            f"trirank rank --server {addresses['grpc']} --release work/mine/releases/current --item {sku(0)}", folder
        )
        assert "99999.00" in table

        releases = folder / "work" / "mine" / "releases"
        good = (releases / "current").resolve()
        promote(broken(good))
        wait_for(lambda: f"{good.name} is served as before" in told.read_text(), told, process)
        assert "fields.npy cannot be read" in told.read_text()  # Triton has tried
        time.sleep(1)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert len(polls) > 100
    assert not_ready == []
    assert failed == []
