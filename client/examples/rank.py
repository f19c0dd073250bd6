"""A plain script: rank candidates on a running server.

python client/examples/rank.py 127.0.0.1:8001 2309 748 506      # or SKU-1 SKU-2, where the catalogue has such ids
"""

import sys

from trirank import RankClient, RankError, RankRequest


def main() -> None:
    """Print the candidates in their new order."""
    address, *items = sys.argv[1:]
    numbers = all(item.lstrip("-").isdigit() for item in items)
    ids = [int(item) for item in items] if numbers else items
    request = RankRequest(item_ids=ids, query="coffee grinder", top_k=len(items))
    try:
        with RankClient(address, deadline_s=0.5, on_failure="retrieval_order") as client:
            response = client.rank(request)
    except RankError as error:  # at fault ourselves: no server, however well, would take it
        sys.exit(f"error: {error}")
    if response.degraded:
        print("the server did not answer in time; this is retrieval's order", file=sys.stderr)
    for item in response:
        print(item.position, item.item_id, f"{item.score:.3f}", item.reasons)


if __name__ == "__main__":
    main()
