"""How weights follow gradients: optimizers, schedules, norms."""
