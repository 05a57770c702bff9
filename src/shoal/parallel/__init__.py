"""How one replica of the model is spread over ranks."""
