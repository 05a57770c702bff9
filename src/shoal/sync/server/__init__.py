"""The parameter server: weights and optimizer on servers, workers that push gradients and pull weights."""
