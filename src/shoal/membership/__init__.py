"""Who takes part: views, and how members agree on the next one."""
