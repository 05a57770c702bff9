"""Leaf mathematics: pure functions of tensors that know nothing of models, ranks or files. Imports nothing
itself."""
