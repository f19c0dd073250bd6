"""Rules that make scores a page: a policy a scenario, a rule a module."""

from trirank_backend.policies.page import Asked, Items, Live, Page
from trirank_backend.policies.policy import RULES, SHIPPED, Policy, load_policies, load_policy
from trirank_backend.policies.rule import Phase, Release, Rule, query_key

__all__ = [
    "RULES",
    "SHIPPED",
    "Asked",
    "Items",
    "Live",
    "Page",
    "Phase",
    "Policy",
    "Release",
    "Rule",
    "load_policies",
    "load_policy",
    "query_key",
]
