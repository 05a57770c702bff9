"""Raw text -> clean -> tokens -> store -> order -> pack -> batch. Pure functions of (seed, position)."""
