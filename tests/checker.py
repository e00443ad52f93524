"""The run-time type checker behind jaxtyping while tests run."""

from beartype import BeartypeConf, beartype

# An int is welcome where a float is annotated, as PEP 484 has it.
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
