"""A trained ranker → a smaller and faster one with the same ranking; see docs/compression.md.

``step``      what a kind of step has to offer; ``recipe`` and ``chain`` know no more of it than that
``recipe``    the chain as a TOML file
``chain``     `trirank compress`: one step after the other, resumed at any
``finetune``  training between and after steps, against the dense teacher
``search``    `trirank compress --search`
"""
