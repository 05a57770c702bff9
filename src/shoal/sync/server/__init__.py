"""A parameter server: workers push gradients to server shards, a coordinator decides what is applied and when."""
