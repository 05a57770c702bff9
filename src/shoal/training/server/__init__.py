"""What the processes of a job with a parameter server do: coordinator, shards, workers, and before and after them."""
