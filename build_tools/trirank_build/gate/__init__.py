"""`trirank gate`: whether the ranking survived, from the dense ranker to the live ensemble; see docs/compression.md.

``stages``   the ranker in each of its forms, and what each makes of the same held-out requests
``verdict``  the thresholds, the report that `assemble` wants to see
``report``   the report as HTML
"""
