"""Locust's entry: `locust -f loadtest/locustfile.py --host 127.0.0.1:8001`, with its web page or `--headless`."""

from trirank_loadtest.user import RankUser

__all__ = ["RankUser"]
