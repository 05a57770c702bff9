"""What a run is: the step, the loop, precision, validation, and how a run is resolved and resumed."""
